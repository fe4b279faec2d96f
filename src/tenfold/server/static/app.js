// The page: holds the conversations, sends what is asked, and moves between them. Looks are in messages.js and panel.js.

import { Announcer } from "/static/announce.js";
import { chat, Trouble } from "/static/api.js";
import { conversation, Conversations } from "/static/conversations.js";
import { read } from "/static/documents.js";
import { Figures } from "/static/figures.js";
import { documentItems, history, Transcript, waiting } from "/static/messages.js";
import { Panel } from "/static/panel.js";
import { button, element } from "/static/words.js";

const at = (id) => document.getElementById(id);
const KEY = "tenfold-key";
const INTERRUPTED = "The page was closed before the answer was complete.";

const announcer = new Announcer(at("said"));
const conversations = await Conversations.open();
const panel = new Panel(() => at("key").value.trim()); // behind the wait: who sees the model named can send
const transcripts = new Map(); // conversation -> Transcript, kept while answers come in several
const running = new Map(); // conversation -> {controller, figures}
const attached = []; // documents of the next message
let current = conversation();

// ------------------------------------------------------------------------------------------------ asking

/** Sends the conversation as it stands and takes in the answer. */
async function answer(asked) {
  const message = { role: "assistant", text: "", thinking: "", note: INTERRUPTED, failed: true, figures: null };
  const sent = history(asked.messages);
  const run = { controller: new AbortController(), figures: new Figures() };
  const shown = transcript(asked);
  asked.messages.push(message);
  const view = shown.add(message, true);
  running.set(asked, run);
  showState();
  scrollDown(true);
  await conversations.save(asked);
  showList();
  try {
    for await (const event of chat(request(sent), at("key").value.trim(), run.controller.signal)) {
      take(event, message, run);
      view.take(event, run.figures);
      if (asked === current) showProgress(run);
    }
    if (message.note === INTERRUPTED) settle(message, "", false);
    if (!message.text && !message.note) settle(message, "The answer is empty.", false);
  } catch (error) {
    settle(message, ending(error, message), error.name !== "AbortError");
    if (error instanceof Trouble && error.status === 401) askForKey();
  } finally {
    message.figures = run.figures.summary();
    // edited while it was answered: another answer is under way
    if (running.get(asked) === run) running.delete(asked);
    view.finish();
    if (asked === current) announcer.say(message.note || "Answer complete.");
    showState();
    scrollDown();
    await conversations.save(asked);
    showList();
  }
}

function request(messages) {
  const most = Number.parseInt(at("most").value, 10);
  return {
    model: panel.model,
    messages,
    thinking: { type: at("thinking").checked ? "enabled" : "disabled" },
    ...(most > 0 ? { max_tokens: most } : {}),
  };
}

function take(event, message, run) {
  run.figures.take(event, performance.now() / 1000);
  if (event.kind === "delta") {
    message.text += event.text;
    message.thinking += event.thinking;
  }
  if (event.kind === "finish") settle(message, finishes[event.reason] ?? "", false);
}

const finishes = {
  length: "The answer ends here because it reached its longest length.",
  content_filter: "The server ended the answer.",
};

function settle(message, note, failed) {
  message.note = note;
  message.failed = failed;
}

function ending(error, message) {
  if (error instanceof Trouble) return error.message;
  if (error.name !== "AbortError") return `The page failed: ${error.message}`;
  if (message.text || message.thinking) return "Stopped.";
  return "Stopped. What was read is kept: asked again, reading goes on from there.";
}

function send() {
  const text = at("question").value.trim();
  if (running.has(current)) return;
  if (!text && !attached.length) {
    trouble("Write a message or add a document first.");
    at("question").focus();
    return;
  }
  trouble("");
  ask(text, attached.splice(0));
  at("question").value = "";
  grow();
  showAttached();
}

function ask(text, documents) {
  const message = { role: "user", text, documents };
  current.title ||= (text || documents[0].name).split("\n")[0].slice(0, 80);
  const shown = transcript(current);
  current.messages.push(message);
  shown.add(message);
  answer(current);
}

function edit(message, text, documents) {
  stop();
  drop(current.messages.indexOf(message));
  ask(text, documents);
  at("question").focus();
}

function again() {
  stop();
  drop(current.messages.findLastIndex(({ role }) => role === "assistant"));
  answer(current);
  at("question").focus();
}

/** Forgets the messages of the current conversation from this one on. */
function drop(index) {
  current.messages.splice(index);
  transcript(current).trim();
}

function stop() {
  running.get(current)?.controller.abort();
}

// ------------------------------------------------------------------------------------------------ showing

function transcript(asked) {
  if (!transcripts.has(asked)) {
    const say = (words) => asked === current && announcer.say(words);
    const grown = () => asked === current && scrollDown();
    transcripts.set(asked, new Transcript(asked, { edit, again, say, grown }));
  }
  return transcripts.get(asked);
}

