// The worklist: what came in, newest first; find, open, add.

import { get } from "../api.js";
import { announce, fill, h, icon, kbd } from "../dom.js";
import * as format from "../format.js";
import { importsList } from "../imports.js";
import { scope } from "../keys.js";
import { complain } from "../toast.js";
import { uploads } from "../uploads.js";
import { pacsDialog } from "./pacs.js";

const PAGE = 50;
const TYPING_MS = 200;
const BUSY_MS = 2000;
const IDLE_MS = 15000;
const FILTERS = [["", "All"], ["none", "No report"], ["draft", "Draft"], ["final", "Signed"]];
const REPORT = { none: "No report", drafting: "Drafting", draft: "Draft", final: "Signed" };
const STATE = { received: "Preparing", refused: "Refused" };

export function worklistView(main, query, { session, go, rename }) {
  const list = { studies: [], next: null, selected: null, text: query.get("text") ?? "", report: query.get("report") ?? "" };
  const leaving = new AbortController();
  let timer = 0;

  const search = h("input", { type: "search", placeholder: "Patient, number, description", value: list.text, aria: { label: "Search the worklist" }, oninput: later });
  const filters = h("div", { class: "segments", role: "group", aria: { label: "Reports" } }, FILTERS.map(([value, label]) =>
    h("button", { type: "button", data: { value }, aria: { pressed: value === list.report }, onclick: () => filter(value) }, label)));
  const count = h("p", { class: "dim figures", role: "status" });
  const rows = h("tbody");
  const table = h("table", { class: "studies" },
    h("caption", { class: "unseen" }, "Studies, newest first"),
    h("thead", {}, h("tr", {}, ["Image", "Patient", "Study", "Study date", "Voxels", "Received", "Report"].map((name) => h("th", { scope: "col" }, name)))),
    rows);
  const empty = h("div", { class: "empty", hidden: true });
  const more = h("button", { type: "button", hidden: true, onclick: () => load({ append: true }) }, "Show more");
  const adding = uploads(main, { onadded: () => load() });
  const coming = importsList({ session, signal: leaving.signal, onarrived: () => load(), go });

  if (session.may("studies:upload")) adding.listen();
  if (session.may("pacs:import")) offerPacs().catch(complain);

  fill(main,
    h("div", { class: "tools" },
      h("h1", {}, "Worklist"),
      h("label", { class: "field" }, icon("search"), search, kbd("/")),
      filters, count, session.may("studies:upload") && adding.buttons),
    adding.progress, coming.list,
    h("div", { class: "table-frame" }, table, empty, more),
    adding.target);

  async function offerPacs() {
    const { configured } = await get("/api/pacs", { signal: leaving.signal });
    if (!configured) return;
    const onadded = () => (load(), coming.refresh());
    adding.buttons.prepend(h("button", { type: "button", onclick: () => pacsDialog({ onadded, go }) }, "From the PACS"));
    await coming.refresh();
  }

  // --- loading -----------------------------------------------------------------------------

  async function load({ append = false } = {}) {
    clearTimeout(timer);
    const asked = new URLSearchParams({ limit: String(append ? PAGE : Math.max(PAGE, list.studies.length)) });
    if (list.text) asked.set("text", list.text);
    if (list.report) asked.set("report", list.report);
    if (append && list.next) asked.set("cursor", list.next);
    try {
      const found = await get(`/api/studies?${asked}`, { signal: leaving.signal });
      list.studies = append ? [...list.studies, ...found.studies] : found.studies;
      list.next = found.next;
      show();
    } catch (error) {
      if (error.status !== 0) complain(error);
    }
    if (leaving.signal.aborted) return;
    const busy = list.studies.some(({ state, report_state }) => state === "received" || report_state === "drafting");
    timer = setTimeout(load, busy ? BUSY_MS : IDLE_MS);
  }

  function later() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      list.text = search.value.trim();
      load();
    }, TYPING_MS);
  }

  function filter(value) {
    list.report = value;
    for (const button of filters.children) button.setAttribute("aria-pressed", String(button.dataset.value === value));
    load();
  }

  // --- showing -----------------------------------------------------------------------------

  function show() {
    const focused = rows.contains(document.activeElement);
    if (!list.studies.some(({ id }) => id === list.selected)) list.selected = list.studies[0]?.id ?? null;
    rows.replaceChildren(...list.studies.map(row));
    const nothing = list.studies.length === 0;
    table.hidden = nothing;
    empty.hidden = !nothing;
    if (nothing) fill(empty, ...nothingThere());
    more.hidden = !list.next;
    fill(count, nothing ? "" : `${format.count(list.studies.length, "study", "studies")}${list.next ? ", and more" : ""}`);
    if (focused) select(list.selected, { focus: true });
  }

  function nothingThere() {
    if (list.text || list.report) return [h("h2", {}, "No study fits"), h("p", {}, "Change the words or the filter.")];
    return [h("h2", {}, "No studies yet"),
      h("p", {}, "Drop DICOM files, a folder, a zip or NIfTI files anywhere on this page, or choose them above.")];
  }

  function row(study) {
    const selected = study.id === list.selected;
    const open = study.state === "ready";
    const name = format.patient(study);
    return h("tr", { data: { id: study.id, selected }, onclick: (event) => event.target.closest("a, button") || (open ? enter(study.id) : select(study.id)) },
      h("td", { class: "image" }, thumbnail(study)),
      h("td", {}, open
        ? h("a", { class: "name", href: `#/study/${study.id}`, tabindex: selected ? "0" : "-1", onfocus: () => select(study.id) }, name)
        : h("span", { class: "name", tabindex: selected ? "0" : "-1", onfocus: () => select(study.id) }, name),
        h("small", {}, [study.patient_id, study.accession_number].filter(Boolean).join(" · "))),
      h("td", {}, h("span", {}, format.title(study)), h("small", {}, [study.modality, study.warnings?.length ? format.count(study.warnings.length, "note") : ""].filter(Boolean).join(" · "))),
      h("td", { class: "figures" }, format.date(study.study_date)),
      h("td", { class: "figures" }, h("span", {}, format.grid(study.shape)), h("small", {}, format.spacing(study.spacing_mm))),
      h("td", { class: "figures" }, h("span", {}, format.moment(study.created)), h("small", {}, study.created_by ?? "")),
      h("td", {}, state(study)));
  }

  function state(study) {
    if (study.state === "refused") return [h("span", { class: "badge refused" }, "Refused"), h("small", { class: "reason" }, study.reason)];
    if (study.state !== "ready") return h("span", { class: "badge busy" }, STATE[study.state] ?? study.state);
    const kind = study.report_state;
    return h("span", { class: `badge ${kind} ${kind === "drafting" ? "busy" : ""}` }, REPORT[kind] ?? kind);
  }

  // --- choosing ----------------------------------------------------------------------------

  function select(id, { focus = false } = {}) {
    list.selected = id;
    for (const element of rows.children) {
      const chosen = element.dataset.id === id;
      element.dataset.selected = String(chosen);
      element.querySelector(".name").tabIndex = chosen ? 0 : -1;
      if (!chosen || !focus) continue;
      element.querySelector(".name").focus({ preventScroll: true });
      element.scrollIntoView({ block: "nearest" });
    }
  }

  function move(step) {
    const at = list.studies.findIndex(({ id }) => id === list.selected);
    const focused = rows.contains(document.activeElement);
    const study = list.studies[focused || at < 0 ? Math.min(Math.max(at + step, 0), list.studies.length - 1) : at];
    if (study) select(study.id, { focus: true });
  }

  function enter(id = list.selected) {
    const study = list.studies.find((one) => one.id === id);
    if (study?.state === "ready") go(`#/study/${id}`);
    else if (study) announce(study.reason || "This study is still being prepared.");
  }

  const free = scope("Worklist", [
    { key: ["j", "ArrowDown"], label: "Next study", run: () => move(1) },
    { key: ["k", "ArrowUp"], label: "Previous study", run: () => move(-1) },
    { key: ["Enter", "o"], label: "Open the study", run: () => enter() },
    { key: "/", label: "Search the worklist", run: () => search.focus() },
    ...(session.may("studies:upload") ? [{ key: "u", label: "Add studies from files", run: adding.choose }] : []),
  ]);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && search.value) [search.value, list.text] = ["", ""], load();
    else if (event.key === "Enter" || event.key === "ArrowDown") event.preventDefault(), select(list.selected, { focus: true });
  });

  rename("Worklist");
  load();
  return () => {
    clearTimeout(timer);
    leaving.abort();
    coming.leave();
    adding.leave();
    free();
  };
}

/** The study's picture, or its place where there is none. */
export function thumbnail(study) {
  if (study.state !== "ready") return h("span", { class: "no-image" });
  return h("img", { src: `/api/studies/${study.id}/thumbnail.png`, alt: "", loading: "lazy", onerror: (event) => event.target.classList.add("no-image") });
}
