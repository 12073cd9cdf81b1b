// Signing: the text once more as it will stand, a name, and a deliberate yes.

import { send } from "../api.js";
import { fill, h } from "../dom.js";
import * as format from "../format.js";
import { toast } from "../toast.js";

export async function sign(report, { session, onsigned }) {
  const { given, sentences, path } = report;
  const left = sentences.filter(({ status }) => status === "proposed").length;
  if (left) {
    toast(`${format.count(left, "sentence is", "sentences are")} not checked yet: accept, edit or reject each before you sign.`, { error: true, action: ["Accept the rest", () => report.acceptRest()] });
    return;
  }
  const typed = session.mode === "open";
  const name = h("input", { value: typed ? "" : session.display_name || session.user, readOnly: !typed, required: true, autocomplete: "name", maxlength: "200" });
  const read = h("input", { type: "checkbox", required: true });
  const problem = h("p", { class: "problem", role: "alert" });
  const button = h("button", { class: "primary", form: "signing" }, "Sign");
  const dialog = h("dialog", { class: "dialog", aria: { labelledby: "sign-title" } });

  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    fill(problem);
    try {
      await send("POST", `${path}/sign`, { version: given.version, ...(typed && { name: name.value.trim() }) });
      dialog.close();
      toast("The report is signed.");
      await onsigned();
    } catch (error) {
      fill(problem, error.message);
    } finally {
      button.disabled = false;
    }
  }

  dialog.append(
    h("header", {}, h("h2", { id: "sign-title" }, "Sign this report"), h("span", { class: "dim" }, `Version ${given.version}`)),
    h("form", { class: "content", id: "signing", onsubmit: submit },
      h("div", { class: "final-text", tabindex: "0", role: "group", aria: { label: "The text that will be signed" } }, ...paragraphs(sentences)),
      h("p", { class: "dim" }, tally(sentences)),
      h("label", {}, "Name", name),
      typed && h("p", { class: "dim" }, "No accounts are set up, so the signature will say that the name was typed and not authenticated."),
      h("label", { class: "check" }, read, "I have looked at the images and read every sentence."),
      problem),
    h("footer", {}, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), button));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  (typed ? name : read).focus();
}

/** The sections of the text as it will be signed. */
export function paragraphs(sentences) {
  const sections = new Map();
  for (const { section, text, status } of sentences) {
    if (status === "rejected") continue;
    sections.set(section, [...(sections.get(section) ?? []), text]);
  }
  return [...sections].map(([section, texts]) => [section && h("h3", {}, section), h("p", {}, texts.join(" "))]);
}

function tally(sentences) {
  const of = (status) => sentences.filter((sentence) => sentence.status === status).length;
  return [[of("accepted"), "accepted"], [of("edited"), "edited"], [of("added"), "added"], [of("rejected"), "rejected (left out)"]]
    .filter(([number]) => number).map(([number, name]) => `${number} ${name}`).join(", ");
}
