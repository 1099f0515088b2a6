// The page: which conversation is shown, what is being written or read, and the list of sessions.

import { brokenOff, download, events, failure, Failure, get, hasKey, request, setKey } from "./api.js";
import * as texts from "./texts.js";
import { age, button, bytes, count, el, fileWords, line, percent, title, turnView } from "./view.js";

const PAGE = 50; // sessions that are asked for at once
const MOST_LEARNED = 20; // turns of other browsers that are fetched at once
const MOST_ANNOUNCED = 600; // characters of an answer that are read out without being asked for
const ID = /^#([a-z]+[-_][0-9a-f]+)$/;

const $ = (id) => document.getElementById(id);
const box = $("box");
const log = $("log");

const turns = new Map(texts.turns().map((turn) => [turn.id, turn])); // with their words
let sessions = new Map(); // as the server lists them, the newest first
let model = "";
let head = null; // id of the turn that is gone on from; null: a new conversation
let work = null; // what is being written or read: {turn, view, abort, sent}, with its turn's parent
let left = null; // the last work that broke off
let showing = 0; // counts calls of `show`: only the last one may draw

// --- what is known of turns ---------------------------------------------------------------------

/** Whether an id is of a turn. Conversations and places in prompts point at turns, and are none. */
const isTurn = (id) => typeof id === "string" && !/^(conv_|mark-)/.test(id);

/** Whether an id is of a copy: it stands beside the turn that it was made of, with the same words. */
const isCopy = (id) => id.startsWith("sess_") && Boolean(sessions.get(id)?.parent);

function parentOf(id) {
  if (turns.has(id)) return turns.get(id).parent;
  const parent = sessions.get(id)?.parent;
  if (!isTurn(parent)) return null;
  return isCopy(id) ? parentOf(parent) : parent;
}

/** Ids that went on from a turn, the oldest first. */
function childrenOf(id) {
  const ids = new Set([...turns.keys(), ...sessions.keys()]);
  return [...ids].filter((one) => isTurn(one) && parentOf(one) === id).sort((a, b) => createdOf(a) - createdOf(b));
}

const createdOf = (id) => turns.get(id)?.created ?? sessions.get(id)?.created_at ?? 0;

/** The newest end of what went on from a turn. */
function endOf(id) {
  for (;;) {
    const children = childrenOf(id);
    if (!children.length) return id;
    id = children.at(-1);
  }
}

function remember(turn) {
  turns.set(turn.id, turn);
  texts.saveTurn(turn);
}

/** What an item says: a message, a call of a tool, or what came of one. */
function words(item) {
  if (item.type === "function_call") return `${item.name}(${item.arguments})`;
  const said = item.content ?? item.output;
  return typeof said === "string" ? said : said.map((part) => part.text).join("");
}

const sessionOf = async (id) => sessions.get(id) ?? get(`v1/sessions/${encodeURIComponent(id)}`);

/** A turn that this browser has not seen, as the server tells it. */
async function learn(id) {
  if (turns.has(id)) return turns.get(id);
  const path = encodeURIComponent(id);
  const turn = { id, parent: parentOf(id), created: createdOf(id), status: "completed" };
  if (id.startsWith("resp_")) {
    const [response, items] = await Promise.all([
      get(`v1/responses/${path}`),
      get(`v1/responses/${path}/input_items?order=asc&limit=100`),
    ]);
    let parent = response.previous_response_id;
    if (response.conversation) ({ parent } = await sessionOf(id));
    Object.assign(turn, {
      parent: isTurn(parent) ? parent : null,
      created: response.created_at,
      tokens: response.usage?.total_tokens,
      ask: items.data.map(words).join("\n\n"),
      answer: response.output.map(words).join("\n\n"),
      status: response.status,
    });
    remember(turn);
  } else if (id.startsWith("file-")) {
    const file = await get(`v1/files/${path}`);
    const { parent } = await sessionOf(id);
    const about = { name: file.filename ?? "A file", bytes: file.bytes };
    Object.assign(turn, { parent, created: file.created_at, tokens: file.tokens, file: about });
    remember(turn);
  } else {
    const session = await sessionOf(id);
    if (id.startsWith("sess_") && session.parent) return learnCopy(id, session);
    const words = "Said by another program: its words are not kept here, but you can go on from it.";
    Object.assign(turn, { parent: session.parent, ask: null, answer: null });
    turn.title = session.title ? `${session.title} (${words})` : words;
  }
  return turn;
}

