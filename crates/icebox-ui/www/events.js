// What happened, newest first.

import { lines, part, send, why } from './api.js';
import { button, h, setText, table } from './dom.js';
import { clock, micros } from './format.js';
import { live, watch } from './live.js';

const SHOWN = 500;

function line(event, names) {
  const id = event.sandboxID;
  const steps = event.steps?.length
    ? h('details', {}, h('summary', {}, `${event.steps.length} steps`), h('ul', { class: 'steps' },
      event.steps.map((it) => h('li', {}, h('span', {}, it.step), h('b', {}, micros(it.micros))))))
    : undefined;
  const link = id && (names.has(id) ? h('a', { href: `#/sandboxes/${part(id)}` }, names.get(id)) : h('code', {}, id));
  return h('tr', {},
    h('td', { class: 'number muted' }, String(event.sequence)), h('td', {}, h('time', { datetime: event.time }, clock(event.time))),
    h('td', {}, h('span', { class: 'kind' }, event.event)), h('td', {}, link), h('td', { class: 'wide' }, event.detail, steps));
}

/** Events, of one sandbox or of all. */
export function eventList(root, signal, of) {
  const past = new Map();
  let seen = 0;
  const { element, body } = table('Events', ['#No.', 'Time', 'What', 'Sandbox', 'More']);
  const none = h('p', { class: 'empty' }, 'Nothing has happened since this page was opened.');
  const before = button('Show what happened before', load);
  const state = h('p', { class: 'muted', role: 'status' });
  root.append(element, none, h('div', { class: 'buttons' }, before), state);
  const names = () => new Map(live.sandboxes.map((it) => [it.sandboxID, it.title]));

  function draw() {
    const all = new Map([...past, ...live.events.map((it) => [it.sequence, it])]);
    const wanted = [...all.values()].filter((it) => !of || it.sandboxID === of);
    const newest = wanted.sort((a, b) => b.sequence - a.sequence).slice(0, SHOWN);
    const known = names();
    body.replaceChildren(...newest.map((it) => line(it, known)));
    element.hidden = newest.length === 0;
    none.hidden = newest.length > 0;
  }

  async function load() {
    before.disabled = true;
    setText(state, 'Loading…');
    try {
      for await (const event of lines(await send('GET', '/events?since=0', { signal }))) {
        if (of && event.sandboxID !== of) continue;
        past.set(event.sequence, event);
        if (past.size > SHOWN) past.delete(past.keys().next().value);
      }
      before.remove();
      setText(state, '');
      draw();
      if (past.size === 0) setText(none, 'Nothing has happened yet.');
    } catch (error) {
      if (signal.aborted) return;
      setText(state, why(error));
      before.disabled = false;
    }
  }

  watch(() => {
    const newest = live.events.at(-1)?.sequence;
    if (newest === seen) return;
    seen = newest;
    draw();
  }, signal);
  load();
}

export function events(root, _, signal) {
  root.append(h('div', { class: 'bar' }, h('h1', {}, 'Events')));
  eventList(root, signal);
  return { title: 'Events' };
}
