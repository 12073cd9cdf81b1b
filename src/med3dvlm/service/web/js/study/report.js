// The draft, sentence by sentence: its confidence, what it rests on, and what the reader makes of it.
//
// Changes are made on a working copy and saved as a new version shortly after the last of them.

import { ApiError, get, send } from "../api.js";
import { announce, fill, h, icon, iconButton, kbd } from "../dom.js";
import { shown as difference } from "../diff.js";
import * as format from "../format.js";
import { cancel, follow } from "../jobs.js";
import { complain, told, toast } from "../toast.js";
import { confidence } from "./confidence.js";
import { exportMenu, sendMenu } from "./export.js";
import { sign } from "./sign.js";

const SAVE_MS = 2000;
const POLL_MS = 2000;
const TYPING_MS = 250;
const METHODS = { generate: "Written by the model", retrieve: "From the nearest report", template: "From the findings' probabilities" };
const STATUS = { accepted: "Accepted", edited: "Edited", added: "Added", rejected: "Rejected" };
const OPEN = "proposed";

export class Report {
  constructor(study, evidence, { session, signal, onsaved }) {
    Object.assign(this, { study, evidence, session, signal, onsaved });
    this.path = `/api/studies/${study.id}/report`;
    this.given = null; // as the server has it
    this.sentences = []; // the working copy
    this.undone = []; // copies to go back to
    this.selected = null; // key of a sentence
    this.editing = null; // key of a sentence
    this.threshold = null;
    this.keys = 0;
    this.timer = 0;
    this.saving = null;
    this.element = h("div", { class: "report" });
    signal.addEventListener("abort", () => clearTimeout(this.timer));
  }

  // --- loading -----------------------------------------------------------------------------

  async load() {
    const query = this.threshold === null ? "" : `?threshold=${this.threshold}`;
    const given = await get(this.path + query, { signal: this.signal });
    this.#take(given);
    this.#render();
    if (given.state === "drafting") await this.#takeUp();
  }

