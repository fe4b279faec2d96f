// The live panel: what this conversation takes in the server's memory and how fast it goes. Asks the server for its own
// figures while the page is seen.

import { status } from "/static/api.js";
import { bytes, count, number, rate } from "/static/words.js";

const EVERY_MS = 2000;
const NONE = "–";

export class Panel {
  model = "";
  #server = null;
  #figures = null;
  #key;

  /** `key` returns the API key of the moment. */
  constructor(key) {
    this.#key = key;
    const poll = async () => {
      if (!document.hidden) await this.refresh();
      setTimeout(poll, EVERY_MS);
    };
    poll();
  }

  async refresh() {
    try {
      this.#server = await status(this.#key());
      this.model = this.#server.model ?? "";
      put("model", this.model || NONE);
    } catch (trouble) {
      this.#server = null;
      put("model", trouble.status === 401 ? "needs an API key" : "not reachable");
    }
    this.show(this.#figures);
  }

  /** Shows these figures (of an answer that comes, or kept with one), or none. */
  show(figures) {
    this.#figures = figures;
    const { done = null, cached = null, total = null, readPerS = null, written = 0, writtenPerS = null } = figures ?? {};
    const tokens = done === null ? null : done + written;
    const of = this.#server?.context;
    put("panel-context", tokens === null ? NONE : of ? `${number(tokens)} of ${count(of, "token")}` : count(tokens, "token"));
    put("panel-cached", cached === null || total === null ? NONE : `${number(cached)} of ${count(total, "token")}`);
    put("panel-reading", readPerS ? rate(readPerS) : NONE);
    put("panel-writing", writtenPerS ? rate(writtenPerS) : NONE);
    this.#memory(tokens);
    const { running, waiting, kv_bytes } = this.#server ?? {};
    put("panel-requests", Number.isFinite(running) ? `${running} running, ${waiting ?? 0} waiting` : NONE);
    put("panel-all", Number.isFinite(kv_bytes) ? bytes(kv_bytes) : NONE);
  }

  #memory(tokens) {
    const server = this.#server;
    const own = size(tokens, server?.kv_fixed_bytes, server?.kv_bytes_per_token);
    const other = size(tokens, 0, server?.v32_kv_bytes_per_token);
    put("panel-kv", own === null ? NONE : bytes(own));
    put("panel-v32", other === null ? NONE : bytes(other) + (own ? `, ${ratio(other / own)} times as much` : ""));
    const longer = Math.max(own ?? 0, other ?? 0) || 1;
    stretch("panel-kv-bar", (own ?? 0) / longer);
    stretch("panel-v32-bar", (other ?? 0) / longer);
  }
}

function size(tokens, fixed, perToken) {
  return tokens === null || !Number.isFinite(perToken) ? null : (fixed ?? 0) + tokens * perToken;
}

function ratio(times) {
  return times < 10 ? times.toFixed(1) : number(times);
}

function put(id, text) {
  const shown = document.getElementById(id);
  if (shown.textContent !== text) shown.textContent = text;
}

function stretch(id, share) {
  document.getElementById(id).style.inlineSize = `${100 * share}%`;
}
