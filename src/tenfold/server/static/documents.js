// Text files of the user, read in the browser and sent as part of a message. Knows nothing of messages' looks.

import { bytes } from "/static/words.js";

const MOST_BYTES = 60e6; // the server takes bodies of 64 MiB

/** Reads files as UTF-8 text: {documents: [{name, text}], refused: [sentence]}. */
export async function read(files) {
  const documents = [];
  const refused = [];
  for (const file of files) {
    try {
      documents.push({ name: file.name, text: await text(file) });
    } catch (error) {
      refused.push(error.message);
    }
  }
  return { documents, refused };
}

async function text(file) {
  if (file.size > MOST_BYTES) {
    throw new Error(`${file.name} has ${bytes(file.size)}, at most ${bytes(MOST_BYTES)} can be sent; split it.`);
  }
  let content;
  try {
    content = await file.arrayBuffer();
  } catch {
    throw new Error(`${file.name} cannot be read; folders cannot be added, only files.`);
  }
  let decoded;
  try {
    decoded = new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    throw new Error(`${file.name} is not UTF-8 text; convert it to text first.`);
  }
  if (decoded.includes("\0")) throw new Error(`${file.name} holds NUL bytes, so it is not text; convert it first.`);
  if (!decoded.trim()) throw new Error(`${file.name} is empty.`);
  return decoded;
}

/**
 * Documents, then the question, as `tenfold run --file` writes them: what was read there is found in the store here.
 * Several documents are told apart by their names.
 */
export function compose(documents, question) {
  const several = documents.length > 1;
  const parts = documents.map(({ name, text }) => (several ? `${name}:\n\n${text}` : text));
  return [...parts, question].filter(Boolean).join("\n\n");
}
