// The agent in a sandbox, asked through the daemon: E2B's process and filesystem services, in the Connect protocol's JSON.

import { Refusal, send, toAgent } from './api.js';

const JSON_TYPE = 'application/json';
const STREAM_TYPE = 'application/connect+json';
/** The last message of a stream. */
const END_OF_STREAM = 2;

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** Asks once. */
export async function call(id, method, message, options = {}) {
  const headers = { ...(await toAgent(id)), 'Content-Type': JSON_TYPE, 'Connect-Protocol-Version': '1' };
  const answer = await send('POST', `/${method}`, { headers, body: JSON.stringify(message), ...options });
  return answer.json();
}

/** Asks, and gets one message after another. */
export async function* stream(id, method, message, { signal } = {}) {
  const headers = { ...(await toAgent(id)), 'Content-Type': STREAM_TYPE, 'Connect-Protocol-Version': '1' };
  const body = encoder.encode(JSON.stringify(message));
  const request = new Uint8Array(body.length + 5);
  new DataView(request.buffer).setUint32(1, body.length);
  request.set(body, 5);
  const answer = await send('POST', `/${method}`, { headers, body: request, signal });
  for await (const [flags, bytes] of envelopes(answer.body.getReader())) {
    const said = JSON.parse(decoder.decode(bytes));
    if (!(flags & END_OF_STREAM)) yield said;
    else if (said.error) throw new Refusal(0, said.error);
    else return;
  }
  throw new Error('the connection was cut');
}

async function* envelopes(reader) {
  let have = new Uint8Array(0);
  try {
    for (;;) {
      while (have.length >= 5) {
        const length = new DataView(have.buffer, have.byteOffset).getUint32(1);
        if (have.length < 5 + length) break;
        yield [have[0], have.subarray(5, 5 + length)];
        have = have.subarray(5 + length);
      }
      const { value, done } = await reader.read();
      if (done) return;
      const joined = new Uint8Array(have.length + value.length);
      joined.set(have);
      joined.set(value, have.length);
      have = joined;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Bytes as the protocol's JSON has them. */
export const fromBase64 = (text) => Uint8Array.from(atob(text), (it) => it.charCodeAt(0));

export function toBase64(bytes) {
  let text = '';
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

/** Where a file's bytes are. */
export const fileAt = (path) => `/files?path=${encodeURIComponent(path)}`;

/** Reads a file. */
export async function download(id, path, { signal } = {}) {
  const answer = await send('GET', fileAt(path), { headers: await toAgent(id), signal });
  return answer.blob();
}

/** Writes a file, and says how far it is, which `fetch` cannot. */
export async function upload(id, path, file, onprogress) {
  const headers = await toAgent(id);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open('POST', fileAt(path));
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.setRequestHeader('Content-Type', 'application/octet-stream');
    request.upload.onprogress = (event) => onprogress(event.loaded, event.total);
    request.onload = () => {
      if (request.status === 200) resolve();
      else {
        let body;
        try {
          body = JSON.parse(request.responseText);
        } catch {
          body = undefined;
        }
        reject(new Refusal(request.status, body));
      }
    };
    request.onerror = () => reject(new TypeError('the connection was cut'));
    request.send(file);
  });
}
