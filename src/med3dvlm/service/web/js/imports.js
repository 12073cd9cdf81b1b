// Studies on their way from the PACS: what is being fetched, how far it is, what could not be.

import { ApiError, get, send } from "./api.js";
import { announce, h, iconButton } from "./dom.js";
import * as format from "./format.js";
import { cancel, follow } from "./jobs.js";
import { complain, told, toast } from "./toast.js";

const BUSY_MS = 1500;
const IDLE_MS = 15000;
const READY_MS = 500;
const ACTIVE = new Set(["queued", "running"]);
const dismissed = new Set(); // failures that need not be shown again

/** Put a series into the queue; the job that fetches it. */
export async function ask(wanted) {
  return (await send("POST", "/api/pacs/import", wanted)).job;
}

/** The study, once it is here and can be opened. */
export async function arrived(job, { onprogress, signal } = {}) {
  const { result } = await follow(job.id, { onprogress, signal });
  for (;;) {
    const study = await get(`/api/studies/${result.study}`, { signal });
    if (study.state === "ready") return study;
    if (study.state === "refused") throw new ApiError(study.reason, 200);
    await new Promise((resolve) => setTimeout(resolve, READY_MS));
  }
}

/** A bar and a figure; `show(progress)` as the job has it, or nothing while it waits. */
export function meter(name) {
  const bar = h("progress", { max: 1, aria: { label: `Fetching ${name}` } });
  const figure = h("span", { class: "figures dim" }, "Waiting");
  const show = (progress) => {
    if (!progress?.bytes && progress?.of === undefined) return; // nothing is known yet
    const { received, of, bytes } = progress;
    if (of) [bar.max, bar.value] = [of, Math.min(received, of)];
    figure.textContent = [of ? `${received} of ${format.count(of, "image")}` : format.count(received, "image"), bytes && format.bytes(bytes)].filter(Boolean).join(" · ");
  };
  return { bar, figure, show };
}

/** The list over the worklist: one's own fetches and those of others. */
export function importsList({ session, signal, onarrived, go }) {
  const list = h("ul", { class: "uploads", aria: { label: "From the PACS" } });
  const entries = new Map();
  let timer = 0;

  async function refresh() {
    clearTimeout(timer);
    let busy = false;
    try {
      const { jobs } = await get("/api/pacs/imports", { signal });
      busy = jobs.some(({ state }) => ACTIVE.has(state));
      show(jobs.filter((job) => ACTIVE.has(job.state) || (job.created_by === session.user && !dismissed.has(job.id))));
    } catch (error) {
      if (error.status !== 0) complain(error);
    }
    if (!signal.aborted) timer = setTimeout(refresh, busy ? BUSY_MS : IDLE_MS);
  }

  function show(jobs) {
    const gone = [...entries].filter(([id]) => !jobs.some((job) => job.id === id));
    for (const job of jobs) {
      if (entries.get(job.id)?.state !== job.state) entries.set(job.id, entry(job, entries.get(job.id)));
      entries.get(job.id).show(job.progress);
    }
    for (const [id, { element }] of gone) {
      entries.delete(id);
      element.remove();
    }
    const elements = jobs.map(({ id }) => entries.get(id).element);
    if (list.children.length !== elements.length || elements.some((one, at) => list.children[at] !== one)) list.replaceChildren(...elements);
    if (gone.length) onarrived();
    for (const [id, { mine, name }] of gone) if (mine) tell(id, name).catch(complain);
  }

  async function tell(id, name) {
    const study = await arrived({ id }, { signal });
    onarrived();
    toast(`${name} is here.`, { action: ["Open", () => go(`#/study/${study.id}`)] });
  }

  function entry(job, before) {
    const mine = job.created_by === session.user;
    const made = ACTIVE.has(job.state) ? running(job, mine) : failed(job);
    before?.element.remove();
    return Object.assign(made, { mine, state: job.state });
  }

  function running(job, mine) {
    const title = h("span", { class: "file" }, "From the PACS");
    const { bar, figure, show } = meter("from the PACS");
    const stop = mine ? iconButton("close", "Stop fetching", told(async () => {
      await cancel(job.id);
      figure.textContent = "Stopping";
    })) : h("span", { class: "dim" }, job.created_by);
    const made = { element: h("li", {}, title, bar, figure, stop), name: "The study" };
    made.show = (progress) => {
      [made.name, title.textContent] = [who(progress), about(progress)];
      show(progress);
    };
    return made;
  }

  function failed(job) {
    const dismiss = () => {
      dismissed.add(job.id);
      element.remove();
    };
    const again = told(async () => {
      const { study_uid, series_uid } = job.progress;
      await ask({ study_uid, series_uid });
      dismiss();
      await refresh();
    });
    const name = about(job.progress);
    const element = h("li", { class: "failed" }, h("span", { class: "file" }, name), h("span", { class: "problem" }, job.error),
      h("button", { type: "button", class: "quiet", onclick: again }, "Try again"),
      iconButton("close", `Dismiss: ${name}`, dismiss));
    announce(`${name} could not be fetched. ${job.error}`);
    return { element, name, show: () => {} };
  }

  return { list, refresh, leave: () => clearTimeout(timer) };
}

function about(progress) {
  return [who(progress), progress.description].filter(Boolean).join(" · ");
}

/** Before the PACS has said it, there is only the study's UID. */
function who(progress) {
  return progress.patient_name || progress.patient_id ? format.patient(progress) : `Study ${progress.study_uid}`;
}

