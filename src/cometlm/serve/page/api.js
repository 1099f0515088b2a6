// Requests to the server, streams of events, and what went wrong in plain words.

let key = sessionStorage.getItem("cometlm:key") ?? "";

/** Whether an API key is sent. */
export const hasKey = () => key !== "";

/** Send this API key from now on; it is kept until the tab is closed. */
export function setKey(given) {
  key = given.trim();
  if (key) sessionStorage.setItem("cometlm:key", key);
  else sessionStorage.removeItem("cometlm:key");
}

/** What went wrong, in words for whoever looks at the page. */
export class Failure extends Error {
  constructor(words, { status = 0, code = "", retryAfter = 0 } = {}) {
    super(words);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** A request; the answer if it is a good one. A `Failure` otherwise, an AbortError if it was stopped. */
export async function request(path, { method = "GET", json, form, signal } = {}) {
  const headers = {};
  const sent = key;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (json) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: json ? JSON.stringify(json) : form });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  // Refused for a key that is no longer the one: nobody has to be asked for it again.
  if (answer.status === 401 && key !== sent) return request(path, { method, json, form, signal });
  throw failure(told.error ?? {}, answer.status, Number(answer.headers.get("Retry-After")) || 0);
}

/** The JSON that a request is answered with. */
export async function get(path, options) {
  return (await request(path, options)).json();
}

/** Let the browser save what is at a path, under the name that the server gives it. */
export async function download(path) {
  const answer = await request(path);
  const file = await answer.blob().catch(() => {
    throw new Failure("The connection to the server broke off, so nothing was saved.", { code: "offline" });
  });
  const name = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition"))?.[1] ?? "session.safetensors";
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading it
}

/** The events of a stream. A `Failure` if one of them tells of an error, or the stream breaks off. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : brokenOff();
    });
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data: "));
      if (!lines.length) continue;
      const event = JSON.parse(lines.map((line) => line.slice(6)).join("\n"));
      if (event.error && !event.type) throw failure(event.error, 0, 0);
      yield event;
    }
  }
}

/** The stream ended before its work was done. */
export const brokenOff = () =>
  new Failure("The connection to the server broke off, so this was not kept.", { code: "offline" });

const unreachable = () =>
  new Failure("The server cannot be reached. Is it running, and are you online?", { code: "offline" });

/** An error of the server's in plain words. */
export function failure({ message = "", code = "" }, status, retryAfter) {
  return new Failure(inWords(message, code, status, retryAfter), { status, code, retryAfter });
}

function inWords(message, code, status, retryAfter) {
  const soon = retryAfter ? ` Try again in ${retryAfter} second${retryAfter > 1 ? "s" : ""}.` : "";
  if (status === 401) return "The server does not know this API key.";
  if (code === "busy" || status === 429) return `The server is busy: all its places are taken.${soon}`;
  if (code === "stopping") return "The server is shutting down.";
  if (code === "store") return `The server cannot write to its folder now, so nothing was kept.${soon}`;
  if (code === "dropped") {
    return (
      "The server keeps this turn no longer: it was deleted, has expired, or made room for others. " +
      "Go on from another turn, or begin a new conversation."
    );
  }
  if (code === "not_found") {
    return "The server does not have this conversation. Begin a new one; what you typed is still here.";
  }
  if (status === 503) return `The server cannot do this now.${soon}`;
  return message || `The server answered with an error (${status}).`;
}