/** A copy, which says what the turn says that it was made of, as long as that can be learned. */
async function learnCopy(id, { parent, created_at, title }) {
  let copied = { parent: null, ask: null, answer: null, created: 0 };
  copied.title = title ?? "A copy of a turn that is kept no longer.";
  try {
    copied = await learn(parent);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  const created = Math.max(created_at, copied.created); // the server counts whole seconds
  const turn = { ...copied, id, created };
  if (copied.id) remember(turn);
  return turn;
}

// --- the conversation ---------------------------------------------------------------------------

/** Show the conversation that ends with a turn. */
async function show(id) {
  const mine = ++showing;
  head = id;
  trouble(null);
  box.value = texts.draft(id);
  const { path, lost } = await pathTo(id, MOST_LEARNED);
  if (mine !== showing) return;
  draw(path, lost);
  showNumbers();
  showList();
}

/** Turns from the beginning to one; `lost`: why those before the first are not there, or null. */
async function pathTo(id, most) {
  const path = [];
  for (let learned = 0; id !== null; id = path[0].parent) {
    if (!turns.has(id) && ++learned > most) return { path, lost: more };
    try {
      path.unshift(await learn(id));
    } catch (error) {
      if (error.status === 401) askForKey();
      return { path, lost: error };
    }
  }
  return { path, lost: null };
}

const more = new Failure("Earlier turns are not loaded.");

function draw(path, lost) {
  log.replaceChildren();
  if (lost === more) {
    log.append(button("Show earlier turns", async () => {
      const longer = await pathTo(head, Infinity);
      draw(longer.path, longer.lost);
    }));
  } else if (lost) {
    log.append(el("p", { className: "note" }, path.length ? `Earlier turns: ${lost.message}` : lost.message));
  }
  for (const turn of path) log.append(turnView(turn, model, toolsOf(turn)).article);
  const children = head === null ? [] : childrenOf(head);
  if (children.length) log.append(branches(children));
  if (!path.length && !lost && !mineIsHere(work)) log.append(welcome());
  for (const one of [left, work]) if (mineIsHere(one)) log.append(one.view.article);
  showPlace(children.length);
  log.scrollTop = log.scrollHeight;
}

const stillAtWork = () => new Failure("Something is being written or read: wait for it or stop it, then try again.");

/** Whether something that is not finished belongs below what is shown. */
const mineIsHere = (one) => one !== null && one.turn.parent === head;

const welcome = () =>
  el(
    "div",
    { className: "welcome" },
    el("p", {}, el("strong", {}, "Say something, or drop in a text file of any length.")),
    el("p", {}, "What is said and read goes into a memory of constant size, so a conversation never " +
      "runs out of room. Every turn is kept: you can go on from each of them as often as you like."),
  );

function toolsOf(turn) {
  const goOn = button("Branch from here", () => { open(turn.id); box.focus(); });
  const again = () => {
    if (work) return trouble(stillAtWork());
    open(turn.parent);
    say(turn.ask);
  };
  const edit = () => {
    const typed = texts.draft(turn.parent);
    texts.saveDraft(turn.parent, typed ? `${turn.ask}\n\n${typed}` : turn.ask);
    open(turn.parent);
    box.focus();
  };
  const notes = [];
  if (turn.status === "incomplete") {
    notes.push(el("p", { className: "note" }, "The answer was as long as the options allow, and ends here."));
  }
  const ofAnswer = turn.id === head ? [] : [goOn];
  if (turn.answer) ofAnswer.push(button("Answer again", again));
  ofAnswer.push(...switcher(turn));
  return { ofAsk: turn.ask ? [button("Ask otherwise", edit)] : [], ofAnswer, notes };
}

/** Steps to the branches beside a turn's, if there are any. */
function switcher(turn) {
  const beside = turn.parent === null ? [] : childrenOf(turn.parent);
  if (beside.length < 2) return [];
  const place = beside.indexOf(turn.id);
  const step = (text, label, to) =>
    button(text, () => open(endOf(beside[to])), { ariaLabel: label, disabled: beside[to] === undefined });
  return [
    el(
      "span",
      { className: "switcher" },
      step("‹", "The branch before", place - 1),
      `Branch ${place + 1} of ${beside.length}`,
      step("›", "The next branch", place + 1),
    ),
  ];
}

/** Where a turn was gone on from already. */
function branches(children) {
  const link = (id) => {
    const text = turns.has(id) ? title(turns.get(id)) : (sessions.get(id)?.title ?? "Another turn");
    return el("li", {}, el("a", { href: `#${endOf(id)}` }, text));
  };
  return el(
    "section",
    { className: "branches" },
    el("h2", {}, children.length > 1 ? "Branches from here" : "From here it went on"),
    el("ul", {}, ...children.map(link)),
  );
}

function showPlace(isInside) {
  $("place").hidden = !isInside;
  $("place").textContent = isInside ? "What you say next begins another branch; the others stay." : "";
}

/** Make a turn the one that is gone on from; null: begin anew. */
function open(id) {
  if (id === head) return;
  history.pushState(null, "", id === null ? "#" : `#${id}`);
  show(id);
}

function here() {
  return ID.exec(location.hash)?.[1] ?? null;
}

// --- saying and reading -------------------------------------------------------------------------

/** Begin with something that goes on from a turn. */
function begin(turn, sent) {
  left = null;
  work = { turn, sent, view: turnView(turn, model), abort: new AbortController() };
  trouble(null);
  showWork();
  log.querySelector(".welcome")?.remove();
  if (mineIsHere(work)) log.append(work.view.article);
  log.scrollTop = log.scrollHeight;
  return work;
}

/** It is finished, and kept under its id. */
function done(turn) {
  const { parent } = turn;
  const isHere = head === parent;
  work = null;
  remember(turn);
  texts.saveDraft(parent, isHere ? "" : texts.draft(parent).replace(turn.ask ?? "", "").trim());
  if (isHere) {
    texts.saveDraft(turn.id, box.value);
    open(turn.id);
  }
  showWork();
  refresh();
}

/** It broke off: what was typed goes back into the box, and what was written already stays to be seen. */
function broke(error) {
  const { turn, view, sent } = work;
  const isStopped = error.name === "AbortError";
  left = turn.file || view.answer.textContent ? work : null;
  if (!left) view.article.remove();
  if (!log.children.length) log.append(welcome());
  turn.status = "broken";
  view.article.classList.add("broken");
  for (const one of view.article.querySelectorAll("progress")) one.remove();
  for (const one of view.article.querySelectorAll("[aria-busy]")) one.ariaBusy = null;
  const words = isStopped ? "Stopped. This is not part of the conversation." : "Broken off.";
  view.bar.replaceChildren(el("p", { className: "note" }, words));
  if (head === turn.parent) {
    if (sent) box.value = box.value ? `${sent}\n\n${box.value}` : sent;
    texts.saveDraft(head, box.value);
  }
  work = null;
  showWork();
  if (isStopped) announce(words);
  else trouble(error);
  log.scrollTop = log.scrollHeight;
}

async function say(text) {
  if (work) return;
  const { temperature, most, instructions } = texts.options();
  const created = Date.now() / 1000;
  const turn = { id: null, parent: head, created, ask: text, answer: "", status: "working" };
  const mine = begin(turn, text);
  announce("Answering");
  const json = {
    model,
    input: text,
    stream: true,
    temperature,
    max_output_tokens: most,
    previous_response_id: head,
    instructions: head === null && instructions ? instructions : null,
  };
  try {
    const signal = mine.abort.signal;
    const answer = await request("v1/responses", { method: "POST", json, signal });
    const words = mine.view.answer.appendChild(document.createTextNode(""));
    for await (const event of events(answer)) {
      if (event.type === "response.output_text.delta") {
        atBottom(() => words.appendData(event.delta));
      } else if (event.type === "response.failed") {
        throw failure(event.response.error, 0, 0);
      } else if (event.type === "response.completed" || event.type === "response.incomplete") {
        const { id, status, usage } = event.response;
        Object.assign(turn, { id, status, tokens: usage.total_tokens, answer: words.data });
      }
    }
    if (turn.id === null) throw brokenOff();
    done(turn);
    announce(`Answer: ${turn.answer.slice(0, MOST_ANNOUNCED)}`);
  } catch (error) {
    broke(error);
  }
}

/** Take files: sessions are opened, and texts read, each behind the one before it. */
async function takeAll(files) {
  if (work) {
    trouble(stillAtWork());
    return;
  }
  const isSession = (file) => file.name.endsWith(".safetensors");
  for (const file of files.filter(isSession)) if (!(await bring(file))) return;
  let parent = head;
  for (const file of files.filter((one) => !isSession(one))) {
    parent = await readOne(file, parent);
    if (parent === null) return;
  }
}

/** Read a file; the id of its turn, or null if it broke off. */
async function readOne(file, parent) {
  const about = { name: file.name, bytes: file.size };
  const created = Date.now() / 1000;
  const turn = { id: null, parent, created, file: about, status: "working", tokens: 0 };
  const mine = begin(turn, "");
  announce(`Reading ${file.name}`);
  const form = new FormData();
  if (parent !== null) form.set("session", parent);
  form.set("stream", "true");
  form.set("file", file);
  const pace = paceOf();
  try {
    const answer = await request("v1/files", { method: "POST", form, signal: mine.abort.signal });
    for await (const event of events(answer)) {
      if (event.type === "file.progress") {
        const share = event.bytes_read / event.bytes;
        const quarter = Math.floor(4 * share);
        if (quarter > Math.floor(4 * (about.share ?? 0))) announce(`${percent(share)} of ${file.name} read`);
        Object.assign(about, { read: event.tokens, share });
        turn.rate = pace(event.tokens);
        mine.view.about.textContent = fileWords(turn);
        mine.view.progress.value = share;
        if (mineIsHere(mine)) $("tokens").textContent = count(event.tokens, "token");
      } else if (event.type === "file.processed") {
        const { id, tokens } = event.file;
        Object.assign(turn, { id, tokens, status: "completed" });
      }
    }
    if (turn.id === null) throw brokenOff();
    delete about.read;
    delete about.share;
    done(turn);
    announce(`${file.name} was read`);
    return turn.id;
  } catch (error) {
    broke(error);
    return null;
  }
}

/** Tells, of a count that grows, by how many a second it did since the first. */
function paceOf() {
  let first = null;
  return (tokens) => {
    const now = performance.now();
    first ??= { tokens, now };
    const seconds = (now - first.now) / 1000;
    return seconds < 1 ? 0 : Math.round((tokens - first.tokens) / seconds);
  };
}

/** Change the conversation; who looks at its end goes on doing so. */
function atBottom(change) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (follows) log.scrollTop = log.scrollHeight;
}

