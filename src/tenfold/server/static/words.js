// Numbers and times in words, and the making of elements. Knows nothing of chats.

const plain = new Intl.NumberFormat("en");
const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function count(n, noun) {
  return `${plain.format(n)} ${noun}${n === 1 ? "" : "s"}`;
}

export function number(n) {
  return plain.format(Math.round(n));
}

/** Bytes in decimal units with three digits: 6.19 MB. */
export function bytes(n) {
  let unit = 0;
  while (n >= 999.5 && unit < UNITS.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${unit && n < 999.5 ? n.toPrecision(3) : plain.format(Math.round(n))} ${UNITS[unit]}`;
}

/** Tokens per second: 0.42, 7.3, 812. */
export function rate(tokensPerS) {
  const digits = tokensPerS >= 100 ? 0 : tokensPerS >= 1 ? 1 : 2;
  return `${plain.format(Number(tokensPerS.toFixed(digits)))} tokens/s`;
}

/** A time to wait, no more exact than an estimate is: "5 s", "2 min", "1 h 20 min". */
export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** An element with text or children; names of attributes as in HTML. Strings become text nodes, never markup. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function button(label, action, attributes = {}) {
  return element("button", { type: "button", click: action, ...attributes }, label);
}

/** Copies text; without the clipboard's own interface (plain http in a local network) by way of a selection. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { class: "unseen" });
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!copied) throw new Error("the browser did not copy");
}

/** `text` says what to copy when the button is pressed; `name` is the button's for those who do not see where it stands. */
export function copyButton(label, text, name) {
  const press = async () => {
    let outcome = "Copied";
    try {
      await copy(text());
    } catch {
      outcome = "Not copied";
    }
    made.textContent = outcome;
    setTimeout(() => (made.textContent = label), 1500);
  };
  const made = button(label, press, { title: name });
  return made;
}
