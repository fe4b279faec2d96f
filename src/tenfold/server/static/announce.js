// What a screen reader hears while an answer comes: whole blocks, at most one piece in some seconds, never token by token.

const PAUSE_MS = 2500;

export class Announcer {
  #region;
  #waiting = [];
  #timer = null;

  constructor(region) {
    this.#region = region;
  }

  say(sentence) {
    if (!sentence.trim()) return;
    this.#waiting.push(sentence);
    this.#timer ??= setTimeout(() => this.#speak(), 100);
  }

  /** Says this instead of what still waits. */
  interrupt(sentence) {
    this.#waiting = [];
    this.say(sentence);
  }

  #speak() {
    this.#region.textContent = this.#waiting.join(" ");
    this.#waiting = [];
    this.#timer = setTimeout(() => {
      this.#timer = null;
      if (this.#waiting.length) this.#speak();
    }, PAUSE_MS);
  }
}
