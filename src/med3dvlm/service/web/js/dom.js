// Elements are built here and nowhere from markup: whatever comes from outside becomes text.

const SVG = "http://www.w3.org/2000/svg";

/**
 * h("button", { class: "primary", onclick: save, aria: { label: "Save" } }, "Save")
 * Children that are null or false are left out; strings and numbers become text nodes.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) set(element, name, value);
  return append(element, children);
}

function set(element, name, value) {
  if (value === null || value === undefined) return;
  if (name === "class") element.className = value;
  else if (name === "aria") for (const [key, v] of Object.entries(value)) element.setAttribute(`aria-${key}`, String(v));
  else if (name === "data") Object.assign(element.dataset, value);
  else if (name === "vars") for (const [key, v] of Object.entries(value)) element.style.setProperty(`--${key}`, v);
  else if (name === "value") element.value = value;
  else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
  else if (name in element && typeof value !== "string") element[name] = value;
  else element.setAttribute(name, value);
}

export function append(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    parent.append(child instanceof Node ? child : String(child));
  }
  return parent;
}

export function fill(parent, ...children) {
  parent.replaceChildren();
  return append(parent, children);
}

/** Said by screen readers, seen by nobody. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

// 16 × 16, stroked
const ICONS = {
  accept: "M3 8.500l3.5 3.500L13 4.5",
  reject: "M4 4l8 8M12 4l-8 8",
  edit: "M3 13l.7-3L10.5 3.200a1.2 1.2 0 0 1 1.7 0l.6.6a1.2 1.2 0 0 1 0 1.700L6 12.300z",
  add: "M8 3v10M3 8h10",
  undo: "M6 4L3 7l3 3M3 7h6.500a3 3 0 0 1 0 6H7",
  target: "M8 1.500v3M8 11.500v3M1.5 8h3M11.5 8h3M8 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8z",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10zM10.7 10.700L14 14",
  upload: "M8 10.500V3M5 5.500L8 2.500l3 3M3 10.500V13h10v-2.5",
  send: "M2.5 8l11-5-4 11-2.5-4.500z",
  download: "M8 2.500V10M5 7l3 3 3-3M3 10.500V13h10v-2.5",
  sign: "M2.5 13.500h11M4 10.500l1-3 5-5 2 2-5 5z",
  close: "M4 4l8 8M12 4l-8 8",
  back: "M9.5 3.500L5 8l4.5 4.5",
  more: "M3 4.500h10M3 8h10M3 11.500h6",
  sun: "M8 10.800a2.8 2.8 0 1 0 0-5.6 2.8 2.8 0 0 0 0 5.600zM8 1.500V3M8 13v1.500M1.5 8H3M13 8h1.500M3.4 3.400l1 1M11.6 11.600l1 1M12.6 3.400l-1 1M4.4 11.600l-1 1",
  moon: "M13 9.300A5.5 5.5 0 0 1 6.7 3 5.5 5.5 0 1 0 13 9.300z",
  system: "M2.5 3.500h11v7.500h-11zM6 13.500h4",
  keyboard: "M1.5 4.500h13v7h-13zM4 7h.01M6.5 7h.01M9 7h.01M12 7h.01M4.5 9.500h7",
  planes: "M2.5 2.500h6.500v11H2.500zM9 2.500h4.500V8H9zM9 8h4.500v5.500H9z",
  quad: "M2.5 2.500h11v11h-11zM8 2.500v11M2.5 8h11",
  cube: "M8 1.800l5.5 3v6.400L8 14.200l-5.5-3V4.800zM2.5 4.800L8 8l5.5-3.200M8 8v6.2",
  crosshair: "M8 2v4.500M8 9.500V14M2 8h4.500M9.5 8H14",
  reset: "M3 8a5 5 0 1 0 1.5-3.600M3 3v2.500h2.5",
  flame: "M8 14c2.5 0 4-1.6 4-3.8 0-2.7-2.3-3.7-2.6-7.200C7 4.3 6.5 6 6.7 7.3 5.9 7 5.5 6.3 5.4 5.6 4.5 6.7 4 8.2 4 10.2 4 12.4 5.5 14 8 14z",
  user: "M8 8a2.7 2.7 0 1 0 0-5.400A2.7 2.7 0 0 0 8 8zM3 13.500c.5-2.7 2.4-4 5-4s4.5 1.3 5 4",
  list: "M5.5 4h8M5.5 8h8M5.5 12h8M2.5 4h.01M2.5 8h.01M2.5 12h.01",
  warning: "M8 2.500l6 10.500H2zM8 6.500v3M8 11.300v.01",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true", focusable: "false" }))
    svg.setAttribute(key, value);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; its name is read out, and shown as a tooltip with its key. */
export function iconButton(name, label, onclick, { key, ...props } = {}) {
  const title = key ? `${label} (${key})` : label;
  return h("button", { type: "button", class: "icon-button", title, aria: { label, ...(key && { keyshortcuts: key }) }, onclick, ...props }, icon(name));
}

export function kbd(...keys) {
  return keys.map((key) => h("kbd", {}, key));
}
