// What is known of one answer while it comes: queue, reading, writing. Counts and clocks; knows nothing of the page.

export class Figures {
  ahead = null; // requests before this one, while it waits
  done = null; // tokens of the prompt that are read
  total = null;
  cached = null; // of these, tokens that the store already held
  readPerS = null;
  etaS = null;
  written = 0; // tokens of the answer: deltas until the server has counted
  #counted = false;
  #begun = null; // seconds
  #latest = null;

  /** Takes one event of api.chat, at a time in seconds. */
  take(event, now) {
    if (event.kind === "queued") this.ahead = event.ahead;
    if (event.kind === "progress") this.#read(event);
    if (event.kind === "delta") this.#write(now);
    if (event.kind === "usage") this.#count(event);
  }

  #read({ done, total, tokens_per_s, eta_s }) {
    this.ahead = null;
    this.cached ??= done; // the first frame stands at what the store held
    this.done = done;
    this.total = total;
    this.etaS = eta_s;
    if (tokens_per_s > 0) this.readPerS = tokens_per_s;
  }

  #write(now) {
    this.ahead = null;
    this.#begun ??= now;
    this.#latest = now;
    if (this.total !== null) this.done = this.total;
    if (!this.#counted) this.written += 1;
  }

  #count({ prompt, cached, completion }) {
    this.#counted = true;
    this.done = this.total = prompt;
    this.cached = cached ?? this.cached;
    this.written = completion;
  }

  get writing() {
    return this.#begun !== null;
  }

  /** Tokens that the model holds for this conversation; null while unknown. */
  get context() {
    return this.done === null ? null : this.done + this.written;
  }

  get writtenPerS() {
    const seconds = this.#latest - this.#begun;
    return this.written > 1 && seconds > 0 ? (this.written - 1) / seconds : null;
  }

  /** What is kept with the conversation. */
  summary() {
    const { done, total, cached, readPerS, written, writtenPerS } = this;
    return { done, total, cached, readPerS, written, writtenPerS };
  }
}