// --- the list -----------------------------------------------------------------------------------

let hasMore = false;

/** Ask for the list of sessions again, or for older ones, too. */
async function refresh(older = false) {
  try {
    const after = older ? [...sessions.keys()].at(-1) : null;
    const limit = older ? PAGE : Math.min(100, Math.max(PAGE, sessions.size));
    const rest = after ? `&after=${encodeURIComponent(after)}` : "";
    const page = await get(`v1/sessions?order=desc&limit=${limit}${rest}`);
    const listed = page.data.map((session) => [session.id, session]);
    sessions = new Map(older ? [...sessions, ...listed] : listed);
    hasMore = page.has_more;
  } catch (error) {
    if (error.status === 401) askForKey();
    else trouble(error);
  }
  showList();
  showNumbers();
}

/** Ends of conversations, the newest first. */
function showList() {
  const shown = [...sessions.keys()].filter(isTurn);
  const parents = new Set(shown.map(parentOf));
  const ends = shown.filter((id) => !parents.has(id)).map((id) => sessions.get(id));
  fill($("sessions"), ends.map(row));
  $("older").hidden = !hasMore;
  const taken = [...sessions.values()].reduce((sum, session) => sum + session.bytes, 0);
  const kept = `${count(shown.length, "turn")}${hasMore ? " and more" : ""} kept, ${bytes(taken)} in use`;
  $("total").textContent = sessions.size ? kept : "Nothing is kept yet.";
}

