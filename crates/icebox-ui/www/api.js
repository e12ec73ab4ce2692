// The daemon's API, asked with the key that the user has typed. The key is kept for as long as the tab is, in no address and
// in nothing that is written down.

const KEY = 'icebox.key';

/** An answer that is not what was asked for: its message is for people. */
export class Refusal extends Error {
  constructor(status, body) {
    super(body?.message ?? `the daemon answered ${status}`);
    this.status = status;
    this.hint = body?.hint;
    this.causes = body?.causes ?? [];
  }
}

/** What went wrong, in a sentence or two. */
export function why(error) {
  if (!(error instanceof Refusal)) {
    return error instanceof TypeError ? 'The daemon does not answer.' : String(error.message ?? error);
  }
  const sentence = [error.message, ...error.causes].join(': ');
  return error.hint ? `${sentence} — ${error.hint}` : sentence;
}

export const session = {
  get key() {
    return sessionStorage.getItem(KEY);
  },
  begin(key) {
    sessionStorage.setItem(KEY, key);
  },
  end() {
    window.dispatchEvent(new Event('icebox:signing-out'));
    sessionStorage.removeItem(KEY);
    tokens.clear();
    window.dispatchEvent(new Event('icebox:signed-out'));
  },
};

async function refusal(answer) {
  let body;
  try {
    body = JSON.parse(await answer.text());
  } catch {
    body = undefined;
  }
  return new Refusal(answer.status, body);
}

/** Sends a request, and returns the answer if it is a success. */
export async function send(method, path, { body, headers = {}, signal, keepalive, key = session.key } = {}) {
  const answer = await fetch(path, {
    method,
    signal,
    keepalive,
    cache: 'no-store',
    credentials: 'omit',
    headers: { 'X-API-Key': key ?? '', ...headers },
    body,
  });
  if (answer.ok) return answer;
  const error = await refusal(answer);
  if (answer.status === 401 && key === session.key && !headers['E2b-Sandbox-Id']) session.end();
  throw error;
}

/** Asks, and returns what the JSON in the answer says; nothing if there is none. */
export async function ask(method, path, json, options = {}) {
  const body = json === undefined ? undefined : JSON.stringify(json);
  const headers = { ...(body ? { 'Content-Type': 'application/json' } : {}), ...options.headers };
  const answer = await send(method, path, { ...options, body, headers });
  const text = await answer.text();
  return text ? JSON.parse(text) : undefined;
}

/** The lines of an answer, each one parsed, as they come. */
export async function* lines(answer) {
  let rest = '';
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split('\n');
      rest = parts.pop();
      for (const part of parts) if (part) yield JSON.parse(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A part of a path. */
export const part = encodeURIComponent;

/** A sandbox with what it is made of. Its agent's token is remembered here, and shown nowhere. */
export async function inspect(id, options) {
  const sandbox = await ask('GET', `/sandboxes/${part(id)}?space=true`, undefined, options);
  tokens.set(sandbox.sandboxID, sandbox.envdAccessToken);
  delete sandbox.envdAccessToken;
  delete sandbox.trafficAccessToken;
  return shown(sandbox);
}

const tokens = new Map();

/** The headers with which a request is carried to a sandbox's agent. */
export async function toAgent(id) {
  if (!tokens.has(id)) await inspect(id);
  const token = tokens.get(id);
  return { 'E2b-Sandbox-Id': id, 'E2b-Sandbox-Port': '49983', ...(token ? { 'X-Access-Token': token } : {}) };
}

/** A sandbox as we show it. Over TCP it comes in E2B's words, which have none for one that is stopped or has no end. */
export function shown(sandbox) {
  const stopped = sandbox.state === 'paused' && sandbox.pauseMode === 'filesystem';
  const endless = !sandbox.endAt || sandbox.endAt.startsWith('9999');
  return {
    ...sandbox,
    state: stopped ? 'stopped' : sandbox.state,
    endAt: endless ? undefined : sandbox.endAt,
    title: sandbox.name ?? sandbox.sandboxID,
  };
}
