// A job's events (SSE), read with `fetch`: a lost connection resumes after the last event seen,
// and a refusal says why, neither of which `EventSource` can do.

import { ApiError, connection, get, request, send, stream } from "./api.js";

const ENDED = new Set(["done", "failed", "cancelled"]);
const WAITS_MS = [500, 1000, 2000, 4000, 8000];

/**
 * Follow a job to its end and return it.
 *
 * ontoken(text) for each piece of text; onstate(job) when it moves in the queue or starts;
 * onprogress(progress) as far as a fetch is.
 * Throws an `ApiError` where the job failed or was cancelled.
 */
export async function follow(id, { ontoken, onstate, onprogress, signal } = {}) {
  let last = null;
  for (let failures = 0; ; ) {
    let heard = false;
    try {
      for await (const event of events(id, last, signal)) {
        [failures, heard] = [0, true];
        last = event.id ?? last;
        if (event.name === "token") ontoken?.(event.data.text ?? event.data);
        else if (event.name === "state") onstate?.(event.data);
        else if (event.name === "progress") onprogress?.(event.data);
        else if (ENDED.has(event.name)) return await outcome(id, signal);
      }
      // nothing more to hear, and no last word: its events are no longer kept
      const job = heard ? null : await get(`/api/jobs/${id}`, { signal });
      if (job && ENDED.has(job.state)) return finished(job);
    } catch (error) {
      if (error.name === "AbortError" || final(error)) throw error;
    }
    await pause(WAITS_MS[Math.min(failures++, WAITS_MS.length - 1)], signal);
  }
}

export function cancel(id) {
  return send("DELETE", `/api/jobs/${id}`);
}

function final(error) {
  return error instanceof ApiError && error.status !== 0 && ![429, 502, 503, 504].includes(error.status);
}

async function outcome(id, signal) {
  return finished(await get(`/api/jobs/${id}`, { signal }));
}

function finished(job) {
  if (job.state === "done") return job;
  const error = new ApiError(job.state === "cancelled" ? "This was cancelled." : job.error || "The model could not do this.", 200);
  error.cancelled = job.state === "cancelled";
  throw error;
}

async function* events(id, last, signal) {
  const response = await request(`/api/jobs/${id}/events`, { signal, accept: "text/event-stream", lastEventId: last });
  const decoder = new TextDecoder();
  let text = "";
  try {
    for await (const part of stream(response)) {
      text += decoder.decode(part, { stream: true });
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof ApiError)) {
      connection(false);
      throw new ApiError("The connection was lost.");
    }
    throw error;
  }
}

function parse(block) {
  const event = { name: "message", id: null, data: "" };
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (field === "event") event.name = value;
    else if (field === "id") event.id = value;
    else if (field === "data") event.data += event.data ? `\n${value}` : value;
  }
  if (!event.data && event.name === "message") return null;
  try {
    event.data = JSON.parse(event.data);
  } catch {
    // a token may be plain text
  }
  return event;
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}
