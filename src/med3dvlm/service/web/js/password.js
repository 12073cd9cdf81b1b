// One's own password, changed in a dialog; the other sessions of the account end.

import { ApiError, send, useCsrf } from "./api.js";
import { fill, h } from "./dom.js";
import { toast } from "./toast.js";

export function passwordDialog(session) {
  const field = (label, autocomplete) => h("input", { type: "password", required: true, autocomplete, maxlength: "128", aria: { label } });
  const old = field("Current password", "current-password");
  const fresh = field("New password", "new-password");
  const again = field("New password, once more", "new-password");
  const problem = h("p", { class: "problem", role: "alert" });
  const button = h("button", { class: "primary", form: "password" }, "Change");
  const dialog = h("dialog", { class: "dialog", aria: { labelledby: "password-title" } });

  async function submit(event) {
    event.preventDefault();
    fill(problem);
    button.disabled = true;
    try {
      if (fresh.value !== again.value) throw new ApiError("The two new passwords are not the same.");
      useCsrf((await send("PUT", "/api/session/password", { old: old.value, new: fresh.value })).csrf);
      dialog.close();
      toast("Your password is changed. You are signed out everywhere else.");
    } catch (error) {
      fill(problem, error.message);
    } finally {
      button.disabled = false;
    }
  }

  dialog.append(
    h("header", {}, h("h2", { id: "password-title" }, "Change your password")),
    h("form", { class: "content", id: "password", onsubmit: submit },
      h("input", { type: "text", name: "name", autocomplete: "username", value: session.user, hidden: true, readOnly: true }),
      h("label", {}, "Current password", old),
      h("label", {}, "New password", fresh),
      h("label", {}, "New password, once more", again),
      h("p", { class: "dim" }, "A few unrelated words are best. Every other session of yours ends."),
      problem),
    h("footer", {}, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), button));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  old.focus();
}
