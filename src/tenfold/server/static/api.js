// The server as the page sees it: a chat as a stream of events, and its status. Knows nothing of the page.

/** What went wrong, in a sentence for the user. `status` is HTTP's, or 0. */
export class Trouble extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The answer of a refused request in a sentence. */
async function refusal(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // not our server's own error: a proxy's page, say
  }
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) message += ` Try again in ${wait} s.`;
  return new Trouble(String(message), response.status);
}

async function ask(path, options) {
  try {
    return await fetch(path, { ...options, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it running?");
  }
}

/** Splits a stream of server-sent events into {event, data}, wherever its bytes were cut. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      // a lone \r at the end may be half of a \r\n
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else {
          const [, field, content] = /^([^:]*):? ?(.*)$/s.exec(line);
          if (field === "event") event = content;
          if (field === "data") data.push(content);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening closes the connection
  }
}

/**
 * One chat completion. Yields {kind}: "queued" (ahead), "progress" (done, total, tokens_per_s, eta_s), "delta"
 * (text, thinking), "usage" (prompt, cached, completion) and "finish" (reason). Throws Trouble, also for a stream that
 * ends before [DONE]: half an answer must not pass for a whole one.
 */
export async function* chat(request, key, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json", "X-Tenfold-Progress": "1" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  try {
    for await (const { event, data } of events(response.body)) {
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new Trouble(String(said.error.message || "The server failed."));
      if (event === "queued" || event === "progress") yield { kind: event, ...said };
      else yield* chunk(said);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Trouble) throw error;
    throw new Trouble("The connection broke before the answer was complete.");
  }
  throw new Trouble("The stream ended before the answer was complete.");
}

function* chunk(said) {
  const choice = said.choices?.[0];
  const text = choice?.delta?.content || "";
  const thinking = choice?.delta?.reasoning_content || "";
  if (text || thinking) yield { kind: "delta", text, thinking };
  if (choice?.finish_reason) yield { kind: "finish", reason: choice.finish_reason };
  if (said.usage) {
    yield {
      kind: "usage",
      prompt: said.usage.prompt_tokens,
      cached: said.usage.prompt_tokens_details?.cached_tokens ?? null,
      completion: said.usage.completion_tokens,
    };
  }
}

/** The server's figures for the panel. Throws Trouble. */
export async function status(key) {
  const response = await ask("/status", { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}
