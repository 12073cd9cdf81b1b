// A button that opens a short list of things to do.

import { h } from "./dom.js";
import { complain } from "./toast.js";

/** items: [[text, run]]; `run` may be async, its failure is told. */
export function menu(content, items, { props = {}, below = false } = {}) {
  const list = h("ul", { hidden: true });
  const opener = h("button", { type: "button", aria: { haspopup: "true", expanded: false }, onclick: () => show(list.hidden), ...props }, content);
  const element = h("div", { class: below ? "menu below" : "menu" }, opener, list);

  function show(open) {
    list.hidden = !open;
    opener.setAttribute("aria-expanded", String(open));
    if (open) list.querySelector("button").focus();
  }

  async function choose(run) {
    show(false);
    opener.focus();
    opener.disabled = true;
    try {
      await run();
    } catch (error) {
      complain(error);
    } finally {
      opener.disabled = false;
    }
  }

  list.append(...items.map(([text, run]) => h("li", {}, h("button", { type: "button", onclick: () => choose(run) }, text))));
  element.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "Escape" && !list.hidden) show(false), opener.focus();
    else if (event.key === "ArrowDown" && at >= 0) buttons[(at + 1) % buttons.length].focus();
    else if (event.key === "ArrowUp" && at >= 0) buttons[(at + buttons.length - 1) % buttons.length].focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  element.addEventListener("focusout", (event) => element.contains(event.relatedTarget) || show(false));
  return element;
}
