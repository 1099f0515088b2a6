// What this browser remembers: turns by their ids, drafts by the turn that they go on from, options.

const TURN = "cometlm:turn:";
const DRAFT = "cometlm:draft:";
const OPTIONS = "cometlm:options";
const LONGEST = 1_000_000; // characters; browsers give a page some five million

const keys = (begin) => Object.keys(localStorage).filter((name) => name.startsWith(begin));

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // not ours, or damaged
  }
}

/** Store a value; when the browser has no room, the oldest turns go. */
function write(name, value) {
  const text = JSON.stringify(value);
  localStorage.removeItem(name);
  if (text.length > LONGEST) return; // it would push out everything else
  for (;;) {
    try {
      localStorage.setItem(name, text);
      return;
    } catch {
      const old = oldestTurn(name);
      if (!old) return; // no storage at all: the page works without
      localStorage.removeItem(old);
    }
  }
}

function oldestTurn(but) {
  const created = (name) => read(name)?.created ?? 0;
  return keys(TURN)
    .filter((name) => name !== but)
    .sort((a, b) => created(a) - created(b))[0];
}

/** All turns that are remembered: `{id, parent, created, tokens, ask, answer, status}`, or `file`. */
export const turns = () => keys(TURN).map(read).filter((turn) => turn?.id);
export const saveTurn = (turn) => write(TURN + turn.id, turn);
export const forgetTurn = (id) => localStorage.removeItem(TURN + id);

/** What was typed behind a turn (null: of a new conversation) and not answered yet. */
export const draft = (id) => read(DRAFT + id) ?? "";

export function saveDraft(id, text) {
  if (text) write(DRAFT + id, text);
  else localStorage.removeItem(DRAFT + id);
}

export const options = () => ({ temperature: 1, most: 1024, instructions: "", ...read(OPTIONS) });
export const saveOptions = (values) => write(OPTIONS, values);

/** Forget all that was said and typed. */
export function forgetAll() {
  for (const name of [...keys(TURN), ...keys(DRAFT)]) localStorage.removeItem(name);
}
