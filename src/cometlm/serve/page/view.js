// Elements of the page. What users and the model wrote becomes text nodes, never markup.

/** An element with properties and children; strings become text. */
export function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const button = (text, onclick, properties = {}) =>
  el("button", { type: "button", className: "quiet", onclick, ...properties }, text);

const whole = new Intl.NumberFormat("en");

export const count = (number, noun) => `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; number >= 1024 && unit < units.length - 1; unit++) number /= 1024;
  return `${unit ? number.toFixed(1) : number} ${units[unit]}`;
}

const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const AGES = [["day", 86400], ["hour", 3600], ["minute", 60]];

/** When it was, seconds since 1970, as "2 hours ago". */
export function age(seconds) {
  const past = Date.now() / 1000 - seconds;
  const [unit, size] = AGES.find(([, size]) => past >= size) ?? ["second", 60];
  const text = unit === "second" ? "just now" : relative.format(-Math.floor(past / size), unit);
  return el("time", { dateTime: new Date(seconds * 1000).toISOString() }, text);
}

/** The beginning of a text, in one line. */
export function line(text) {
  const flat = text.slice(0, 400).replace(/\s+/g, " ").trim();
  return flat.length > 80 ? `${flat.slice(0, 79)}…` : flat;
}

/** What a turn is called where there is room for a line only. */
export const title = (turn) => (turn.file ? turn.file.name : line(turn.ask ?? "")) || "(no words)";

const LONG = 3000; // characters, of which a part is seen and the rest is scrolled to

/** Something that was said: who, a text, and what can be done with it. */
function said(who, className, text, ...tools) {
  const isLong = className === "asked" && text.length > LONG;
  const paragraph = el("p", { className: isLong ? "text long" : "text", dir: "auto" }, text);
  if (isLong) paragraph.tabIndex = 0;
  const bar = el("div", { className: "tools" }, ...tools);
  return [el("section", { className }, el("h2", {}, who), paragraph, bar), paragraph, bar];
}

/**
 * A turn of a conversation.
 *
 * `turn` has `ask` and `answer`, or `file`; `model` is who answers. `tools` are elements behind what
 * was asked and behind the answer. Gives the article, and the parts that change while it is written.
 */
export function turnView(turn, model, { ofAsk = [], ofAnswer = [], notes = [] } = {}) {
  const article = el("article");
  if (turn.file) {
    const name = el("strong", {}, turn.file.name);
    const about = el("span", {}, fileWords(turn));
    const bar = el("div", { className: "tools" }, ...ofAnswer);
    const box = el("section", { className: "file" }, el("h2", {}, "File"), el("p", {}, name, " ", about));
    const progress = turn.status === "working" ? el("progress", { ariaLabel: `Reading ${turn.file.name}` }) : null;
    if (progress) box.append(progress);
    box.append(bar);
    article.append(box, ...notes);
    return { article, about, progress, bar };
  }
  const [asked] = said("You", "asked", turn.ask ?? "", ...ofAsk);
  const [answered, answer, bar] = said(model, "answered", turn.answer ?? "", ...ofAnswer);
  if (turn.status === "working") answered.ariaBusy = "true";
  if (turn.ask === null) asked.replaceChildren(el("p", { className: "note" }, turn.title ?? turn.id));
  article.append(asked, ...(turn.answer === null ? [bar] : [answered]), ...notes);
  return { article, answer, bar };
}

/** A share as a whole percentage, which is 100 only of all of it. */
export const percent = (share) => `${Math.min(100, Math.floor(100 * share))}%`;

/** How much of a file was read. */
export function fileWords({ file, tokens, status, rate }) {
  const size = file.bytes === undefined ? "" : `${bytes(file.bytes)}, `;
  if (status !== "working") return `${size}${count(tokens ?? 0, "token")} in all`;
  if (!file.read) return `${size}being sent`;
  const speed = rate ? `, ${count(rate, "token")} a second` : "";
  return `${percent(file.share)} of ${size}${count(file.read, "token")} read${speed}`;
}
