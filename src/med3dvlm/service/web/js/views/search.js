// The archive, by words or by a study: the nearest first.

import { get } from "../api.js";
import { fill, h, icon, kbd } from "../dom.js";
import * as format from "../format.js";
import { scope } from "../keys.js";
import { complain } from "../toast.js";
import { thumbnail } from "./worklist.js";

const TOP = 24;

export function searchView(main, query, { go, crumb, rename }) {
  const leaving = new AbortController();
  const { signal } = leaving;
  const like = query.get("study");
  const input = h("input", { type: "search", name: "text", value: query.get("text") ?? "", placeholder: "left pleural effusion without pneumothorax", aria: { label: "Describe what the scan should show" } });
  const where = h("input", { name: "where", value: query.get("where") ?? "", placeholder: "modality=CT", aria: { label: "Only where" } });
  const status = h("p", { class: "dim", role: "status" });
  const results = h("ol", { class: "hits" });

  function submit(event) {
    event.preventDefault();
    const asked = new URLSearchParams();
    if (input.value.trim()) asked.set("text", input.value.trim());
    if (where.value.trim()) asked.set("where", where.value.trim());
    const hash = `#/search?${asked}`;
    if (location.hash === hash) find();
    else go(hash);
  }

  fill(main,
    h("form", { class: "search-form", role: "search", onsubmit: submit },
      h("h1", {}, "Search"),
      h("label", { class: "field wide" }, icon("search"), input, kbd("/")),
      h("label", { class: "field" }, h("span", {}, "Where"), where),
      h("button", { class: "primary" }, "Find")),
    status, results);

  async function find() {
    if (!input.value.trim() && !like) {
      fill(status);
      fill(results, h("li", { class: "empty" }, h("h2", {}, "Find studies by what they show"), h("p", {}, "Describe a finding in words, or open a study and choose “More like this study”.")));
      return;
    }
    fill(status, "Searching …");
    const asked = new URLSearchParams({ top: String(TOP) });
    if (input.value.trim()) asked.set("text", input.value.trim());
    else asked.set("study", like);
    for (const filter of where.value.split(",")) if (filter.trim()) asked.append("where", filter.trim());
    try {
      const { hits } = await get(`/api/search?${asked}`, { signal });
      const named = like && !input.value.trim() ? "like this study" : `for “${input.value.trim()}”`;
      fill(status, hits.length ? `${format.count(hits.length, "study", "studies")} ${named}, nearest first` : `Nothing found ${named}.`);
      results.replaceChildren(...hits.map(card));
    } catch (error) {
      if (error.name === "AbortError") return;
      fill(status);
      fill(results, h("li", { class: "empty" }, h("h2", {}, "The search did not work"), h("p", {}, error.message)));
    }
  }

  function card(hit) {
    const { study } = hit;
    return h("li", { class: "hit card" },
      thumbnail(study),
      h("div", { class: "hit-text" },
        h("a", { class: "name", href: `#/study/${study.id}` }, format.patient(study)),
        h("p", { class: "dim" }, [format.title(study), format.date(study.study_date)].filter(Boolean).join(" · ")),
        h("p", { class: hit.first_line ? "first-line" : "first-line dim" }, hit.first_line || "No signed report.")),
      h("div", { class: "hit-foot" },
        h("span", { class: "score figures", title: "Cosine similarity" }, `similarity ${hit.score.toFixed(2).replace("-", "−")}`),
        h("a", { href: `#/search?study=${study.id}`, aria: { label: `More like ${format.patient(study)}` } }, "More like this")));
  }

  function move(step) {
    const links = [...results.querySelectorAll("a.name")];
    const at = links.indexOf(document.activeElement);
    links[Math.min(Math.max(at + step, 0), links.length - 1)]?.focus();
  }

  const free = scope("Search", [
    { key: "/", label: "The search words", run: () => input.focus() },
    { key: ["j", "ArrowDown"], label: "Next study", run: () => move(1) },
    { key: ["k", "ArrowUp"], label: "Previous study", run: () => move(-1) },
  ]);

  rename("Search");
  if (like) get(`/api/studies/${like}`, { signal }).then((study) => crumb(h("span", {}, "Like "), h("strong", {}, format.patient(study)), h("span", {}, format.title(study)))).catch(complain);
  else input.focus();
  find();
  return () => {
    leaving.abort();
    free();
  };
}
