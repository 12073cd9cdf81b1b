// The images: NiiVue draws them, this lays them out, names the planes and says what is under the cursor.

import { DRAG_MODE, Niivue, NVImage, SLICE_TYPE } from "../../vendor/niivue.js";
import { bytes } from "../api.js";
import { append, h } from "../dom.js";
import * as format from "../format.js";
import { WHOLE, WINDOWS, named, range } from "./windows.js";

const GAP = 0.002; // of the canvas between two views
const FROM_THE_FRONT = [200, 12]; // degrees, a little to the side
const SHINE = 0.45; // of surfaces in 3D
const SURFACES = 0.55; // how far 3D shows edges rather than what lies between
const EVIDENCE_COLOURS = "inferno";
const { AXIAL, CORONAL, SAGITTAL, RENDER } = SLICE_TYPE;
const PLANES = {
  [AXIAL]: { name: "Axial", axis: 2, letters: ["R", "L", "A", "P"] },
  [CORONAL]: { name: "Coronal", axis: 1, letters: ["R", "L", "S", "I"] },
  [SAGITTAL]: { name: "Sagittal", axis: 0, letters: ["A", "P", "S", "I"] },
};

/** The layouts by name: [plane, left, top, width, height] in shares of the canvas. */
export const LAYOUTS = {
  planes: { name: "Three planes", key: "m", icon: "planes", views: [[AXIAL, 0, 0, 0.62, 1], [CORONAL, 0.62, 0, 0.38, 0.5], [SAGITTAL, 0.62, 0.5, 0.38, 0.5]] },
  quad: { name: "Three planes and 3D", key: "q", icon: "quad", views: [[AXIAL, 0, 0, 0.5, 0.5], [SAGITTAL, 0.5, 0, 0.5, 0.5], [CORONAL, 0, 0.5, 0.5, 0.5], [RENDER, 0.5, 0.5, 0.5, 0.5]] },
  axial: { name: "Axial", key: "a", views: [[AXIAL, 0, 0, 1, 1]] },
  coronal: { name: "Coronal", key: "c", views: [[CORONAL, 0, 0, 1, 1]] },
  sagittal: { name: "Sagittal", key: "s", views: [[SAGITTAL, 0, 0, 1, 1]] },
  volume: { name: "3D", key: "d", icon: "cube", views: [[RENDER, 0, 0, 1, 1]] },
};

/**
 * A viewer in `frame`. It tells what it shows through `on`:
 * on.window({ low, high, name }), on.cursor(text), on.layout(name), on.progress(share)
 */
