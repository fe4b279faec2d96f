// Markdown as models write it, made into elements while it arrives. Text becomes text nodes and nothing else: HTML stays
// as it was written, images are not loaded, links lead to http, https and mailto only. Knows nothing of chats.

import { copyButton, element } from "/static/words.js";

const DEEPEST = 8; // quotes and lists within each other; what lies deeper is a paragraph
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const MARKER = /^( *)(?:([-*+])|(\d{1,9})[.)])(?:( {1,4})|$)/;
const DELIMITERS = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;

/**
 * Markdown that grows. Only the last block can still change, so only that is made anew; any cutting of the text gives
 * the same elements. `finished` hears the words of each block that is complete.
 */
export class Markdown {
  #container;
  #finished;
  #rest = ""; // the text from the last block on
  #open = []; // the nodes of that text
  #fence = null; // {code, copied}: the last block's, if it is code that is still being written

  constructor(container, finished = () => {}) {
    this.#container = container;
    this.#finished = finished;
  }

  push(text) {
    this.#rest += text;
    this.#render(false);
  }

  end() {
    this.#render(true);
    this.#rest = "";
    this.#open = [];
    this.#fence = null;
  }

  #render(whole) {
    const lines = this.#rest.split(/\r?\n/);
    const blocks = parse(lines);
    // where a block ends is certain only when the line that begins the next one is complete
    const final = whole ? blocks.length : blocks.findLastIndex(({ start }) => start < lines.length - 1);
    if (!whole && this.#grow(blocks)) return;
    for (const node of this.#open) node.remove();
    const nodes = blocks.map(make);
    this.#container.append(...nodes);
    const done = whole ? blocks.length : Math.max(final, 0);
    for (const block of blocks.slice(0, done)) this.#finished(words(block));
    this.#open = nodes.slice(done);
    this.#fence = this.#open.length === 1 && blocks.at(-1).kind === "fence" ? this.#open[0].querySelector("code") : null;
    if (done) this.#rest = done < blocks.length ? lines.slice(blocks[done].start).join("\n") : "";
  }

  /** Long code is added to where it stands, so that its copy button stays the same button. */
  #grow(blocks) {
    if (!this.#fence || blocks.length !== 1 || blocks[0].kind !== "fence" || blocks[0].closed) return false;
    const code = blocks[0].text;
    const shown = this.#fence.firstChild ?? this.#fence.appendChild(document.createTextNode(""));
    if (!code.startsWith(shown.data)) return false;
    shown.appendData(code.slice(shown.data.length));
    return true;
  }
}

// ------------------------------------------------------------------------------------------------ blocks

/** The blocks of some lines: {kind, start, ...}, `start` being the block's first line. */
function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    blocks.push({ ...block, start: at });
    at = next;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fence(lines, at);
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  const heading = HEADING.exec(line);
  if (heading) {
    const text = (heading[2] ?? "").trimEnd().replace(/(^|[ \t])#+$/, "");
    return [{ kind: "heading", level: heading[1].length, text }, at + 1];
  }
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && MARKER.test(line)) return list(lines, at, depth);
  if (startsTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function fence(lines, at) {
  const [, marks, info] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  const indent = indentOf(lines[at]);
  const code = [];
  for (let i = at + 1; i < lines.length; i++) {
    if (closing.test(lines[i])) return [{ kind: "fence", info: info.trim(), text: code.join("\n"), closed: true }, i + 1];
    code.push(lines[i].slice(Math.min(indent, indentOf(lines[i]))));
  }
  return [{ kind: "fence", info: info.trim(), text: code.join("\n"), closed: false }, lines.length];
}

function quote(lines, at, depth) {
  const inner = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at++) inner.push(QUOTE.exec(lines[at])[1]);
  return [{ kind: "quote", blocks: parse(inner, depth + 1) }, at];
}

function list(lines, at, depth) {
  const first = MARKER.exec(lines[at]);
  const ordered = first[2] === undefined;
  const items = [];
  while (at < lines.length) {
    const marker = MARKER.exec(lines[at]);
    if (!marker || (marker[2] === undefined) !== ordered || RULE.test(lines[at])) break;
    const [own, next] = item(lines, at, marker);
    items.push(parse(own, depth + 1));
    const following = nextFilled(lines, next);
    at = following < lines.length && MARKER.test(lines[following]) ? following : next;
  }
  return [{ kind: "list", ordered, first: Number(first[3] ?? 1), items }, at];
}

/** The lines of one list item without their indent, and where the next item or block may begin. */
function item(lines, at, marker) {
  const content = marker[0].length;
  const inside = Math.min(content, marker[1].length + 2);
  const own = [lines[at].slice(content)];
  for (at += 1; at < lines.length; at++) {
    const line = lines[at];
    if (!line.trim()) {
      const following = nextFilled(lines, at);
      if (following === lines.length || indentOf(lines[following]) < inside) break;
      own.push("");
    } else if (indentOf(line) >= inside) {
      own.push(line.slice(Math.min(content, indentOf(line))));
    } else if (!lines[at - 1].trim() || MARKER.test(line) || startsBlock(lines, at)) {
      break;
    } else {
      own.push(line);
    }
  }
  return [own, at];
}

function table(lines, at) {
  const head = cells(lines[at]);
  const sides = cells(lines[at + 1]).map((cell) => (/^:-+:$/.test(cell) ? "middle" : cell.endsWith(":") ? "right" : ""));
  const rows = [];
  for (at += 2; at < lines.length && lines[at].includes("|") && lines[at].trim(); at++) {
    const row = cells(lines[at]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ kind: "table", head, sides, rows }, at];
}

function startsTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !DELIMITERS.test(lines[at + 1].trim())) return false;
  return cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at, depth) {
  const own = [lines[at].trim()];
  for (at += 1; at < lines.length && lines[at].trim(); at++) {
    if (startsBlock(lines, at, depth)) break;
    own.push(lines[at].trim());
  }
  return [{ kind: "paragraph", text: own.join("\n") }, at];
}

