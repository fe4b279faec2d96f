// How one conversation looks: its messages, what can be done with each, and an answer while it comes. Knows nothing of
// the server; what buttons do is told by `actions`.

import { compose } from "/static/documents.js";
import { Markdown } from "/static/markdown.js";
import { button, bytes, copyButton, count, duration, element, number, rate } from "/static/words.js";

/**
 * The messages of a conversation as elements. `actions`: edit(message, text, documents), again(), say(sentence),
 * grown() after more of an answer is shown.
 */
export class Transcript {
  element = element("div", { class: "transcript" });
  #conversation;
  #actions;
  #articles = new Map(); // message -> its element

  constructor(conversation, actions) {
    this.#conversation = conversation;
    this.#actions = actions;
    for (const message of conversation.messages) this.add(message);
  }

  /** Shows the conversation's newest message; for an answer that is to come, returns what takes its events. */
  add(message, coming = false) {
    const view = message.role === "user" ? this.#question(message) : new Answer(message, coming, this.#actions);
    const article = view.article ?? view;
    this.#articles.set(message, article);
    this.element.append(article);
    this.#mark();
    return view;
  }

  /** Takes away what is no longer part of the conversation. */
  trim() {
    for (const [message, article] of this.#articles) {
      if (this.#conversation.messages.includes(message)) continue;
      article.remove();
      this.#articles.delete(message);
    }
    this.#mark();
  }

  /** Only the last message offers to be answered again. */
  #mark() {
    const last = this.#articles.get(this.#conversation.messages.at(-1));
    for (const article of this.#articles.values()) article.classList.toggle("last", article === last);
  }

  #question(message) {
    const article = element("article", { class: "question" });
    const show = () => {
      const edit = button("Edit", () => article.replaceChildren(this.#editor(message, show)), { class: "quiet" });
      article.replaceChildren(
        element("h2", { class: "unseen" }, "You"),
        chips(message.documents),
        element("div", { class: "asked" }, message.text),
        element("div", { class: "tools" }, edit, copyButton("Copy", () => message.text, "Copy this message")),
      );
      return edit;
    };
    show();
    return article;
  }

  #editor(message, show) {
    const kept = [...message.documents];
    const list = element("ul", { class: "documents" });
    const drop = (name) => (list.replaceChildren(...documentItems(kept, drop)), area.focus(), name);
    list.append(...documentItems(kept, drop));
    const area = element("textarea", { "aria-label": "Edit your message", rows: 3 });
    area.value = message.text;
    const send = () => {
      if (area.value.trim() || kept.length) this.#actions.edit(message, area.value.trim(), kept);
    };
    const form = element(
      "form",
      {
        class: "editor",
        submit: (event) => (event.preventDefault(), send()),
        keydown: (event) => {
          if (event.key === "Escape") (event.preventDefault(), show().focus());
          if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.preventDefault(), send());
        },
      },
      list,
      area,
      element(
        "div",
        { class: "row" },
        element("span", { class: "muted small" }, "What follows this message is dropped."),
        button("Cancel", () => show().focus()),
        element("button", { type: "submit", class: "first" }, "Send"),
      ),
    );
    queueMicrotask(() => area.focus());
    return form;
  }
}

/** Documents as a list of names and sizes; with `drop`, each can be taken away. */
export function documentItems(documents, drop = null) {
  return documents.map((one, index) => {
    const take = () => {
      documents.splice(index, 1);
      drop(one.name);
    };
    const size = element("span", { class: "muted" }, bytes(new Blob([one.text]).size));
    const remove = drop ? [button("×", take, { class: "quiet", "aria-label": `Remove ${one.name}` })] : [];
    return element("li", {}, element("span", { class: "name" }, one.name), " ", size, ...remove);
  });
}

function chips(documents) {
  return documents.length ? element("ul", { class: "documents" }, ...documentItems(documents)) : "";
}

/** An answer: what it waits for, its thinking, its text, how it ended. */
class Answer {
  article = element("article", { class: "answer" });
  #message;
  #actions;
  #wait = new Wait();
  #thought = element("div", { class: "markdown" });
  #thinking;
  #summary = element("summary", {}, "Thinking");
  #text = element("div", { class: "markdown" });
  #note = element("p", { class: "note", hidden: true });
  #figures = element("p", { class: "figures muted small" });
  #tools;
  #thoughtWriter = new Markdown(this.#thought);
  #textWriter;
  #news = { text: "", thinking: "" }; // what has come since the last time it was shown
  #timer = null;

