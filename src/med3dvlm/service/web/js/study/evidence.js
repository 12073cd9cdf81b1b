// What a sentence or an answer rests on: asked for once, laid over the images, jumped to.

import { ApiError, download, send } from "../api.js";
import { announce, fill, h, icon, iconButton } from "../dom.js";
import { cancel, follow } from "../jobs.js";
import { menu } from "../menu.js";
import { complain } from "../toast.js";

const HONEST = "Where the model's output depends on the voxels. No proof that it is right.";

export class Evidence {
  /** `onchange()` is called whenever another map, or none, is shown. */
  constructor(study, viewer, { session, signal, onchange }) {
    Object.assign(this, { study, viewer, session, signal, onchange });
    this.made = new Map(); // job results by what was explained
    this.current = null; // { key, label, job, peak }
    this.element = h("section", { class: "evidence-bar", aria: { label: "Evidence" }, hidden: true });
  }

  /** target: { sentence } or { question } or { text }; label: its words. */
  async show(target, label) {
    const key = JSON.stringify([target, label]);
    if (this.current?.key === key && !this.current.waiting) return this.jump();
    this.#stopWaiting();
    const current = { key, label, waiting: true };
    this.#set(current);
    try {
      const made = this.made.get(key) ?? (await this.#make(target, current));
      if (this.current !== current) return;
      this.made.set(key, made);
      await this.viewer.showEvidence(made.map, { signal: this.signal });
      if (this.current !== current) return;
      this.#set({ ...current, waiting: false, job: made.job, peak: made.peak_mm, method: made.method });
      this.jump();
      announce("The evidence is shown over the images.");
    } catch (error) {
      if (this.current === current) this.hide();
      complain(error);
    }
  }

  async #make(target, current) {
    const { job } = await send("POST", `/api/studies/${this.study.id}/evidence`, target, { signal: this.signal });
    current.job = job.id;
    const { result } = await follow(job.id, { signal: this.signal });
    if (result.empty) throw new ApiError("The model's output depends on no place in particular: there is nothing to show.");
    return { ...result, job: job.id };
  }

  #stopWaiting() {
    if (this.current?.waiting && this.current.job) cancel(this.current.job).catch(() => {});
  }

  hide() {
    this.#stopWaiting();
    this.viewer.hideEvidence();
    this.#set(null);
  }

  jump() {
    if (this.current?.peak) this.viewer.goTo(this.current.peak);
  }

  change(name, step) {
    const value = Math.min(1, Math.max(0, this.viewer.settings[name] + step));
    this.viewer.setEvidence({ [name]: value });
    const slider = this.element.querySelector(`[name="${name}"]`);
    if (slider) slider.value = String(Math.round(100 * value));
  }

  shows(target, label) {
    return this.current?.key === JSON.stringify([target, label]);
  }

  #set(current) {
    this.current = current;
    this.element.hidden = !current;
    if (current) fill(this.element, ...this.#bar(current));
    this.onchange();
  }

  #bar({ label, waiting, method }) {
    const slider = (name, text, keys) => h("label", { class: "slider" }, text,
      h("input", { type: "range", name, min: "0", max: "100", value: String(Math.round(100 * this.viewer.settings[name])), title: keys, oninput: (event) => this.viewer.setEvidence({ [name]: event.target.value / 100 }) }));
    return [
      icon("flame"),
      h("div", { class: "explained" }, h("p", { class: "what", title: label }, `“${label}”`), h("p", { class: "dim", title: method ? `Method: ${method}` : "" }, waiting ? "Looking for what this rests on …" : HONEST)),
      !waiting && h("span", { class: "scale", aria: { hidden: true } }, "low", h("i"), "high"),
      !waiting && slider("opacity", "Opacity", "[ and ]"),
      !waiting && slider("threshold", "From", "{ and }"),
      !waiting && iconButton("target", "Jump to the strongest evidence", () => this.jump(), { key: "p" }),
      !waiting && this.#save(),
      iconButton("close", waiting ? "Stop" : "Hide the evidence", () => this.hide(), { key: "e" }),
    ];
  }

  #save() {
    const { job } = this.current;
    const path = `/api/studies/${this.study.id}/evidence/${job}/export?format=`;
    const files = [["NIfTI", `/api/evidence/${job}/map.nii.gz`, "nii.gz"]];
    if (this.session.may("reports:export")) files.push(["DICOM Segmentation", `${path}seg`, "dcm"], ["DICOM Parametric Map", `${path}parametric-map`, "dcm"]);
    return menu(icon("download"), files.map(([name, from, ending]) => [name, () => download(from, `evidence-${job}.${ending}`)]),
      { props: { class: "icon-button", title: "Save the map", "aria-label": "Save the map" } });
  }
}