  #take(given, kept = []) {
    this.given = given;
    this.sentences = given.sentences.map((sentence, i) => ({ ...sentence, key: kept[i] ?? `s${++this.keys}` }));
    if (!this.sentences.some(({ key }) => key === this.selected)) this.selected = this.sentences[0]?.key ?? null;
  }

  /** A draft that was begun before this page was loaded. */
  async #takeUp() {
    const { jobs } = await get(`/api/jobs?study=${this.study.id}`, { signal: this.signal });
    const job = jobs.find(({ kind, state }) => kind === "report" && (state === "queued" || state === "running"));
    if (job) return this.#stream(job.id);
    return setTimeout(() => this.signal.aborted || this.load().catch(complain), POLL_MS);
  }

  async draft(method) {
    const { job } = await send("POST", this.path, { method }, { signal: this.signal });
    await this.#stream(job.id);
  }

  async #stream(job) {
    const text = h("p", { class: "words streaming" });
    const place = h("p", { class: "dim", role: "status" }, "Waiting for the model …");
    fill(this.element, h("div", { class: "draft-stream" },
      h("header", {}, h("span", { class: "badge drafting busy" }, "Drafting"), place,
        h("button", { type: "button", class: "quiet", onclick: told(() => cancel(job)) }, "Stop")),
      text));
    try {
      await follow(job, {
        signal: this.signal,
        onstate: ({ state, position }) => {
          text.replaceChildren();
          fill(place, state === "running" ? "The model is writing." : `In the queue${position ? `, place ${position}` : ""} …`);
        },
        ontoken: (piece) => text.append(piece),
      });
      announce("The draft is ready.");
    } catch (error) {
      if (error.name === "AbortError") return;
      complain(error);
    }
    await this.load();
    this.onsaved();
  }

  // --- changing ----------------------------------------------------------------------------

  get open() {
    return this.given?.state === "draft" && this.session.may("reports:edit");
  }

  at(key = this.selected) {
    return this.sentences.findIndex((sentence) => sentence.key === key);
  }

  #change(change) {
    if (!this.open) return;
    this.undone.push(this.sentences.map((sentence) => ({ ...sentence })));
    change();
    this.#later();
    this.#render({ focus: true });
  }

  #later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.save().catch(complain), SAVE_MS);
  }

  /** The working copy without a sentence that is just being begun. */
  get written() {
    return this.sentences.filter(({ text }) => text);
  }

  get unsaved() {
    const saved = this.given?.sentences ?? [];
    const same = ({ id, text, status }, i) => saved[i]?.id === id && saved[i].text === text && saved[i].status === status;
    return this.written.length !== saved.length || !this.written.every(same);
  }

  mark(status, key = this.selected) {
    const sentence = this.sentences[this.at(key)];
    if (!sentence) return;
    this.#change(() => {
      const same = sentence.status === status;
      sentence.status = same ? this.#untouched(sentence) : status === "accepted" ? this.#accepted(sentence) : status;
      if (!same) this.step(1, { wrap: false });
    });
  }

  /** What a sentence is where it is neither accepted nor rejected. */
  #untouched(sentence) {
    if (sentence.original === null || sentence.original === undefined) return "added";
    return sentence.text !== sentence.original ? "edited" : OPEN;
  }

  #accepted(sentence) {
    const untouched = this.#untouched(sentence);
    return untouched === OPEN ? "accepted" : untouched;
  }

  acceptRest() {
    this.#change(() => {
      for (const sentence of this.sentences) if (sentence.status === OPEN) sentence.status = "accepted";
    });
  }

  edit(key = this.selected) {
    if (!this.open || this.at(key) < 0) return;
    [this.selected, this.editing] = [key, key];
    this.#render({ focus: true });
  }

  add() {
    if (!this.open) return;
    const at = this.at();
    const key = `s${++this.keys}`;
    const section = this.sentences[at]?.section ?? "Findings";
    this.sentences.splice(at + 1, 0, { key, id: null, text: "", section, confidence: null, status: "added", original: null });
    this.edit(key);
  }

  #edited(key, text) {
    const at = this.at(key);
    const sentence = this.sentences[at];
    const words = text.replace(/\s+/g, " ").trim();
    this.editing = null;
    if (!words || words === sentence.text) {
      if (!sentence.text) this.sentences.splice(at, 1);
      this.selected = this.sentences[Math.max(0, Math.min(at, this.sentences.length - 1))]?.key ?? null;
      return this.#render({ focus: true });
    }
    const before = this.written.map((one) => ({ ...one }));
    sentence.text = words;
    sentence.status = this.#accepted(sentence);
    this.undone.push(before);
    this.#later();
    return this.#render({ focus: true });
  }

  undo() {
    const before = this.undone.pop();
    if (!before || !this.open) return;
    this.sentences = before;
    this.editing = null;
    if (this.at() < 0) this.selected = before[0]?.key ?? null;
    this.#later();
    this.#render({ focus: true });
    announce("Undone.");
  }

  step(by, { wrap = true } = {}) {
    const to = Math.min(Math.max(this.at() + by, 0), this.sentences.length - 1);
    if (this.sentences[to]) this.selected = this.sentences[to].key;
    if (wrap) this.#render({ focus: true });
  }

  // --- saving ------------------------------------------------------------------------------

  async save() {
    clearTimeout(this.timer);
    if (this.saving) await this.saving;
    if (!this.unsaved || this.given.state !== "draft") return;
    this.saving = this.#put(this.given.version);
    try {
      await this.saving;
    } finally {
      this.saving = null;
    }
  }

  async #put(base_version) {
    const sent = this.written.map(({ key, id, text, section, status }) => ({ key, id, text, section, status }));
    this.#state("Saving …");
    let given;
    try {
      given = await send("PUT", this.path, { base_version, sentences: sent.map(({ key, id, ...rest }) => (id ? { id, ...rest } : rest)) });
    } catch (error) {
      this.#state("Not saved");
      if (error.status === 409) return this.#conflict(error);
      if (error instanceof ApiError && error.status === 0) this.#later();
      throw error;
    }
    const { sentences: now, selected } = this;
    const asSent = new Map(sent.map((sentence) => [sentence.key, sentence]));
    this.#take(given, sent.map(({ key }) => key));
    const saved = new Map(this.sentences.map((sentence) => [sentence.key, sentence]));
    // what was changed while it was being saved stays changed
    this.sentences = now.map((sentence) => {
      const before = asSent.get(sentence.key);
      if (!before) return sentence;
      const kept = saved.get(sentence.key);
      const touched = before.text !== sentence.text || before.status !== sentence.status;
      return touched ? { ...kept, text: sentence.text, status: sentence.status } : kept;
    });
    this.selected = selected;
    if (this.unsaved) this.#later();
    this.#state("Saved");
    this.element.querySelector(".version")?.replaceChildren(`Version ${given.version}`);
    this.onsaved();
    return given;
  }

  async #conflict(error) {
    const latest = await get(this.path);
    const by = latest.versions?.find(({ version }) => version === latest.version)?.author;
    toast(`${error.message}${by ? ` (version ${latest.version}, by ${by})` : ""}`, {
      error: true,
      action: ["Load theirs", () => {
        this.undone = [];
        this.#take(latest);
        this.#render();
      }],
    });
  }

  #state(text) {
    const place = this.element.querySelector(".saved");
    if (place) place.textContent = text;
  }

  // --- showing -----------------------------------------------------------------------------

  #render({ focus = false } = {}) {
    const { given } = this;
    if (given.state === "drafting") {
      if (!this.element.hasChildNodes()) fill(this.element, h("div", { class: "empty", role: "status" }, h("span", { class: "badge drafting busy" }, "Drafting")));
      return;
    }
    if (given.state === "none") {
      fill(this.element, this.#none());
      return;
    }
    const top = this.element.querySelector(".sentences")?.scrollTop ?? 0;
    fill(this.element, this.#head(), this.#list(), this.#foot());
    const list = this.element.querySelector(".sentences");
    list.scrollTop = top;
    if (focus) this.focus();
    else this.#grow();
  }

  focus() {
    const row = this.element.querySelector(`[data-key="${this.selected}"]`);
    const target = row?.querySelector("textarea") ?? row?.querySelector(".sentence-text");
    target?.focus({ preventScroll: true });
    row?.scrollIntoView({ block: "nearest" });
    this.#grow();
  }

  #grow() {
    const area = this.element.querySelector(".sentences textarea");
    if (!area) return;
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  }

  #none() {
    const may = this.session.may("reports:draft");
    return h("div", { class: "empty" }, h("h2", {}, "No report yet"),
      h("p", {}, may ? "The model drafts it; you check every sentence and sign." : "Nobody has drafted one."),
      may && h("div", { class: "methods" }, Object.entries(METHODS).map(([method, text], i) =>
        h("button", { type: "button", class: i === 0 ? "primary" : "", onclick: told(() => this.draft(method)) }, i === 0 ? "Draft a report" : text))));
  }

  #head() {
    const { given } = this;
    const checked = this.sentences.filter(({ status }) => status !== OPEN).length;
    const final = given.state === "final";
    return h("header", { class: "report-head" },
      h("div", { class: "line" },
        h("span", { class: `badge ${given.state}` }, final ? "Signed" : "Draft"),
        h("span", { class: "version dim figures" }, `Version ${given.version}`),
        given.model && h("span", { class: "dim", title: `${METHODS[given.method]}. Weights ${given.weights}, preparation ${given.preparation}` }, `model ${given.model}`),
        h("span", { class: "saved dim", role: "status" })),
      final
        ? h("p", { class: "signature" }, icon("sign"), h("span", {}, "Signed by ", h("strong", {}, given.signature.name), `, ${format.moment(given.signature.signed)}`,
          !given.signature.authenticated && h("span", { class: "dim" }, " – the name was typed, not authenticated")))
        : h("div", { class: "line" },
          h("progress", { max: this.sentences.length || 1, value: checked, aria: { label: "Sentences checked" } }),
          h("span", { class: "dim figures" }, `${checked} of ${this.sentences.length} checked`)),
      given.calibrated ? !final && this.#threshold() : h("p", { class: "dim" }, "Confidence: not calibrated. Nobody knows how often this model's sentences are right."));
  }

  #threshold() {
    const value = this.threshold ?? 0;
    const figure = h("output", { class: "figures" }, value ? format.percent(value) : "off");
    let timer = 0;
    return h("label", { class: "slider wide" }, "“Cannot tell” below",
      h("input", { type: "range", min: "0", max: "95", step: "5", value: String(Math.round(100 * value)), name: "cannot-tell",
        oninput: (event) => {
          this.threshold = event.target.value / 100;
          figure.textContent = this.threshold ? format.percent(this.threshold) : "off";
          clearTimeout(timer);
          timer = setTimeout(told(() => this.#withhold()), TYPING_MS);
        } }), figure);
  }

  /** Which sentences are less sure than the reader wants: the server says. */
  async #withhold() {
    const given = await get(`${this.path}?threshold=${this.threshold}`, { signal: this.signal });
    const withheld = new Map(given.sentences.map((sentence) => [sentence.id, sentence.withheld]));
    for (const sentence of this.sentences) sentence.withheld = withheld.get(sentence.id) ?? false;
    const slider = document.activeElement?.name === "cannot-tell";
    this.#render();
    if (slider) this.element.querySelector('[name="cannot-tell"]').focus();
  }

  #list() {
    const list = h("ol", { class: "sentences", aria: { label: "Sentences of the report" } });
    let section = null;
    for (const sentence of this.sentences) {
      if (sentence.section !== section) {
        section = sentence.section;
        if (section) list.append(h("li", { class: "section" }, h("h3", {}, section)));
      }
      list.append(this.#row(sentence));
    }
    for (const addendum of this.given.addenda ?? []) list.append(h("li", { class: "addendum" }, h("h3", {}, `Addendum by ${addendum.author}, ${format.moment(addendum.created)}`), h("p", {}, addendum.text)));
    return list;
  }

  #row(sentence) {
    const { key, status, withheld } = sentence;
    const chosen = key === this.selected;
    const data = { key, status, selected: chosen, withheld: Boolean(withheld && status === OPEN) };
    if (key === this.editing) return h("li", { class: "sentence", data }, this.#editor(sentence));
    const explained = this.evidence.shows(...this.#target(sentence));
    const select = () => {
      if (this.selected === key) return;
      this.selected = key;
      this.#render({ focus: true });
    };
    return h("li", { class: "sentence", data, onclick: (event) => !event.target.closest("button") && select() },
      h("button", { type: "button", class: "sentence-text", tabindex: chosen ? "0" : "-1", aria: { pressed: explained }, title: "Show the evidence (Enter)", onfocus: select, onclick: () => this.explain(key), ondblclick: () => this.edit(key) },
        status === "edited" && chosen ? difference(sentence.original, sentence.text) : sentence.text),
      h("div", { class: "marks" },
        data.withheld && h("span", { class: "badge draft" }, "Cannot tell"),
        STATUS[status] && h("span", { class: `mark ${status}` }, STATUS[status]),
        status !== "added" && this.given.calibrated && confidence(sentence.confidence, true)),
      chosen && this.open && this.#actions(sentence));
  }

  #actions({ key, status }) {
    const act = (name, label, shortcut, run, on) => h("button", { type: "button", class: "act", aria: { pressed: on, keyshortcuts: shortcut }, onclick: run }, icon(name), label, kbd(shortcut));
    return h("div", { class: "actions", role: "group", aria: { label: "This sentence" } },
      act("accept", "Accept", "y", () => this.mark("accepted", key), status === "accepted"),
      act("reject", "Reject", "x", () => this.mark("rejected", key), status === "rejected"),
      act("edit", "Edit", "i", () => this.edit(key), false),
      act("add", "Add", "o", () => this.add(), false));
  }

  #editor({ key, text }) {
    const area = h("textarea", { rows: 2, maxlength: "2000", aria: { label: "Sentence" }, oninput: () => this.#grow(), onkeydown: (event) => {
      if (event.key === "Enter" && !event.isComposing) event.preventDefault(), this.#edited(key, area.value);
      else if (event.key === "Escape") event.stopPropagation(), this.#edited(key, text);
    } });
    area.value = text;
    return h("div", { class: "editor" }, area, h("div", { class: "actions" },
      h("button", { type: "button", class: "primary", onclick: () => this.#edited(key, area.value) }, "Keep"),
      h("button", { type: "button", class: "quiet", onclick: () => this.#edited(key, text) }, "Leave as it was", kbd("Esc"))));
  }

  #foot() {
    const { given, session } = this;
    if (given.state === "final") {
      const foot = h("footer", { class: "report-foot" },
        session.may("reports:sign") && h("button", { type: "button", class: "quiet", onclick: () => this.#addendum() }, icon("add"), "Addendum"),
        h("span", { class: "spring" }), session.may("reports:export") && exportMenu(this.study));
      if (session.may("reports:send")) sendMenu(this.study, { signal: this.signal }).then((menu) => menu && foot.append(menu), complain);
      return foot;
    }
    if (!this.open) return h("footer", { class: "report-foot" }, h("p", { class: "dim" }, "Your role reads drafts; a reviewer checks and signs them."));
    const left = this.sentences.some(({ status }) => status === OPEN);
    return h("footer", { class: "report-foot" },
      iconButton("undo", "Undo", () => this.undo(), { key: "z", disabled: this.undone.length === 0 }),
      h("button", { type: "button", class: "quiet", disabled: !left, onclick: () => this.acceptRest() }, "Accept the rest", kbd("Y")),
      h("span", { class: "spring" }),
      session.may("reports:sign") && h("button", { type: "button", class: "primary", onclick: told(() => this.sign()) }, icon("sign"), "Sign …"));
  }

  // --- acting ------------------------------------------------------------------------------

  #target(sentence) {
    return [sentence.id ? { sentence: sentence.id } : { text: sentence.text }, sentence.text];
  }

  async explain(key = this.selected) {
    const sentence = () => this.sentences[this.at(key)];
    if (!sentence()) return;
    if (sentence().status === "edited" || !sentence().id) await this.save().catch(complain);
    await this.evidence.show(...this.#target(sentence()));
  }

  /** The evidence changed: show which sentence it belongs to. */
  refresh() {
    if (!this.given || this.editing) return;
    for (const row of this.element.querySelectorAll(".sentence")) {
      const sentence = this.sentences[this.at(row.dataset.key)];
      if (sentence) row.querySelector(".sentence-text")?.setAttribute("aria-pressed", String(this.evidence.shows(...this.#target(sentence))));
    }
  }

  async sign() {
    if (!this.open || !this.session.may("reports:sign")) return;
    await this.save();
    await sign(this, { session: this.session, onsigned: async () => {
      this.undone = [];
      await this.load();
      this.onsaved();
    } });
  }

  #addendum() {
    const text = h("textarea", { rows: 4, required: true, maxlength: "5000" });
    const name = h("input", { required: true, autocomplete: "name", maxlength: "200" });
    const typed = this.session.mode === "open";
    const dialog = h("dialog", { class: "dialog", aria: { labelledby: "addendum-title" } });
    const form = h("form", { class: "content", id: "addendum", onsubmit: told(async (event) => {
      event.preventDefault();
      await send("POST", `${this.path}/addendum`, { text: text.value.trim(), ...(typed && { name: name.value.trim() }) });
      dialog.close();
      await this.load();
      toast("The addendum was added.");
    }) }, h("label", {}, "What is to be added", text), typed && h("label", {}, "Your name", name));
    dialog.append(h("header", {}, h("h2", { id: "addendum-title" }, "Addendum to the signed report")), form,
      h("footer", {}, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button", { class: "primary", form: "addendum" }, "Add and sign")));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }
}