function startsBlock(lines, at, depth = 0) {
  const line = lines[at];
  if (FENCE.test(line) || RULE.test(line) || HEADING.test(line) || startsTable(lines, at)) return true;
  if (depth >= DEEPEST) return false;
  const marker = MARKER.exec(line);
  // "... in the year\n1984. A sentence" is no list
  return QUOTE.test(line) || (marker !== null && (marker[3] === undefined || marker[3] === "1"));
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function nextFilled(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

// ---------------------------------------------------------------------------------------------- elements

function make(block) {
  switch (block.kind) {
    case "rule":
      return element("hr");
    case "heading": // below the page's own two levels
      return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(make));
    case "list":
      return element(
        block.ordered ? "ol" : "ul",
        block.ordered && block.first !== 1 ? { start: block.first } : {},
        ...block.items.map((blocks) => element("li", {}, ...itemNodes(blocks))),
      );
    case "table":
      return makeTable(block);
    case "fence":
      return makeCode(block);
    default:
      return element("p", {}, ...inline(block.text));
  }
}

/** The text of a short item stands in the item itself, not in a paragraph. */
function itemNodes(blocks) {
  if (blocks[0]?.kind !== "paragraph") return blocks.map(make);
  return [...inline(blocks[0].text), ...blocks.slice(1).map(make)];
}

function makeTable({ head, sides, rows }) {
  const cell = (tag) => (text, column) => element(tag, sides[column] ? { class: sides[column] } : {}, ...inline(text));
  const made = element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...head.map(cell("th")))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td"))))),
  );
  return element("div", { class: "table", role: "region", "aria-label": "Table", tabindex: 0 }, made);
}

function makeCode({ info, text }) {
  const language = info.split(/\s/)[0];
  const code = element("code", {}, text);
  return element(
    "figure",
    { class: "code" },
    element("figcaption", {}, element("span", {}, language || "text"), copyButton("Copy", () => code.textContent, "Copy code")),
    element("pre", { tabindex: 0, "aria-label": language ? `Code in ${language}` : "Code" }, code),
  );
}

/** What a screen reader is told of a block. */
function words(block) {
  switch (block.kind) {
    case "rule":
      return "";
    case "fence":
      return `Code, ${block.text.split("\n").length} lines.`;
    case "table":
      return `Table, ${block.rows.length} rows.`;
    case "list":
      return block.items.map((blocks) => blocks.map(words).join(" ")).join(". ");
    default:
      return make(block).textContent;
  }
}

// ------------------------------------------------------------------------------------------------- inline

const SPECIAL = /[\\`*_~[!h]/g;
const LINK = /!?\[([^[\]\n]{0,1000})\]\(\s*<?([^\s()<>[\]]{0,2000}(?:\([^\s()<>[\]]{0,500}\)[^\s()<>[\]]{0,2000})*)>?(?:\s+"[^"\n]{0,500}")?\s*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`|]{1,2000}/y;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

