// Shortcuts: what is registered here works, and is what the help overlay lists.

import { h, kbd } from "./dom.js";

const KEY = "med3dvlm.single-keys";
const scopes = new Map();
const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", PageUp: "Page ↑", PageDown: "Page ↓", Escape: "Esc", " ": "Space" };

/**
 * Set the shortcuts of a part of the page: [{ key, label, run, hidden }], where `key` may be a list.
 * Returns the function that takes them away.
 */
export function scope(name, shortcuts) {
  const entry = shortcuts.map((shortcut) => ({ ...shortcut, keys: [shortcut.key].flat() }));
  scopes.set(name, entry);
  return () => scopes.get(name) === entry && scopes.delete(name);
}

/** Single keys can be turned off for those who dictate or use switches (WCAG 2.1.4). */
export function singleKeys(on) {
  if (on !== undefined) localStorage.setItem(KEY, on ? "on" : "off");
  return localStorage.getItem(KEY) !== "off";
}

function pressed(event) {
  const ctrl = event.ctrlKey || event.metaKey ? "Ctrl+" : "";
  const shift = event.shiftKey && event.key.length > 1 ? "Shift+" : "";
  return ctrl + shift + event.key;
}

function typing(target) {
  return target.isContentEditable || /^(TEXTAREA|SELECT)$/.test(target.tagName) || (target.tagName === "INPUT" && !/^(checkbox|radio|button|range)$/.test(target.type));
}

/** Keys that a focused control needs for itself. */
function taken(target, key) {
  if (/^(BUTTON|A|SUMMARY)$/.test(target.tagName)) return key === "Enter" || key === " ";
  if (target.type === "range") return key.startsWith("Arrow") || key.startsWith("Page");
  return target.role === "tab" && key.startsWith("Arrow");
}

// while the event goes down, so that the image canvas does not take keys for itself
document.addEventListener("keydown", handle, { capture: true });

function handle(event) {
  if (event.defaultPrevented || event.altKey || event.isComposing) return;
  const key = pressed(event);
  const single = !key.startsWith("Ctrl+");
  if (document.querySelector("dialog[open]")) return;
  if (single && (typing(event.target) || taken(event.target, event.key))) return;
  if (single && key.length === 1 && !singleKeys()) return;
  for (const shortcuts of [...scopes.values()].reverse()) {
    const shortcut = shortcuts.find(({ keys }) => keys.includes(key));
    if (!shortcut) continue;
    event.preventDefault();
    shortcut.run(event);
    return;
  }
}

function shown(key) {
  return key.split(/(?<=.)\+(?=.)/).map((part) => NAMES[part] ?? (part.length === 1 ? part : part));
}

export function showHelp() {
  const dialog = h("dialog", { class: "dialog help", aria: { labelledby: "help-title" } });
  const close = () => dialog.close();
  const groups = [...scopes].map(([name, shortcuts]) =>
    h("section", {}, h("h3", {}, name), h("dl", { class: "keys" },
      shortcuts.filter(({ hidden }) => !hidden).map(({ keys, label }) =>
        h("div", {}, h("dt", {}, keys.map((key, i) => [i > 0 && " or ", kbd(...shown(key))])), h("dd", {}, label)),
      ))),
  );
  dialog.append(
    h("header", {}, h("h2", { id: "help-title" }, "Keyboard shortcuts"), h("button", { type: "button", class: "quiet", onclick: close }, "Close")),
    h("div", { class: "help-groups", tabindex: "0", role: "group", aria: { label: "List of shortcuts" } }, groups),
    h("label", { class: "check" },
      h("input", { type: "checkbox", checked: singleKeys(), onchange: (event) => singleKeys(event.target.checked) }),
      "Single-key shortcuts"),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
