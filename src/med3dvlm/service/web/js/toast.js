// Short messages in the corner. Errors stay until they are closed.

import { h, iconButton } from "./dom.js";

const SHOWN_MS = 5000;

/** toast("Saved.") or toast("Signed.", { action: ["Export", run] }) or toast(sentence, { error: true }) */
export function toast(text, { error = false, action } = {}) {
  const area = document.getElementById("toasts");
  const close = () => element.remove();
  const element = h("div", { class: error ? "toast error" : "toast", role: error ? "alert" : "status" },
    h("p", {}, text),
    action && h("button", { type: "button", class: "quiet", onclick: () => (close(), action[1]()) }, action[0]),
    iconButton("close", "Close this message", close));
  for (const other of area.children) if (other.firstChild.textContent === text) other.remove();
  area.append(element);
  while (area.children.length > 4) area.firstChild.remove();
  if (!error) setTimeout(close, action ? 2 * SHOWN_MS : SHOWN_MS);
  return close;
}

/** An error as a sentence; what was stopped on purpose says nothing. */
export function complain(error) {
  if (error.name === "AbortError" || error.cancelled) return;
  if (!error.status && error.name !== "ApiError") console.error(error);
  toast(error.message || "Something went wrong in the page. Load it again.", { error: true });
}

/** Wrap an async handler so that its failure is told. */
export function told(run) {
  return async (...args) => {
    try {
      return await run(...args);
    } catch (error) {
      return complain(error);
    }
  };
}