  constructor(message, coming, actions) {
    this.#message = message;
    this.#actions = actions;
    this.#textWriter = new Markdown(this.#text, coming ? actions.say : undefined);
    this.#thinking = element("details", { class: "thinking", hidden: true }, this.#summary, this.#thought);
    this.#tools = element(
      "div",
      { class: "tools" },
      button("Regenerate", () => actions.again(), { class: "quiet again" }),
      copyButton("Copy", () => message.text, "Copy this answer"),
    );
    this.article.append(element("h2", { class: "unseen" }, "Answer"), this.#wait.element, this.#thinking, this.#text);
    this.article.append(this.#note, this.#figures, this.#tools);
    this.#tools.hidden = coming;
    this.#wait.element.hidden = !coming;
    if (!coming) this.#showWhole();
  }

  #showWhole() {
    this.#news = { text: this.#message.text, thinking: this.#message.thinking };
    this.finish();
  }

  /** Shows the state of the figures; text is shown a little later, many tokens at once. */
  take(event, figures) {
    if (event.kind === "delta") {
      this.#news.text += event.text;
      this.#news.thinking += event.thinking;
      this.#later();
    }
    if (figures.writing) this.#wait.element.hidden = true;
    else this.#wait.show(figures);
  }

  /** Showing long text takes a while; it may take a fifth of the time. */
  #later(pause = 40) {
    this.#timer ??= setTimeout(() => {
      const begun = performance.now();
      this.#timer = null;
      this.#show();
      const took = performance.now() - begun;
      if (took > 10) this.#later(4 * took);
    }, pause);
  }

  #show() {
    const { text, thinking } = this.#news;
    this.#news = { text: "", thinking: "" };
    if (thinking) this.#thoughtWriter.push(thinking);
    if (text) this.#textWriter.push(text);
    const words = this.#message.thinking.split(/\s+/).length;
    this.#thinking.hidden = !this.#message.thinking;
    this.#summary.textContent = `${this.#message.text ? "Thought" : "Thinking"}, ${count(words, "word")}`;
    this.#actions.grown();
  }

  /** Nothing more comes: the message says all there is to show. */
  finish() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#show();
    this.#thoughtWriter.end();
    this.#textWriter.end();
    this.#wait.element.hidden = true;
    this.#tools.hidden = false;
    this.#note.hidden = !this.#message.note;
    this.#note.textContent = this.#message.note;
    this.#note.classList.toggle("bad", this.#message.failed);
    this.#figures.textContent = summary(this.#message.figures);
  }
}

function summary(figures) {
  if (!figures || figures.total === null) return "";
  const { total, cached, written, readPerS, writtenPerS } = figures;
  const parts = [`${count(total, "token")} read`];
  if (cached) parts.push(`${number(cached)} of them from the store`);
  if (readPerS) parts.push(rate(readPerS));
  if (written) parts.push(`${number(written)} written${writtenPerS ? `, ${rate(writtenPerS)}` : ""}`);
  return parts.join(" · ");
}

/** The queue and the reading of the prompt, with a bar and the time that is left. */
class Wait {
  element = element("div", { class: "wait" });
  #bar = element("progress", { "aria-label": "Reading the prompt", max: 1 });
  #words = element("p", {}, "Sent");

  constructor() {
    this.element.append(this.#bar, this.#words);
  }

  show(figures) {
    if (figures.total !== null) {
      this.#bar.max = figures.total || 1;
      this.#bar.value = figures.done;
    }
    this.#words.textContent = waiting(figures);
  }
}

/** Queue and reading in a sentence, as shown and as said. */
export function waiting(figures) {
  if (figures.ahead !== null) {
    return figures.ahead === 0 ? "Next in the queue" : `Waiting: ${count(figures.ahead, "request")} ahead`;
  }
  if (figures.total === null) return "Sent";
  const { done, total, cached, readPerS, etaS } = figures;
  const parts = [`Reading: ${number(done)} of ${count(total, "token")}`];
  if (cached) parts.push(`${number(cached)} from the store`);
  if (readPerS) parts.push(rate(readPerS));
  if (etaS !== null && etaS > 0) parts.push(`about ${duration(etaS)} left`);
  return parts.join(" · ");
}

/** The messages as the server takes them. Answers without text (stopped while reading) are nothing to it. */
export function history(messages) {
  return messages
    .filter(({ role, text }) => role === "user" || text)
    .map(({ role, text, documents }) => ({ role, content: role === "user" ? compose(documents, text) : text }));
}