export class Viewer {
  constructor(frame, on) {
    this.on = on;
    this.canvas = h("canvas", { tabindex: "0", aria: { label: "Images. Arrow keys scroll, number keys set the window." } });
    this.labels = h("div", { class: "labels", aria: { hidden: true } });
    append(frame, [this.canvas, this.labels]);
    this.layout = "planes";
    this.plane = AXIAL;
    this.evidence = null;
    this.settings = { opacity: 0.55, threshold: 0.35 };
    this.niivue = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairWidth: 0, // ours is one pixel wide at every zoom
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      isOrientationTextVisible: false,
      isColorbar: false,
      dragAndDropEnabled: false,
      loadingText: "",
      logLevel: "error",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      viewModeHotKey: "",
      multiplanarForceRender: false,
      mouseEventConfig: {
        leftButton: { primary: DRAG_MODE.crosshair, withShift: DRAG_MODE.measurement, withCtrl: DRAG_MODE.pan },
        rightButton: DRAG_MODE.windowing,
        centerButton: DRAG_MODE.pan,
      },
      measureLineColor: [0.49, 0.77, 0.85, 1],
      measureTextColor: [0.9, 0.92, 0.93, 1],
    });
    const draw = this.niivue.drawScene.bind(this.niivue);
    this.niivue.drawScene = () => (draw(), this.#drawCrosshair());
    this.niivue.onLocationChange = () => this.#moved();
    this.niivue.onIntensityChange = () => this.#windowChanged();
    this.canvas.addEventListener("pointermove", (event) => this.#hover(event));
    this.canvas.addEventListener("pointerleave", () => this.#tell(this.niivue.scene.crosshairPos));
    this.canvas.addEventListener("pointerup", () => requestAnimationFrame(() => this.#windowChanged()));
    // NiiVue has keys of its own, one of which opens an `alert`; the page's come first (keys.js)
    for (const name of ["keydown", "keyup"]) this.canvas.addEventListener(name, (event) => event.stopImmediatePropagation(), { capture: true });
  }

  /** Raises where the browser has no WebGL 2. */
  async open(url, { units, orientation, signal }) {
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error("This browser cannot draw volumes (no WebGL 2): the images are not shown.");
    }
    await this.niivue.attachToCanvas(this.canvas, false);
    const buffer = await bytes(url, { signal, onprogress: this.on.progress });
    signal?.throwIfAborted();
    const volume = await NVImage.loadFromUrl({ url: buffer, name: "volume.nii.gz", colormap: "gray" });
    this.niivue.addVolume(volume);
    this.units = units;
    this.orientation = orientation;
    this.niivue.setRenderAzimuthElevation(...FROM_THE_FRONT);
    this.setLayout(this.layout);
    this.setWindow();
    this.#moved();
  }

  close() {
    this.niivue.cleanup();
    this.niivue.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  }

  get volume() {
    return this.niivue.volumes[0];
  }

  // --- window ------------------------------------------------------------------------------

  setWindow(preset = this.units === "HU" ? WINDOWS[0] : WHOLE) {
    const { volume } = this;
    if (!volume) return;
    [volume.cal_min, volume.cal_max] = preset === WHOLE ? this.#whole() : range(preset);
    this.niivue.updateGLVolume();
    this.#windowChanged();
  }

  #whole() {
    const { volume } = this;
    if (this.units === "HU") return [volume.global_min, volume.global_max];
    return [volume.robust_min, volume.robust_max];
  }

  #windowChanged() {
    const { volume } = this;
    if (!volume) return;
    const [low, high] = [volume.cal_min, volume.cal_max];
    this.on.window({ low, high, name: (this.units === "HU" && named(low, high)?.name) || null });
  }

  // --- layout ------------------------------------------------------------------------------

  setLayout(name) {
    this.layout = name;
    const { views } = LAYOUTS[name];
    this.niivue.setCustomLayout(views.map(([plane, left, top, width, height]) => ({
      sliceType: plane,
      position: [left, top, left + width < 1 ? width - GAP : width, top + height < 1 ? height - GAP : height],
    })));
    this.#light(views.some(([plane]) => plane === RENDER));
    if (!views.some(([plane]) => plane === this.plane)) this.plane = views[0][0];
    this.labels.replaceChildren(...views.map((view) => this.#label(view)));
    this.on.layout(name);
    this.#moved();
  }

  /** Surfaces are lit only while 3D is shown: their gradients are computed again at every window. */
  #light(on) {
    if (this.lit === on || !this.volume) return;
    this.lit = on;
    this.niivue.setGradientOpacity(on ? SURFACES : 0);
    this.niivue.setVolumeRenderIllumination(on ? SHINE : 0);
  }

  #label([plane, left, top, width, height]) {
    const known = PLANES[plane];
    const certain = this.orientation !== "unknown";
    const percent = (share) => `${share * 100}%`;
    return h("div", { class: "view", data: { plane }, vars: { left: percent(left), top: percent(top), width: percent(width), height: percent(height) } },
      known && [h("i", { class: "cross up" }), h("i", { class: "cross down" }), h("i", { class: "cross before" }), h("i", { class: "cross after" })],
      h("span", { class: "plane" }, known?.name ?? "3D"), h("span", { class: "slice" }),
      known && certain && known.letters.map((letter, i) => h("span", { class: `letter ${["left", "right", "top", "bottom"][i]}` }, letter)));
  }

  // --- crosshair ---------------------------------------------------------------------------

  /** Scroll the plane that was last used. */
  scroll(slices) {
    const { axis } = PLANES[this.plane] ?? PLANES[AXIAL];
    const step = [0, 0, 0];
    step[axis] = slices;
    this.niivue.moveCrosshairInVox(...step);
  }

  /** To a point in patient coordinates (LPS, mm). */
  goTo([x, y, z]) {
    const { niivue } = this;
    niivue.scene.crosshairPos = niivue.mm2frac([-x, -y, z], 0, true);
    niivue.createOnLocationChange();
    niivue.drawScene();
  }

  toggleCrosshair() {
    return !this.labels.classList.toggle("no-crosshair");
  }

  #drawCrosshair() {
    if (!this.volume) return;
    const scale = this.niivue.uiData.dpr ?? 1;
    for (const label of this.labels.children) {
      const plane = Number(label.dataset.plane);
      const place = plane in PLANES && this.niivue.frac2canvasPosWithTile(this.niivue.scene.crosshairPos, plane);
      if (!place) continue;
      label.style.setProperty("--x", `${place.pos[0] / scale - label.offsetLeft}px`);
      label.style.setProperty("--y", `${place.pos[1] / scale - label.offsetTop}px`);
    }
  }

  reset() {
    this.niivue.setPan2Dxyzmm([0, 0, 0, 1]);
    this.niivue.clearAllMeasurements();
    this.niivue.setScale(1);
    this.niivue.scene.crosshairPos = [0.5, 0.5, 0.5];
    this.niivue.createOnLocationChange();
    this.setWindow();
  }

  zoom(factor) {
    const [x, y, z, scale] = this.niivue.scene.pan2Dxyzmm;
    this.niivue.setPan2Dxyzmm([x, y, z, Math.min(8, Math.max(0.5, scale * factor))]);
  }

  #moved() {
    if (!this.volume) return;
    const position = this.niivue.scene.crosshairPos;
    const voxel = this.niivue.frac2vox(position);
    const { dimsRAS } = this.volume;
    for (const label of this.labels.children) {
      const known = PLANES[label.dataset.plane];
      if (known) label.querySelector(".slice").textContent = `${voxel[known.axis] + 1} / ${dimsRAS[known.axis + 1]}`;
    }
    this.#tell(position);
  }

  #hover(event) {
    if (!this.volume) return;
    const { niivue } = this;
    const scale = niivue.uiData.dpr ?? 1;
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const tile = niivue.tileIndex(x, y);
    const plane = niivue.screenSlices[tile]?.axCorSag;
    if (plane in PLANES) this.plane = plane;
    const position = plane in PLANES ? niivue.canvasPos2frac([x, y]) : [-1];
    this.#tell(position[0] >= 0 ? position : niivue.scene.crosshairPos);
  }

  #tell(position) {
    const { volume } = this;
    if (!volume) return;
    const [x, y, z] = this.niivue.frac2mm(position, 0, true);
    const voxel = volume.mm2vox([x, y, z]);
    const value = volume.getValue(...voxel);
    this.on.cursor({
      place: format.position([-x, -y, z]),
      value: this.units === "HU" ? `${format.signed(value)} HU` : Number(value).toPrecision(4),
      evidence: this.evidence ? this.evidence.getValue(...this.evidence.mm2vox([x, y, z])) : null,
    });
  }

  // --- evidence ----------------------------------------------------------------------------

  /** Lay a map over the images; whole percent of its own most. */
  async showEvidence(url, { signal } = {}) {
    const buffer = await bytes(url, { signal });
    signal?.throwIfAborted();
    this.hideEvidence();
    this.evidence = await NVImage.loadFromUrl({ url: buffer, name: "evidence.nii.gz", colormap: EVIDENCE_COLOURS, opacity: this.settings.opacity, cal_min: 100 * this.settings.threshold, cal_max: 100 });
    this.niivue.addVolume(this.evidence);
    this.setEvidence(this.settings);
  }

  hideEvidence() {
    if (this.evidence) this.niivue.removeVolume(this.evidence);
    this.evidence = null;
  }

  /** { opacity, threshold } from 0 to 1 */
  setEvidence(settings) {
    Object.assign(this.settings, settings);
    if (!this.evidence) return;
    const most = this.evidence.global_max > 1.5 ? 100 : 1;
    this.evidence.cal_min = Math.max(0.01, this.settings.threshold) * most;
    this.evidence.cal_max = most;
    this.evidence.opacity = this.settings.opacity;
    this.niivue.updateGLVolume();
  }
}