function showConversation() {
  at("transcript").replaceChildren(current.messages.length ? transcript(current).element : welcome());
  scrollDown(true);
  showState();
  showList();
}

function welcome() {
  return element(
    "div",
    { class: "welcome" },
    element("p", {}, "Drop a long text anywhere on this page, then ask about it."),
    element("p", { class: "muted" }, "It is read once and kept by the server: the next question about it is answered at once."),
  );
}

function showState() {
  const run = running.get(current);
  const focused = document.activeElement;
  at("stop").hidden = !run;
  at("send").hidden = Boolean(run);
  if (run && focused === at("send")) at("stop").focus();
  if (!run && focused === at("stop")) at("send").focus();
  if (current.messages.length && !transcript(current).element.isConnected) {
    at("transcript").replaceChildren(transcript(current).element);
  }
  if (!run) document.title = current.title ? `${current.title} – tenfold` : "tenfold";
  panel.show(run?.figures ?? current.messages.findLast(({ figures }) => figures)?.figures ?? null);
}

let announced = { quarter: 0, figures: null };

function showProgress({ figures }) {
  panel.show(figures);
  scrollDown();
  const { done, total } = figures;
  if (figures.writing || !total) return;
  document.title = `${Math.floor((100 * done) / total)} % – tenfold`;
  const quarter = Math.floor((4 * done) / total);
  if (announced.figures === figures && announced.quarter === quarter) return;
  announced = { quarter, figures };
  announcer.interrupt(waiting(figures));
}

/** Follows the answer while its end is in sight. */
function scrollDown(always = false) {
  const scroll = at("scroll");
  if (always || following) scroll.scrollTop = scroll.scrollHeight;
}

let following = true;

function showList() {
  const items = conversations.list().map(({ id, title }) => {
    const open = button(title || "Untitled", () => choose(id), { class: "title", "aria-current": id === current.id && "true" });
    const remove = button("×", () => forget(id, title), { class: "quiet", "aria-label": `Delete ${title}` });
    return element("li", {}, open, remove);
  });
  at("conversations").replaceChildren(...items);
  at("clear").hidden = !items.length;
  at("kept").textContent = conversations.lasting ? "Kept in this browser only." : "This browser keeps nothing: lost on closing.";
}

function showAttached() {
  at("attached").replaceChildren(
    ...documentItems(attached, () => {
      showAttached();
      at("question").focus();
    }),
  );
}

function trouble(sentence) {
  at("trouble").textContent = sentence;
}

function askForKey() {
  showMenu(true);
  at("settings").open = true;
  at("key").focus();
}

// ------------------------------------------------------------------------------------------------ moving

function begin() {
  current = conversation();
  showMenu(false);
  showConversation();
  at("question").focus();
}

async function choose(id) {
  const chosen = await conversations.get(id);
  if (!chosen) return;
  current = chosen;
  showMenu(false);
  showConversation();
  at("question").focus();
}

async function forget(id, title) {
  if (!confirm(`Delete the conversation "${title}"?`)) return;
  const gone = await conversations.get(id);
  running.get(gone)?.controller.abort();
  await conversations.remove(id);
  transcripts.delete(gone);
  if (id === current.id) begin();
  else showList();
  at("new").focus();
}

async function clear() {
  if (!confirm("Delete all conversations in this browser?")) return;
  for (const { controller } of running.values()) controller.abort();
  await conversations.clear();
  transcripts.clear();
  begin();
}

async function add(files) {
  const { documents, refused } = await read(files);
  attached.push(...documents);
  trouble(refused.join(" "));
  if (documents.length) announcer.say(`Added ${documents.map(({ name }) => name).join(", ")}.`);
  showAttached();
  at("question").focus();
}

function showMenu(open) {
  at("menu").setAttribute("aria-expanded", open);
  document.body.classList.toggle("menu", open);
}

function grow() {
  const area = at("question");
  area.style.blockSize = "auto";
  area.style.blockSize = `${area.scrollHeight + 2}px`;
}

// ------------------------------------------------------------------------------------------------ wiring

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  send();
});
at("question").addEventListener("input", grow);
at("question").addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  add([...event.clipboardData.files]);
});
at("attach").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", async () => {
  await add([...at("files").files]);
  at("files").value = ""; // so that the same file can be chosen again
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", begin);
at("clear").addEventListener("click", clear);
at("menu").addEventListener("click", () => showMenu(at("menu").getAttribute("aria-expanded") !== "true"));
at("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = at("scroll");
  following = scrollHeight - scrollTop - clientHeight < 80;
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (document.body.classList.contains("menu") && at("menu").checkVisibility()) {
    showMenu(false);
    at("menu").focus();
  } else {
    stop();
  }
});
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  add([...event.dataTransfer.files]);
});

at("choices").addEventListener("submit", (event) => event.preventDefault());
at("key").value = sessionStorage.getItem(KEY) ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, at("key").value.trim());
  panel.refresh();
});

showConversation();
at("question").focus();
