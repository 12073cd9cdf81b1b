// Adding studies: files are dropped anywhere on the page or chosen, and each upload shows how far it is.

import * as api from "./api.js";
import { announce, h, icon, iconButton } from "./dom.js";
import * as format from "./format.js";
import { toast } from "./toast.js";

/** The buttons, the list of running uploads and the drop target of a page. */
export function uploads(page, { onadded }) {
  const leaving = new AbortController();
  const files = h("input", { type: "file", multiple: true, hidden: true, onchange: () => take(files) });
  const folder = h("input", { type: "file", webkitdirectory: true, hidden: true, onchange: () => take(folder) });
  const progress = h("ul", { class: "uploads", aria: { label: "Uploads" } });
  const target = h("div", { class: "drop-target", hidden: true }, icon("upload"), h("p", {}, "Drop to add the studies"));
  const buttons = h("div", { class: "adding" },
    h("button", { type: "button", onclick: () => folder.click() }, "Add a folder"),
    h("button", { type: "button", class: "primary", onclick: () => files.click() }, icon("upload"), "Add files"), files, folder);

  function take(input) {
    const chosen = [...input.files];
    input.value = "";
    group(chosen).forEach(add);
  }

  async function add({ name, files: parts }) {
    const stop = new AbortController();
    const size = parts.reduce((sum, file) => sum + file.size, 0);
    const bar = h("progress", { max: 1, value: 0, aria: { label: `Upload of ${name}` } });
    const figure = h("span", { class: "figures dim" }, format.bytes(size));
    const entry = h("li", {}, h("span", { class: "file" }, name), bar, figure, iconButton("close", `Stop the upload of ${name}`, () => stop.abort()));
    progress.append(entry);
    try {
      const study = await api.upload("/api/studies", parts, {
        signal: stop.signal,
        onprogress: (share) => {
          bar.value = share;
          figure.textContent = share < 1 ? `${format.percent(share)} of ${format.bytes(size)}` : "checking";
        },
      });
      entry.remove();
      announce(`Added: ${name}.`);
      onadded(study);
    } catch (error) {
      entry.remove();
      if (error.name !== "AbortError") toast(`${name}: ${error.message}`, { error: true });
    }
  }

  function listen() {
    let depth = 0; // of elements that the drag has entered
    const options = { signal: leaving.signal };
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    page.addEventListener("dragenter", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      depth += 1;
      target.hidden = false;
    }, options);
    page.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault(), options);
    page.addEventListener("dragleave", (event) => {
      if (!carriesFiles(event)) return;
      depth -= 1;
      target.hidden = depth > 0 ? target.hidden : true;
    }, options);
    page.addEventListener("drop", async (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      [depth, target.hidden] = [0, true];
      group(await dropped(event.dataTransfer)).forEach(add);
    }, options);
  }

  return { buttons, progress, target, listen, choose: () => files.click(), leave: () => leaving.abort() };
}

/** Volumes and archives are a study each; all other files of one folder are one series of slices. */
function group(files) {
  const groups = new Map();
  for (const file of files) {
    const path = file.path ?? file.webkitRelativePath ?? "";
    const whole = /\.(nii(\.gz)?|zip|nrrd|mha|npy)$/i.test(file.name);
    const name = whole ? file.name : path.split("/")[0] || (files.length === 1 ? file.name : `${files.length} files`);
    const key = whole ? `${path}/${file.name}` : name;
    if (!groups.has(key)) groups.set(key, { name, files: [] });
    groups.get(key).files.push(file);
  }
  return [...groups.values()];
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const files = [];
  for (const entry of entries) await walk(entry, files);
  return files;
}

async function walk(entry, files) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    file.path = entry.fullPath.replace(/^\//, "");
    files.push(file);
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (batch.length === 0) return;
    for (const child of batch) await walk(child, files);
  }
}
