// A signed report leaves: as a file, or to the PACS.

import { download, get, send } from "../api.js";
import { icon } from "../dom.js";
import { menu } from "../menu.js";
import { toast } from "../toast.js";

const FILES = [
  ["pdf", "PDF"],
  ["text", "Plain text"],
  ["json", "JSON"],
  ["fhir", "FHIR DiagnosticReport"],
  ["sr", "DICOM Structured Report"],
  ["basic-text-sr", "DICOM Basic Text SR"],
  ["encapsulated-pdf", "DICOM Encapsulated PDF"],
];
const SENT = ["sr", "basic-text-sr", "encapsulated-pdf"];

export function exportMenu(study) {
  return menu([icon("download"), "Export"], FILES.map(([format, name]) => [name, async () => {
    toast(`Saved as ${await download(`/api/studies/${study.id}/export?format=${format}`, `report-${study.id}.${format}`)}.`);
  }]));
}

/** Nothing where no PACS is set up. */
export async function sendMenu(study, { signal }) {
  const { configured } = await get("/api/pacs", { signal });
  if (!configured) return null;
  return menu([icon("send"), "Send to PACS"], FILES.filter(([format]) => SENT.includes(format)).map(([format, name]) => [name, async () => {
    await send("POST", `/api/studies/${study.id}/send`, { format });
    toast("The report was sent to the PACS.");
  }]), { props: { class: "primary" } });
}