/** Change rows of a list; what was open stays open, and the focus where it was. */
function fill(list, items) {
  const opened = list.querySelector("details[open]")?.closest("li").dataset.id;
  for (const item of items) item.querySelector("details").open = item.dataset.id === opened;
  const isSame = items.length === list.children.length && items.every((item, i) => item.isEqualNode(list.children[i]));
  if (isSame) return; // somebody may be about to click
  const focused = document.activeElement.closest("#sessions li");
  const controls = (item) => [...item.querySelectorAll("a, summary, button")];
  const place = focused ? controls(focused).indexOf(document.activeElement) : -1;
  list.replaceChildren(...items);
  if (!focused) return;
  const same = items.find((item) => item.dataset.id === focused.dataset.id);
  (same ? controls(same)[place] : $("new")).focus();
}

function row(session) {
  let first = session.id;
  const seen = new Set();
  for (let up = parentOf(first); up && !seen.has(up); up = parentOf(up)) {
    seen.add(up);
    first = up;
  }
  const name = nameOf(first) ?? nameOf(session.id) ?? "Conversation";
  const last = first === session.id ? null : nameOf(session.id);
  const link = el(
    "a",
    { href: `#${session.id}` },
    el("strong", {}, name),
    last ? el("span", {}, last) : null,
    el("span", { className: "note" }, `${count(session.tokens ?? 0, "token")} · ${bytes(session.bytes)} · `, age(session.created_at)),
  );
  if (session.id === head) link.ariaCurrent = "page";
  const item = el("li", {}, link, tools(session.id, name, last ?? name));
  item.dataset.id = session.id;
  return item;
}

