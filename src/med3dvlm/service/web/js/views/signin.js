// Name and password, or the hospital's own sign-in.

import { send } from "../api.js";
import { fill, h } from "../dom.js";

const REASONS = {
  refused: "The hospital's sign-in refused you.",
  expired: "The hospital's sign-in took too long. Try again.",
  unavailable: "The hospital's sign-in cannot be reached. Try again later.",
  "no-role": "You are known, but have no role here. Ask the administrator for one.",
};

export function signInView(main, session, done) {
  const reason = new URLSearchParams(location.search).get("sign_in");
  const problem = h("p", { class: "problem", role: "alert" }, REASONS[reason] ?? "");
  const name = h("input", { id: "name", name: "name", autocomplete: "username", required: true, autocapitalize: "none", spellcheck: false });
  const password = h("input", { id: "password", name: "password", type: "password", autocomplete: "current-password", required: true });
  const button = h("button", { class: "primary" }, "Sign in");

  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    fill(problem);
    try {
      await send("POST", "/api/session", { name: name.value, password: password.value });
      history.replaceState(null, "", location.pathname + location.hash);
      await done();
    } catch (error) {
      fill(problem, error.message);
      password.value = "";
      password.focus();
    } finally {
      button.disabled = false;
    }
  }

  fill(main, h("form", { class: "card sign-in", onsubmit: submit },
    h("img", { src: "icon.svg", alt: "", width: 40, height: 40 }),
    h("h1", {}, "Sign in to med3dvlm"),
    h("p", { class: "dim" }, "Read, ask, check and sign, on this hospital's own network."),
    h("label", { for: "name" }, "Name"), name,
    h("label", { for: "password" }, "Password"), password,
    problem, button,
    session.oidc && h("a", { class: "button", href: "/api/oidc/login" }, "Sign in with the hospital account")));
  name.focus();
}
