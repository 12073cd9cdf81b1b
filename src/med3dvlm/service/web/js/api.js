// Every request to the service. A failure is an `ApiError` whose message is one plain sentence.

export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const session = { csrf: "" };
const state = { online: true };
const listeners = { signedOut: () => {}, connection: () => {} };

/** What to do when the session ends, and when the server is lost or found again. */
export function listen(handlers) {
  Object.assign(listeners, handlers);
}

export function useCsrf(token) {
  session.csrf = token ?? "";
}

export function connection(online) {
  if (state.online === online) return;
  state.online = online;
  listeners.connection(online);
}

const SENTENCES = {
  0: "The server cannot be reached. Check the network; the page tries again by itself.",
  401: "You are signed out. Sign in again.",
  403: "Your role does not allow this.",
  404: "This no longer exists on the server.",
  409: "Someone changed this meanwhile. Load it again.",
  413: "This is larger than the server takes.",
  429: "Too much at once. Wait a moment and try again.",
  503: "The server is busy. Wait a moment and try again.",
};

/** The server's own sentence where it gives one, else ours. */
export function sentence(status, body) {
  const detail = body?.detail;
  if (typeof detail === "string" && detail) return detail;
  if (Array.isArray(detail) && detail[0]?.msg) return `${detail[0].msg} (${(detail[0].loc ?? []).slice(1).join(".")}).`;
  return SENTENCES[status] ?? `The server could not do this (status ${status}).`;
}

export function headers(method) {
  const result = { Accept: "application/json" };
  if (method !== "GET" && session.csrf) result["X-CSRF-Token"] = session.csrf;
  return result;
}

/** The raw response, once it is one of success. */
export async function request(path, { method = "GET", body, signal, accept, lastEventId } = {}) {
  const sent = headers(method);
  if (lastEventId) sent["Last-Event-ID"] = lastEventId;
  if (accept) sent.Accept = accept;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers: sent, signal, credentials: "same-origin", body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connection(false);
    throw new ApiError(SENTENCES[0]);
  }
  connection(true);
  if (response.ok) return response;
  throw await refusal(response);
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) listeners.signedOut();
  return new ApiError(sentence(response.status, body), response.status, Number(response.headers.get("Retry-After")) || 0);
}

export async function get(path, options) {
  return (await request(path, options)).json();
}

export async function send(method, path, body, options) {
  const response = await request(path, { ...options, method, body });
  return response.status === 204 ? null : response.json();
}

/** The bytes of a file; `onprogress(share)` where its size is known. */
export async function bytes(path, { signal, onprogress } = {}) {
  const response = await request(path, { signal, accept: "*/*" });
  const total = Number(response.headers.get("Content-Length"));
  const parts = [];
  let received = 0;
  for await (const part of stream(response)) {
    parts.push(part);
    received += part.length;
    if (total) onprogress?.(Math.min(1, received / total));
  }
  return new Blob(parts).arrayBuffer();
}

/** `fetch` cannot tell how far an upload is; XMLHttpRequest can. */
export function upload(path, files, { onprogress, signal } = {}) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    for (const file of files) form.append("files", file, file.webkitRelativePath || file.name);
    const call = new XMLHttpRequest();
    call.open("POST", path);
    for (const [name, value] of Object.entries(headers("POST"))) call.setRequestHeader(name, value);
    call.responseType = "json";
    call.upload.onprogress = (event) => event.lengthComputable && onprogress?.(event.loaded / event.total);
    call.onload = () => {
      connection(true);
      if (call.status < 300) return resolve(call.response);
      if (call.status === 401) listeners.signedOut();
      return reject(new ApiError(sentence(call.status, call.response), call.status, Number(call.getResponseHeader("Retry-After")) || 0));
    };
    call.onerror = () => {
      connection(false);
      reject(new ApiError(SENTENCES[0]));
    };
    call.onabort = () => reject(new DOMException("The upload was stopped.", "AbortError"));
    signal?.addEventListener("abort", () => call.abort());
    call.send(form);
  });
}

export async function* stream(response) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Save what a path gives under the name that the server gives it. */
export async function download(path, fallback) {
  const response = await request(path, { accept: "*/*" });
  const disposition = response.headers.get("Content-Disposition") ?? "";
  const name = /filename="?([^";]+)"?/.exec(disposition)?.[1] ?? fallback;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  return name;
}
