// What there is, kept as it is now. The daemon's events say when to look again, so nothing is asked for while nothing happens;
// when their stream breaks, it is taken up where it ended.

import { ask, lines, send, shown } from './api.js';

const EVENTS_KEPT = 1000;
/** Events that come together lead to one look. */
const GATHER_MS = 80;
/** While a verb is under way. */
const VERB_MS = 1000;
const RETRY_MS = [250, 500, 1000, 2000, 4000];

/** Everything that views show. `state` is `connecting`, `live` or `lost`. */
export const live = { state: 'connecting', loaded: false, sandboxes: [], templates: [], events: [], pending: new Map() };

const listeners = new Set();
let running;
let gathering;
let looking = false;
let lookAgain = false;
let newest;
let verbs;

/** Calls `listener` now and whenever something changes, until the signal is aborted. With what happened, if something did. */
export function watch(listener, signal) {
  listeners.add(listener);
  signal.addEventListener('abort', () => listeners.delete(listener));
  listener();
}

function changed(event) {
  for (const listener of [...listeners]) listener(event);
}

/** Follows the daemon until `stop`. */
export function start() {
  stop();
  running = new AbortController();
  follow(running.signal);
}

export function stop() {
  running?.abort();
  clearTimeout(gathering);
  clearTimeout(verbs);
  gathering = undefined;
  newest = undefined;
  Object.assign(live, { state: 'connecting', loaded: false, sandboxes: [], templates: [], events: [] });
  live.pending.clear();
}

/** Looks again soon. */
export function refresh() {
  gathering ??= setTimeout(() => {
    gathering = undefined;
    look();
  }, GATHER_MS);
}

/** Shows that a verb is under way until `work` has ended, and what became of it. */
export async function during(id, verb, work) {
  live.pending.set(id, verb);
  changed();
  try {
    return await work();
  } finally {
    live.pending.delete(id);
    await look();
  }
}

async function look() {
  if (looking) {
    lookAgain = true;
    return;
  }
  const { signal } = running;
  looking = true;
  try {
    do {
      lookAgain = false;
      const [sandboxes, templates] = await Promise.all([
        ask('GET', '/sandboxes?space=true', undefined, { signal }),
        ask('GET', '/templates', undefined, { signal }),
      ]);
      if (signal.aborted) return;
      live.sandboxes = sandboxes.map(shown);
      live.templates = templates;
      live.loaded = true;
      changed();
      // Verbs of others are announced when they have ended, not when they begin.
      clearTimeout(verbs);
      if (live.sandboxes.some((it) => it.verb)) verbs = setTimeout(refresh, VERB_MS);
    } while (lookAgain);
  } catch (error) {
    // The stream of events breaks for the same reason, and looks again when it is back.
    if (!signal.aborted && live.state === 'live') refresh();
  } finally {
    looking = false;
  }
}

async function follow(signal) {
  let failures = 0;
  while (!signal.aborted) {
    try {
      const since = newest === undefined ? '' : `&since=${newest}`;
      const answer = await send('GET', `/events?follow=true${since}`, { signal });
      failures = 0;
      live.state = 'live';
      // After the stream has begun, so that nothing falls between the two.
      look();
      changed();
      for await (const event of lines(answer)) {
        newest = event.sequence;
        live.events.push(event);
        if (live.events.length > EVENTS_KEPT) live.events.splice(0, live.events.length - EVENTS_KEPT);
        refresh();
        changed(event);
      }
    } catch {
      if (signal.aborted) return;
    }
    if (signal.aborted) return;
    live.state = 'lost';
    changed();
    const delay = RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];
    failures += 1;
    await new Promise((resolve) => setTimeout(resolve, delay));
  }
}
