// Dark, light, or as the system has it. Dark unless chosen otherwise: images are read in the dark.

const KEY = "med3dvlm.theme";
const ORDER = ["dark", "light", "system"];
const LABELS = { dark: "Dark", light: "Light", system: "As the system" };
const prefersLight = matchMedia("(prefers-color-scheme: light)");

export function chosen() {
  const stored = localStorage.getItem(KEY);
  return ORDER.includes(stored) ? stored : "dark";
}

export function label() {
  return LABELS[chosen()];
}

export function apply() {
  const light = chosen() === "light" || (chosen() === "system" && prefersLight.matches);
  document.documentElement.dataset.theme = light ? "light" : "dark";
}

export function next() {
  localStorage.setItem(KEY, ORDER[(ORDER.indexOf(chosen()) + 1) % ORDER.length]);
  apply();
  return label();
}

prefersLight.addEventListener("change", apply);
