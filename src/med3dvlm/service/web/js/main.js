// The frame of the page: who is signed in, where we are, and the notice that never goes away.

import { connection, get, listen, send, useCsrf } from "./api.js";
import { announce, fill, h, icon, iconButton } from "./dom.js";
import { scope, showHelp } from "./keys.js";
import { menu } from "./menu.js";
import { passwordDialog } from "./password.js";
import * as theme from "./theme.js";
import { told, toast } from "./toast.js";
import { searchView } from "./views/search.js";
import { signInView } from "./views/signin.js";
import { studyView } from "./views/study.js";
import { worklistView } from "./views/worklist.js";

const PING_MS = 3000;

const app = document.getElementById("app");
const page = { session: null, leave: null, main: null };

function go(hash) {
  location.hash = hash;
}

async function start() {
  theme.apply();
  listen({ signedOut: () => page.session && signedOut(), connection: showConnection });
  try {
    const session = await get("/api/session");
    useCsrf(session.csrf);
    if (!session.user) return askToSignIn(session);
    session.may = (permission) => session.permissions.includes(permission);
    page.session = session;
    return signedIn();
  } catch (error) {
    return unreachable(error);
  }
}

function unreachable(error) {
  fill(app, h("main", { id: "main", class: "alone" }, h("h1", {}, "med3dvlm"), h("p", {}, error.message),
    h("button", { type: "button", class: "primary", onclick: start }, "Try again")));
  document.title = "med3dvlm";
}

function askToSignIn(session) {
  leave();
  page.session = null;
  document.title = "Sign in – med3dvlm";
  const main = h("main", { id: "main", class: "alone" });
  fill(app, main, notice(session.model_notice));
  signInView(main, session, start);
}

function signedOut() {
  toast("You were signed out. Sign in again to go on.", { error: true });
  start();
}

// --- the frame ----------------------------------------------------------------------------

function signedIn() {
  page.main = h("main", { id: "main", tabindex: "-1" });
  fill(app, bar(), page.main, notice(page.session.model_notice));
  scope("Everywhere", [
    { key: "?", label: "This help", run: showHelp },
    { key: "w", label: "Worklist", run: () => go("#/") },
    { key: "f", label: "Search the archive", run: () => go("#/search") },
    { key: "t", label: "Dark, light, as the system", run: switchTheme },
  ]);
  route();
}

function bar() {
  const { session } = page;
  return h("header", { class: "bar" },
    h("a", { class: "brand", href: "#/" }, h("img", { src: "icon.svg", alt: "", width: 20, height: 20 }), h("span", {}, "med3dvlm")),
    h("nav", { aria: { label: "Pages" } },
      h("a", { href: "#/", data: { page: "worklist" } }, "Worklist"),
      h("a", { href: "#/search", data: { page: "search" } }, "Search")),
    h("div", { class: "crumb", id: "crumb" }),
    h("span", { class: "lost", id: "connection", role: "status", hidden: true }, icon("warning"), "No connection – trying again"),
    iconButton("keyboard", "Keyboard shortcuts", showHelp, { key: "?" }),
    themeButton(),
    h("div", { class: "who" }, whoButton(session),
      session.mode !== "open" && h("button", { type: "button", class: "quiet", onclick: told(() => signOut()) }, "Sign out")));
}

/** Who is signed in; a menu where there is something to do about it. */
function whoButton(session) {
  const shown = [icon("user"), h("span", {}, session.display_name || session.user), session.mode !== "open" && h("span", { class: "role" }, session.role)];
  if (session.mode === "open") return shown;
  return menu(shown, [
    ...(session.own_password ? [["Change password …", () => passwordDialog(session)]] : []),
    ["Sign out everywhere", () => signOut({ everywhere: true })],
  ], { below: true, props: { class: "quiet" } });
}

function themeButton() {
  const button = iconButton("moon", "", switchTheme, { id: "theme" });
  queueMicrotask(nameThemeButton);
  return button;
}

function nameThemeButton() {
  const button = document.getElementById("theme");
  const name = `Theme: ${theme.label()}`;
  button.setAttribute("aria-label", name);
  button.title = `${name} (t)`;
  fill(button, icon({ dark: "moon", light: "sun", system: "system" }[theme.chosen()]));
}

function switchTheme() {
  announce(`Theme: ${theme.next()}`);
  nameThemeButton();
}

async function signOut({ everywhere = false } = {}) {
  await send("DELETE", `/api/session${everywhere ? "?everywhere=true" : ""}`);
  go("#/");
  await start();
}

function notice(text) {
  const { session } = page;
  return h("footer", { class: "notice" }, icon("warning"), h("p", {}, text),
    session?.mode === "open" && h("p", { class: "open-mode", title: session.notice }, "No accounts: this machine only."));
}

function showConnection(online) {
  const sign = document.getElementById("connection");
  if (sign) sign.hidden = online;
  if (!online) ping();
}

function ping() {
  setTimeout(async () => {
    const found = await fetch("/health/live", { cache: "no-store" }).then((answer) => answer.ok, () => false);
    if (found) connection(true);
    else ping();
  }, PING_MS);
}

window.addEventListener("offline", () => connection(false));

// --- where we are -------------------------------------------------------------------------

function leave() {
  page.leave?.();
  page.leave = null;
}

function route() {
  if (!page.session) return;
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const [, name, id] = path.split("/");
  const context = { session: page.session, go, crumb, rename };
  leave();
  page.main.className = name || "worklist";
  page.main.replaceChildren();
  crumb(null);
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.dataset.page === (name || "worklist")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "study" && id) page.leave = studyView(page.main, id, context);
  else if (name === "search") page.leave = searchView(page.main, new URLSearchParams(query), context);
  else page.leave = worklistView(page.main, new URLSearchParams(query), context);
}

function crumb(...children) {
  fill(document.getElementById("crumb"), ...children);
}

function rename(title) {
  document.title = `${title} – med3dvlm`;
  announce(title);
}

window.addEventListener("hashchange", route);
start();
