// The versions of the report, and what changed between any two of them.

import { get } from "../api.js";
import { sentences as differences, shown } from "../diff.js";
import { fill, h } from "../dom.js";
import * as format from "../format.js";
import { complain } from "../toast.js";

const KINDS = { model: "Draft by the model", person: "Edited" };
const CHANGES = { edited: "Edited", added: "Added", rejected: "Rejected", removed: "Removed" };

export class History {
  constructor(study, { signal }) {
    Object.assign(this, { study, signal });
    this.versions = [];
    this.between = [null, null];
    this.element = h("div", { class: "history" });
  }

  async load() {
    const path = `/api/studies/${this.study.id}/report`;
    const report = await get(path, { signal: this.signal });
    this.versions = report.versions;
    if (this.versions.length === 0) {
      fill(this.element, h("div", { class: "empty" }, h("h2", {}, "No versions yet"), h("p", {}, "Every saved change of the report is kept here.")));
      return;
    }
    const numbers = this.versions.map(({ version }) => version);
    const draft = [...this.versions].reverse().find(({ kind }) => kind === "model")?.version ?? Math.min(...numbers);
    this.between = [draft, Math.max(...numbers)];
    await this.#show();
  }

  async #show() {
    const path = `/api/studies/${this.study.id}/report/versions`;
    const [before, after] = await Promise.all(this.between.map((version) => get(`${path}/${version}`, { signal: this.signal })));
    const found = differences(before.sentences, after.sentences);
    const changed = found.filter(({ kind }) => kind !== "same").length;
    fill(this.element,
      h("div", { class: "between" }, this.#choice(0, "From"), this.#choice(1, "to"),
        h("span", { class: "dim" }, changed ? `${format.count(changed, "sentence")} changed` : "No change")),
      h("ol", { class: "changes", tabindex: "0", aria: { label: "Changes, sentence by sentence" } }, found.map((change) => h("li", { data: { kind: change.kind } },
        CHANGES[change.kind] && h("span", { class: `mark ${change.kind}` }, CHANGES[change.kind]),
        h("p", {}, this.#difference(change))))));
  }

  #difference({ kind, before, after }) {
    if (kind === "edited") return shown(before, after);
    if (kind === "added") return h("ins", {}, after);
    if (kind === "rejected") return h("del", {}, after);
    if (kind === "removed") return h("del", {}, before);
    return after;
  }

  #choice(side, label) {
    const select = h("select", { onchange: () => {
      this.between[side] = Number(select.value);
      this.#show().catch(complain);
    } }, this.versions.map(({ version, kind, state, author, created }) =>
      h("option", { value: String(version), selected: version === this.between[side] },
        `${version} · ${state === "final" ? "Signed" : KINDS[kind] ?? kind} · ${author} · ${format.moment(created)}`)));
    return h("label", {}, label, select);
  }
}
