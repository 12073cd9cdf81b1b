// Tabs, as the ARIA practices have them: arrows move, the panel follows.

import { h, kbd } from "./dom.js";

/** entries: [{ name, label, key, content, onshow }] → { element, choose(name, { focus }), chosen } */
export function tabs(entries, { label }) {
  const buttons = entries.map((entry) => h("button", {
    type: "button", role: "tab", id: `tab-${entry.name}`, aria: { controls: `panel-${entry.name}`, keyshortcuts: entry.key },
    onclick: () => choose(entry.name), onkeydown: move,
  }, entry.label, kbd(entry.key)));
  const panels = entries.map((entry) => h("div", { role: "tabpanel", id: `panel-${entry.name}`, class: "tab-panel", aria: { labelledby: `tab-${entry.name}` } }, entry.content));
  const result = { element: [h("div", { role: "tablist", class: "tabs", aria: { label } }, buttons), panels], choose, chosen: null };

  function choose(name, { focus = false } = {}) {
    if (result.chosen !== name) {
      result.chosen = name;
      entries.forEach((entry, i) => {
        const chosen = entry.name === name;
        buttons[i].setAttribute("aria-selected", String(chosen));
        buttons[i].tabIndex = chosen ? 0 : -1;
        panels[i].hidden = !chosen;
        if (chosen) entry.onshow?.();
      });
    }
    if (focus) buttons[entries.findIndex((entry) => entry.name === name)].focus();
  }

  function move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = entries.findIndex(({ name }) => name === result.chosen);
    choose(entries[(at + step + entries.length) % entries.length].name, { focus: true });
  }

  choose(entries[0].name);
  return result;
}