/** What can be done with a session of the list, behind a button that shows it. */
function tools(id, name, called) {
  const tool = (text, does, title) => button(text, does, { ariaLabel: `${text}: ${called}`, title });
  return el(
    "details",
    { name: "tools" },
    el("summary", { ariaLabel: `More: ${called}`, title: "More" }, "⋯"),
    el(
      "div",
      { className: "tools" },
      tool("Copy", () => copy(id, called), "A branch that stays when this one is deleted"),
      tool("Download", () => takeHome(id, called), "Its memory as a file, without what was said"),
      tool("Delete", () => drop(id, name), "Delete it and the turns that only it has"),
    ),
  );
}

function nameOf(id) {
  if (turns.has(id)) return title(turns.get(id));
  const told = sessions.get(id)?.title;
  return told ? line(told) : null;
}

/** Keep a session under another id, too, and go on from that one. */
async function copy(id, called) {
  try {
    const made = await get(`v1/sessions/${encodeURIComponent(id)}/fork`, { method: "POST" });
    sessions = new Map([[made.id, made], ...sessions]);
    open(made.id);
    hideSidebar();
    announce(`A copy of ${called} is open`);
  } catch (error) {
    trouble(error);
  }
  refresh();
}

/** Save a session's file. */
async function takeHome(id, called) {
  announce(`Saving ${called}`);
  try {
    await download(`v1/sessions/${encodeURIComponent(id)}/content`);
    announce(`${called} is saved`);
  } catch (error) {
    trouble(error);
  }
}

/** Open a session file; whether it could be. */
async function bring(file) {
  const form = new FormData();
  form.set("file", file);
  $("bring").disabled = true;
  announce(`Opening ${file.name}`);
  try {
    const made = await get("v1/sessions", { method: "POST", form });
    sessions = new Map([[made.id, made], ...sessions]);
    trouble(null);
    open(made.id);
    hideSidebar();
    announce(`${file.name} is open`);
    return true;
  } catch (error) {
    trouble(error);
    return false;
  } finally {
    $("bring").disabled = false;
    refresh();
  }
}

/** Delete a branch: its last turn, and those before it that no other branch has. */
async function drop(end, name) {
  const ids = [end];
  for (;;) {
    const up = parentOf(ids.at(-1));
    if (up === null || !sessions.has(up) || childrenOf(up).length > 1) break;
    ids.push(up);
  }
  if (!confirm(`Delete “${name}”? ${count(ids.length, "turn")} of it can then not be gone on from.`)) return;
  try {
    for (const id of ids) {
      await request(`v1/sessions/${encodeURIComponent(id)}`, { method: "DELETE" }).catch((error) => {
        if (error.status !== 404) throw error; // it is gone already
      });
      turns.delete(id);
      texts.forgetTurn(id);
    }
    if (ids.includes(head)) open(parentOf(ids.at(-1)));
  } catch (error) {
    trouble(error);
  }
  refresh();
}

// --- numbers, errors, keys, options -------------------------------------------------------------

/** How much was read into the conversation that is shown, and what its memory takes. */
async function showNumbers() {
  const id = head;
  let about = { tokens: turns.get(id)?.tokens ?? 0, bytes: null };
  if (id !== null) {
    try {
      about = await sessionOf(id);
    } catch (error) {
      if (error.status === 404) about.bytes = 0;
    }
  }
  if (id !== head) return;
  $("tokens").textContent = count(about.tokens ?? 0, "token");
  const words = { null: "unknown", 0: "none" }[about.bytes] ?? bytes(about.bytes);
  $("bytes").textContent = id === null ? "none yet" : words;
}

