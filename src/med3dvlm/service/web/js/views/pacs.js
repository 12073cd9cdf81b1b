// Fetch a study from the PACS: ask for it, choose it, and it is read as an upload is.

import { get, send } from "../api.js";
import { fill, h } from "../dom.js";
import * as format from "../format.js";
import { told, toast } from "../toast.js";

const FIELDS = [["patient_name", "Patient's name"], ["patient_id", "Patient ID"], ["accession_number", "Accession number"], ["study_date", "Study date (YYYYMMDD)"]];
const MOST = 50;

export function pacsDialog({ onadded }) {
  const inputs = FIELDS.map(([name, label]) => [name, h("label", {}, label, h("input", { name, autocomplete: "off" }))]);
  const results = h("ul", { class: "pacs-studies", tabindex: "0", aria: { label: "Studies found" } });
  const status = h("p", { class: "dim", role: "status" });
  const dialog = h("dialog", { class: "dialog wide", aria: { labelledby: "pacs-title" } });

  const find = told(async (event) => {
    event.preventDefault();
    const asked = new URLSearchParams({ limit: String(MOST) });
    for (const [name, label] of inputs) if (label.lastChild.value.trim()) asked.set(name, label.lastChild.value.trim());
    fill(status, "Asking the PACS …");
    const { studies } = await get(`/api/pacs/studies?${asked}`).finally(() => fill(status));
    fill(status, studies.length ? format.count(studies.length, "study", "studies") : "The PACS has no such study.");
    results.replaceChildren(...studies.map(row));
  });

  function row(study) {
    const button = h("button", { type: "button", onclick: told(async () => {
      button.disabled = true;
      try {
        await send("POST", "/api/pacs/import", { study_uid: study.study_uid });
        fill(button, "Added");
        toast(`${format.patient(study)} is being fetched.`);
        onadded();
      } catch (error) {
        button.disabled = false;
        throw error;
      }
    }) }, "Add");
    return h("li", {}, h("div", {}, h("strong", {}, format.patient(study)),
      h("p", { class: "dim" }, [study.patient_id, study.description, study.modalities?.join(", "), format.date(study.study_date), study.images && format.count(study.images, "image")].filter(Boolean).join(" · "))), button);
  }

  dialog.append(
    h("header", {}, h("h2", { id: "pacs-title" }, "From the PACS"), h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close")),
    h("form", { class: "content", onsubmit: find }, h("div", { class: "pacs-fields" }, inputs.map(([, label]) => label)), h("button", { class: "primary" }, "Find"), status, results));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
