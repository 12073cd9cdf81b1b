// Fetch a study from the PACS: ask for it, choose it, see how far it is, and open it.

import { get } from "../api.js";
import { fill, h } from "../dom.js";
import * as format from "../format.js";
import { arrived, ask, meter } from "../imports.js";
import { cancel } from "../jobs.js";
import { complain, told } from "../toast.js";

const FIELDS = [["patient_name", "Patient's name"], ["patient_id", "Patient ID"], ["accession_number", "Accession number"], ["study_date", "Study date (YYYYMMDD)"]];
const MOST = 50;

/** onadded() whenever the worklist has changed; what is under way goes on when the dialog is closed. */
export function pacsDialog({ onadded, go }) {
  const inputs = FIELDS.map(([name, label]) => [name, h("label", {}, label, h("input", { name, autocomplete: "off" }))]);
  const results = h("ul", { class: "pacs-studies", tabindex: "0", aria: { label: "Studies found" } });
  const status = h("p", { class: "dim", role: "status" });
  const dialog = h("dialog", { class: "dialog wide", aria: { labelledby: "pacs-title" } });
  const closing = new AbortController();

  const find = told(async (event) => {
    event.preventDefault();
    const asked = new URLSearchParams({ limit: String(MOST) });
    for (const [name, label] of inputs) if (label.lastChild.value.trim()) asked.set(name, label.lastChild.value.trim());
    fill(status, "Asking the PACS …");
    const { studies } = await get(`/api/pacs/studies?${asked}`, { signal: closing.signal }).finally(() => fill(status));
    fill(status, studies.length ? format.count(studies.length, "study", "studies") : "The PACS has no such study.");
    results.replaceChildren(...studies.map(studyRow));
  });

  function studyRow(study) {
    const below = h("div", { class: "pacs-below" });
    return row(format.patient(study),
      [study.patient_id, study.description, study.modalities?.join(", "), format.date(study.study_date), study.images && format.count(study.images, "image")],
      async (place, open) => {
        const series = study.series === 1 ? [{}] : (await get(`/api/pacs/studies/${study.study_uid}/series`, { signal: closing.signal })).series.filter((one) => one.has_images);
        if (series.length === 1) return bring(study, series[0], place, open);
        fill(below, series.length ? h("ul", { aria: { label: "Series with images" } }, series.map((one) => seriesRow(study, one))) : h("p", { class: "problem" }, "The PACS has no images of this study."));
        return fill(place);
      }, below);
  }

  function seriesRow(study, series) {
    return row(series.description || `Series ${series.number ?? ""}`,
      [series.modality, series.images && format.count(series.images, "image")],
      (place, open) => bring(study, series, place, open));
  }

  function row(name, facts, take, below) {
    const place = h("div", { class: "pacs-place" });
    const offer = () => fill(place, [["Add", false], ["Open", true]].map(([text, open]) =>
      h("button", { type: "button", aria: { label: `${text} ${name}` }, onclick: () => run(open) }, text)));
    async function run(open) {
      for (const button of place.children) button.disabled = true;
      try {
        await take(place, open);
      } catch (error) {
        if (!closing.signal.aborted) offer();
        complain(error);
      }
    }
    offer();
    return h("li", {}, h("div", { class: "pacs-line" }, h("div", {}, h("strong", {}, name), h("p", { class: "dim" }, facts.filter(Boolean).join(" · "))), place), below);
  }

  /** Fetch a series, show how far it is, and open its study if that was asked for. */
  async function bring(study, { series_uid }, place, open) {
    const job = await ask({ study_uid: study.study_uid, ...(series_uid && { series_uid }) });
    onadded();
    const { bar, figure, show } = meter(format.patient(study));
    const stop = h("button", { type: "button", class: "quiet", onclick: told(() => cancel(job.id)) }, "Cancel");
    fill(place, h("div", { class: "pacs-meter" }, bar, figure), stop);
    const found = await arrived(job, { onprogress: show, signal: closing.signal });
    onadded();
    if (!open) return fill(place, h("span", { class: "badge final" }, "Added"));
    dialog.close();
    return go(`#/study/${found.id}`);
  }

  dialog.append(
    h("header", {}, h("h2", { id: "pacs-title" }, "From the PACS"), h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close")),
    h("form", { class: "content", onsubmit: find }, h("div", { class: "pacs-fields" }, inputs.map(([, label]) => label)), h("div", { class: "pacs-find" }, h("button", { class: "primary" }, "Find"), status), results));
  dialog.addEventListener("close", () => {
    closing.abort();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  inputs[0][1].lastChild.focus();
}