/** Nodes of a line of text. Linear but for a small factor, whatever a model writes. */
function inline(text, depth = 0) {
  const nodes = [];
  const hopeless = new Set(); // marks that nothing further right closes
  let plain = "";
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const found = special(text, at, depth, hopeless);
    if (found.node) {
      if (plain) nodes.push(plain);
      nodes.push(found.node);
      plain = "";
    } else {
      plain += found.text;
    }
    at = found.end;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function special(text, at, depth, hopeless) {
  switch (text[at]) {
    case "\\":
      if (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { text: text[at + 1], end: at + 2 };
      return { text: "\\", end: at + 1 };
    case "`":
      return codeSpan(text, at, hopeless);
    case "[":
    case "!":
      return link(text, at, depth);
    case "h":
      return depth < DEEPEST ? address(text, at) : { text: "h", end: at + 1 };
    default:
      return emphasis(text, at, depth, hopeless);
  }
}

function codeSpan(text, at, hopeless) {
  const run = runOf(text, at);
  const close = hopeless.has(run) ? -1 : closingRun(text, at + run.length, run);
  if (close < 0) {
    hopeless.add(run);
    return { text: run, end: at + run.length };
  }
  const code = text.slice(at + run.length, close).replaceAll("\n", " ");
  const padded = /^ .*[^ ].* $/.test(code) && code.includes("`");
  return { node: element("code", {}, padded ? code.slice(1, -1) : code), end: close + run.length };
}

/** Where a run of exactly these backticks begins, or -1. */
function closingRun(text, from, run) {
  for (let at = text.indexOf(run, from); at >= 0; ) {
    const found = runOf(text, at);
    if (found.length === run.length) return at;
    at = text.indexOf(run, at + found.length);
  }
  return -1;
}

function runOf(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return text.slice(at, end);
}

function link(text, at, depth) {
  LINK.lastIndex = at;
  const found = depth < DEEPEST ? LINK.exec(text) : null;
  if (!found) return { text: text[at], end: at + 1 };
  const [all, label, target] = found;
  const end = at + all.length;
  if (!/^(?:https?:\/\/|mailto:)/i.test(target)) return { text: all, end };
  // no link within a link
  return { node: anchor(target, label ? inline(label, DEEPEST) : [target]), end };
}

function address(text, at) {
  ADDRESS.lastIndex = at;
  const found = /\w/.test(text[at - 1] ?? "") ? null : ADDRESS.exec(text);
  if (!found) return { text: "h", end: at + 1 };
  let target = found[0].replace(/[.,;:!?*_~]+$/, "");
  if (target.endsWith(")") && !target.includes("(")) target = target.slice(0, -1);
  return { node: anchor(target, [target]), end: at + target.length };
}

function anchor(target, children) {
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

function emphasis(text, at, depth, hopeless) {
  const run = runOf(text, at);
  const mark = run.length >= 2 ? run.slice(0, 2) : run;
  const start = at + mark.length;
  const tag = TAGS[mark];
  const opens = tag && /\S/.test(text[start] ?? "") && !(mark[0] === "_" && /\w/.test(text[at - 1] ?? ""));
  if (!opens || depth >= DEEPEST || run.length > 3) return { text: run, end: at + run.length };
  const close = hopeless.has(mark) ? -1 : closingMark(text, start, mark);
  if (close < 0) {
    hopeless.add(mark);
    return { text: mark, end: start };
  }
  return { node: element(tag, {}, ...inline(text.slice(start, close), depth + 1)), end: close + mark.length };
}

/** Where the mark that closes an emphasis begins, or -1. Code within the emphasis is passed over. */
function closingMark(text, from, mark) {
  const marks = new RegExp(`[\\\\\`${mark[0]}]`, "g");
  const lost = new Set(); // runs of backticks that close nothing
  for (let at = from; ; ) {
    marks.lastIndex = at;
    at = marks.exec(text)?.index ?? -1;
    if (at < 0) return -1;
    const run = runOf(text, at);
    if (text[at] === "\\") {
      at += 2;
    } else if (text[at] === "`") {
      const close = lost.has(run) ? -1 : closingRun(text, at + run.length, run);
      if (close < 0) lost.add(run);
      at = (close < 0 ? at : close) + run.length;
    } else {
      if (at > from && closes(text, at, run, mark)) return at + run.length - mark.length;
      at += run.length;
    }
  }
}

function closes(text, at, run, mark) {
  const fits = mark.length === 1 ? run.length % 2 === 1 : run.length >= 2;
  const wordGoesOn = mark[0] === "_" && /\w/.test(text[at + run.length] ?? "");
  return fits && /\S/.test(text[at - 1]) && !wordGoesOn;
}
