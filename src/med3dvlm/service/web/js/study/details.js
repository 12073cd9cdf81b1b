// What the headers of the study say.

import { h, icon } from "../dom.js";
import * as format from "../format.js";

export function details(study) {
  const rows = [
    ["Patient", format.personName(study.patient_name)],
    ["Patient ID", study.patient_id],
    ["Accession number", study.accession_number],
    ["Description", study.description],
    ["Study date", format.date(study.study_date)],
    ["Modality", study.modality],
    ["Voxels", study.shape?.length && `${format.grid(study.shape)} (slices × rows × columns)`],
    ["Spacing", study.spacing_mm?.length && format.spacing(study.spacing_mm)],
    ["Values", study.units === "HU" ? "Hounsfield units" : "Not calibrated"],
    ["Orientation", study.orientation === "unknown" ? "Not known: sides are not marked" : null],
    ["Received", `${format.moment(study.created)}${study.created_by ? `, from ${study.created_by}` : ""}`],
    ["Came by", study.source],
    ["Study UID", study.study_uid],
    ["Series UID", study.series_uid],
  ];
  return h("div", { class: "details" },
    study.warnings?.length ? h("section", { class: "warnings" }, h("h3", {}, "Notes of the reader"), h("ul", {}, study.warnings.map((text) => h("li", {}, icon("warning"), h("span", {}, text))))) : null,
    h("dl", {}, rows.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "figures" }, value)))));
}
