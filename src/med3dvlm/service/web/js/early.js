// Runs before the first paint, so that the page never flashes in the other theme.
(() => {
  const stored = localStorage.getItem("med3dvlm.theme") ?? "dark";
  const light = stored === "light" || (stored === "system" && matchMedia("(prefers-color-scheme: light)").matches);
  document.documentElement.dataset.theme = light ? "light" : "dark";
})();
