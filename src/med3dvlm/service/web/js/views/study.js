// One study: the images on the left, what is said about them on the right.

import { get } from "../api.js";
import { fill, h, iconButton, kbd } from "../dom.js";
import * as format from "../format.js";
import { scope } from "../keys.js";
import { Ask } from "../study/ask.js";
import { details } from "../study/details.js";
import { Evidence } from "../study/evidence.js";
import { History } from "../study/history.js";
import { Report } from "../study/report.js";
import { LAYOUTS, Viewer } from "../study/viewer.js";
import { WHOLE, WINDOWS, levelWidth } from "../study/windows.js";
import { complain, told } from "../toast.js";
import { tabs } from "../tabs.js";

const PAGE_OF_SLICES = 5;

export function studyView(main, id, { session, go, crumb, rename }) {
  const leaving = new AbortController();
  const { signal } = leaving;
  const parts = {};
  const free = [];

  async function open() {
    fill(main, h("div", { class: "empty", role: "status" }, "Opening the study …"));
    const study = await get(`/api/studies/${id}`, { signal });
    if (study.state !== "ready") {
      fill(main, h("div", { class: "empty" }, h("h2", {}, study.state === "refused" ? "This study was refused" : "This study is being prepared"),
        h("p", {}, study.reason || "Come back in a moment."), h("a", { class: "button", href: "#/" }, "Back to the worklist")));
      return;
    }
    rename(`${format.patient(study)} · ${format.title(study)}`);
    crumb(h("strong", {}, format.patient(study)), h("span", {}, [study.patient_id, format.title(study), format.date(study.study_date)].filter(Boolean).join(" · ")));
    build(study);
    await Promise.all([parts.report.load(), parts.ask.load()].map((loading) => loading.catch(complain)));
  }

  function build(study) {
    const frame = h("div", { class: "images" });
    const loading = h("div", { class: "loading", role: "status" }, h("p", {}, "Loading the images"), h("progress", { max: 1, value: 0 }));
    const windowText = h("span", { class: "window" });
    const cursor = { place: h("span"), value: h("strong"), evidence: h("span", { class: "dim" }) };
    const presets = study.units === "HU" ? [...WINDOWS, WHOLE] : [WHOLE];
    const windows = h("div", { class: "segments", role: "group", aria: { label: "Window" } }, presets.map((preset) =>
      h("button", { type: "button", title: preset.width ? `${preset.name}: level ${preset.level}, width ${preset.width} HU` : preset.name, data: { name: preset.name }, aria: { pressed: false }, onclick: () => viewer.setWindow(preset) }, preset.short, kbd(preset.key))));
    const layouts = h("div", { class: "layouts", role: "group", aria: { label: "Layout" } }, Object.entries(LAYOUTS).filter(([, layout]) => layout.icon).map(([name, layout]) =>
      iconButton(layout.icon, layout.name, () => viewer.setLayout(name), { key: layout.key, data: { name } })));
    const crosshair = iconButton("crosshair", "Crosshair", () => crosshair.setAttribute("aria-pressed", String(viewer.toggleCrosshair())), { key: "h", "aria-pressed": "true" });

    const viewer = new Viewer(frame, {
      window: ({ low, high, name }) => {
        const { level, width } = levelWidth(low, high);
        fill(windowText, name ? `${name} · ` : "", `L ${format.signed(level)}  W ${format.signed(width)}`);
        for (const button of windows.children) button.setAttribute("aria-pressed", String(button.dataset.name === name));
      },
      layout: (name) => {
        for (const button of layouts.children) button.setAttribute("aria-pressed", String(button.dataset.name === name));
      },
      cursor: ({ place, value, evidence }) => {
        cursor.place.textContent = place;
        cursor.value.textContent = value;
        cursor.evidence.textContent = evidence === null ? "" : `evidence ${Math.round(evidence)}%`;
      },
      progress: (share) => (loading.querySelector("progress").value = share),
    });
    const evidence = new Evidence(study, viewer, { session, signal, onchange: () => (parts.report?.refresh(), parts.ask?.mark()) });
    const history = new History(study, { signal });
    const report = new Report(study, evidence, { session, signal, onsaved: () => panel.chosen === "history" && history.load().catch(complain) });
    const ask = new Ask(study, evidence, { session, signal });
    const panel = tabs([
      { name: "report", label: "Report", key: "r", content: report.element },
      { name: "ask", label: "Ask", key: "g", content: ask.element },
      { name: "history", label: "Changes", key: "v", content: history.element, onshow: () => history.load().catch(complain) },
      { name: "details", label: "Study", key: "b", content: details(study) },
    ], { label: "About this study" });
    Object.assign(parts, { viewer, evidence, history, report, ask, panel });

    fill(main,
      h("section", { class: "viewer", aria: { label: "Images" } },
        h("div", { class: "viewer-tools" }, windows, layouts, h("span", { class: "spring" }), crosshair,
          iconButton("reset", "Reset the view", () => viewer.reset(), { key: "Backspace" })),
        frame, evidence.element,
        h("div", { class: "readout figures" }, windowText, h("span", { class: "spring" }), cursor.evidence, cursor.value, cursor.place)),
      h("section", { class: "panel", aria: { label: "Report and questions" } }, panel.element,
        session.may("search") && h("a", { class: "button similar", href: `#/search?study=${study.id}`, aria: { label: "Similar studies", keyshortcuts: "l" } }, "Similar", kbd("l"))));
    frame.append(loading);
    viewer.open(`/api/studies/${study.id}/volume.nii.gz`, { units: study.units, orientation: study.orientation, signal })
      .catch((error) => error.name === "AbortError" || (fill(loading, h("p", {}, error.message)), complain(error)))
      .then(() => viewer.volume && loading.remove());
    shortcuts(study);
  }

  function shortcuts(study) {
    const { viewer, evidence, report, ask, panel } = parts;
    const presets = study.units === "HU" ? [...WINDOWS, WHOLE] : [WHOLE];
    free.push(
      scope("Images", [
        { key: "ArrowDown", label: "Next slice of the plane last used", run: () => viewer.scroll(-1) },
        { key: "ArrowUp", label: "Previous slice", run: () => viewer.scroll(1) },
        { key: "PageDown", label: `${PAGE_OF_SLICES} slices on`, run: () => viewer.scroll(-PAGE_OF_SLICES) },
        { key: "PageUp", label: `${PAGE_OF_SLICES} slices back`, run: () => viewer.scroll(PAGE_OF_SLICES) },
        ...presets.map((preset) => ({ key: preset.key, label: preset.width ? `${preset.name} window` : preset.name, run: () => viewer.setWindow(preset) })),
        ...Object.entries(LAYOUTS).map(([name, { key, name: label }]) => ({ key, label, run: () => viewer.setLayout(name) })),
        { key: ["+", "="], label: "Larger", run: () => viewer.zoom(1.25) },
        { key: "-", label: "Smaller", run: () => viewer.zoom(0.8) },
        { key: "h", label: "Crosshair on, off", run: () => document.querySelector('[aria-label="Crosshair"]').click() },
        { key: "Backspace", label: "Reset the view", run: () => viewer.reset() },
      ]),
      scope("Evidence", [
        { key: "e", label: "Evidence of the sentence, on and off", run: () => (evidence.current ? evidence.hide() : report.explain()) },
        { key: "p", label: "Jump to its strongest place", run: () => evidence.jump() },
        { key: "[", label: "Fainter", run: () => evidence.change("opacity", -0.1) },
        { key: "]", label: "Stronger", run: () => evidence.change("opacity", 0.1) },
        { key: "{", label: "Show more of it", run: () => evidence.change("threshold", -0.05) },
        { key: "}", label: "Show less of it", run: () => evidence.change("threshold", 0.05) },
      ]),
      scope("Report", [
        { key: "j", label: "Next sentence", run: () => inReport(() => report.step(1)) },
        { key: "k", label: "Previous sentence", run: () => inReport(() => report.step(-1)) },
        { key: "Enter", label: "Show its evidence", run: () => inReport(() => report.explain()) },
        { key: "y", label: "Accept it", run: () => inReport(() => report.mark("accepted")) },
        { key: "x", label: "Reject it", run: () => inReport(() => report.mark("rejected")) },
        { key: ["i", "F2"], label: "Edit it", run: () => inReport(() => report.edit()) },
        { key: "o", label: "Add a sentence after it", run: () => inReport(() => report.add()) },
        { key: "Y", label: "Accept all that are left", run: () => inReport(() => report.acceptRest()) },
        { key: ["z", "Ctrl+z"], label: "Undo", run: () => inReport(() => report.undo()) },
        { key: "Ctrl+s", label: "Save now", run: told(() => report.save()) },
        { key: "S", label: "Sign", run: () => inReport(told(() => report.sign())) },
      ]),
      scope("Panels", [
        { key: "r", label: "Report", run: () => (panel.choose("report"), report.focus()) },
        { key: ["g", "/"], label: "Ask a question", run: () => (panel.choose("ask"), ask.focus()) },
        { key: "v", label: "Changes and versions", run: () => panel.choose("history", { focus: true }) },
        { key: "b", label: "About the study", run: () => panel.choose("details", { focus: true }) },
        { key: "l", label: "More like this study", run: () => go(`#/search?study=${id}`) },
      ]),
    );
  }

  function inReport(run) {
    parts.panel.choose("report");
    run();
  }

  function warn(event) {
    if (!parts.report?.unsaved) return;
    parts.report.save().catch(() => {});
    event.preventDefault();
  }
  window.addEventListener("beforeunload", warn);

  open().catch((error) => {
    if (error.name === "AbortError") return;
    fill(main, h("div", { class: "empty" }, h("h2", {}, "This study cannot be opened"), h("p", {}, error.message), h("a", { class: "button", href: "#/" }, "Back to the worklist")));
  });
  return () => {
    window.removeEventListener("beforeunload", warn);
    parts.report?.save().catch(complain);
    leaving.abort();
    for (const release of free) release();
    parts.viewer?.close();
  };
}