/** A button to stop while something is done, to send otherwise; the focus goes from one to the other. */
function showWork() {
  const [shown, gone] = work ? [$("stop"), $("send")] : [$("send"), $("stop")];
  const hadFocus = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (hadFocus) shown.focus();
  $("choose").disabled = work !== null;
}

/** Say an error; null: none. */
function trouble(error) {
  $("trouble").replaceChildren();
  if (!error) return;
  if (error.status === 401) askForKey();
  const words = error instanceof Failure ? error.message : `The page failed: ${error.message}`;
  $("trouble").append(el("p", {}, words), button("✕", () => trouble(null), { ariaLabel: "Hide this" }));
}

/** Tell those who do not see the page. */
function announce(text) {
  $("said").textContent = text;
}

function askForKey() {
  if ($("ask-key").open) return;
  $("key-why").textContent = hasKey()
    ? "The server does not know this key. Is another one meant?"
    : "This server asks for a key. It is kept in this tab until you close it.";
  $("ask-key").showModal();
}

function showOptions() {
  const { temperature, most, instructions } = texts.options();
  $("temperature").value = temperature;
  $("temperature-shown").textContent = Number(temperature).toFixed(1);
  $("most").value = most;
  $("instructions").value = instructions;
  $("forget-key").hidden = !hasKey();
}

function keepOptions() {
  const most = $("most").checkValidity() ? Number($("most").value) : texts.options().most;
  texts.saveOptions({ temperature: Number($("temperature").value), most, instructions: $("instructions").value });
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(1);
}

// --- what the user does -------------------------------------------------------------------------

const isTouch = matchMedia("(pointer: coarse)").matches; // Enter is a new line on such keyboards

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value;
  if (!text.trim() || work) return;
  box.value = ""; // its draft stays in the storage until it is answered
  say(text);
});

box.addEventListener("input", () => {
  const typed = [mineIsHere(work) ? work.sent : "", box.value];
  texts.saveDraft(head, typed.filter(Boolean).join("\n\n"));
});

box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
  event.preventDefault();
  if (!work) $("form").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !work || document.querySelector(":popover-open, dialog[open]")) return;
  work.abort.abort();
});

$("stop").addEventListener("click", () => work?.abort.abort());
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  takeAll([...$("file").files]);
  $("file").value = "";
});
$("bring").addEventListener("click", () => $("session-file").click());
$("session-file").addEventListener("change", () => {
  const [file] = $("session-file").files;
  if (file) bring(file);
  $("session-file").value = "";
});

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!hasFiles(event)) return;
  event.preventDefault();
  takeAll([...event.dataTransfer.files]);
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the conversation
  box.focus();
});
$("new").addEventListener("click", (event) => {
  event.preventDefault();
  open(null);
  box.focus();
});
function hideSidebar() {
  if ($("sidebar").matches(":popover-open")) $("sidebar").hidePopover(); // on narrow screens
}
$("sidebar").addEventListener("click", (event) => {
  if (event.target.closest("a")) hideSidebar();
});
$("older").addEventListener("click", () => refresh(true));
addEventListener("popstate", () => { if (here() !== head) show(here()); });
addEventListener("online", () => trouble(null));
document.addEventListener("visibilitychange", () => { if (!document.hidden && !work) refresh(); });

$("options").addEventListener("beforetoggle", showOptions);
$("options").addEventListener("input", keepOptions);
$("forget").addEventListener("click", () => {
  if (!confirm("Forget all that was said in this browser? The server's sessions stay.")) return;
  texts.forgetAll();
  location.reload();
});
$("forget-key").addEventListener("click", () => {
  texts.forgetAll();
  setKey("");
  location.assign("./");
});
$("key-form").addEventListener("submit", () => {
  setKey($("key").value);
  $("key").value = "";
  start();
});

let starts = 0;
async function start() {
  const mine = ++starts;
  trouble(null);
  try {
    const models = await get("v1/models");
    if (mine !== starts) return; // another key came meanwhile; what is being written is not to be lost
    model = models.data[0].id;
    $("model").textContent = model;
    document.title = `${model} · cometlm`;
  } catch (error) {
    if (mine !== starts) return;
    trouble(error);
  }
  await show(here());
  refresh();
}

showWork();
start();
