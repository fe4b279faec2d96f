// Conversations, kept in this browser and nowhere else. Titles are kept apart, so that a list of conversations does not
// load their documents. Where the browser keeps nothing (a private window, perhaps), memory serves until the page closes.

const STORES = ["titles", "conversations"];

export class Conversations {
  #database = null;
  #titles = new Map(); // id -> {id, title, changed}
  #loaded = new Map(); // id -> conversation
  #gone = new Set(); // ids of what was deleted, perhaps while an answer was still coming

  static async open() {
    const made = new Conversations();
    try {
      made.#database = await opened();
      const kept = await wish(made.#database.transaction("titles").objectStore("titles").getAll());
      for (const title of kept) made.#titles.set(title.id, title);
    } catch {
      made.#database = null;
    }
    return made;
  }

  /** Whether conversations outlive the page. */
  get lasting() {
    return this.#database !== null;
  }

  /** {id, title, changed}, the latest first. */
  list() {
    return [...this.#titles.values()].sort((a, b) => b.changed - a.changed);
  }

  async get(id) {
    if (!this.#loaded.has(id) && this.#database) {
      const found = await wish(this.#database.transaction("conversations").objectStore("conversations").get(id));
      if (found) this.#loaded.set(id, found);
    }
    return this.#loaded.get(id) ?? null;
  }

  async save(conversation) {
    const { id, title } = conversation;
    if (this.#gone.has(id)) return;
    const entry = { id, title, changed: Date.now() };
    this.#titles.set(id, entry);
    this.#loaded.set(id, conversation);
    await this.#write((titles, whole) => {
      titles.put(entry);
      whole.put(conversation);
    });
  }

  async remove(id) {
    this.#gone.add(id);
    this.#titles.delete(id);
    this.#loaded.delete(id);
    await this.#write((titles, whole) => {
      titles.delete(id);
      whole.delete(id);
    });
  }

  async clear() {
    for (const id of this.#titles.keys()) this.#gone.add(id);
    this.#titles.clear();
    this.#loaded.clear();
    await this.#write((titles, whole) => {
      titles.clear();
      whole.clear();
    });
  }

  async #write(change) {
    if (!this.#database) return;
    try {
      const transaction = this.#database.transaction(STORES, "readwrite");
      change(...STORES.map((name) => transaction.objectStore(name)));
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
    } catch {
      this.#database = null; // the disk is full, or the browser forbids it; the page says so
    }
  }
}

export function conversation() {
  // crypto.randomUUID exists on https and localhost only
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", messages: [] };
}

function opened() {
  const request = indexedDB.open("tenfold", 1);
  request.onupgradeneeded = () => {
    for (const name of STORES) request.result.createObjectStore(name, { keyPath: "id" });
  };
  return wish(request);
}

function wish(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
