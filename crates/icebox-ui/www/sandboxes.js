// All sandboxes.

import { part } from './api.js';
import { button, h, keyed, setText, table } from './dom.js';
import { ago, bytes, mib, plural } from './format.js';
import { live, watch } from './live.js';
import { buttons, create, stateOf, underWay } from './verbs.js';

const AGES_MS = 15000;

function line() {
  const name = h('a', {});
  const id = h('code', { class: 'muted' });
  const state = h('span', {});
  const template = h('td');
  const size = h('td', { class: 'number' });
  const allocated = h('td', { class: 'number' });
  const address = h('td', {});
  const age = h('td', { class: 'number' });
  const what = buttons(['pause', 'resume', 'start', 'fork', 'destroy']);
  const element = h('tr', {},
    h('th', { scope: 'row' }, name, ' ', id), h('td', {}, state), template, size, allocated, address, age,
    h('td', { class: 'actions' }, what.element));
  return {
    element,
    update(sandbox) {
      setText(name, sandbox.title);
      name.href = `#/sandboxes/${part(sandbox.sandboxID)}`;
      setText(id, sandbox.name ? sandbox.sandboxID : '');
      const [word, kind] = stateOf(sandbox);
      setText(state, word);
      state.className = `pill ${kind}`;
      setText(template, sandbox.alias ?? sandbox.templateID);
      setText(size, `${plural(sandbox.cpuCount, 'CPU')} · ${mib(sandbox.memoryMB)}`);
      setText(allocated, bytes(sandbox.allocatedBytes));
      setText(address, sandbox.address ?? '–');
      setText(age, ago(sandbox.startedAt));
      what.update(sandbox);
    },
  };
}

export function sandboxes(root, _, signal) {
  const count = h('p', { class: 'muted', role: 'status' });
  const search = h('input', { type: 'search', placeholder: 'Filter', 'aria-label': 'Filter sandboxes', oninput: () => update() });
  const { element, body } = table('Sandboxes', ['Name', 'State', 'Template', '#Size', '#Allocated', 'Address', '#Age', 'Actions']);
  const none = h('p', { class: 'empty' });
  const show = keyed(body, line);
  const open = (id) => { location.hash = `#/sandboxes/${part(id)}`; };
  const fresh = button('New sandbox', () => create(undefined, open), { class: 'primary' });
  root.append(
    h('div', { class: 'bar' }, h('h1', {}, 'Sandboxes'), count, search, fresh),
    element, none);

  function update() {
    const wanted = search.value.trim().toLowerCase();
    const matches = (it) => [it.title, it.sandboxID, it.alias, it.state, underWay(it), ...Object.entries(it.metadata ?? {}).flat()]
      .some((text) => text?.toLowerCase().includes(wanted));
    const found = live.sandboxes.filter(matches);
    show(found, (it) => it.sandboxID);
    const running = live.sandboxes.filter((it) => it.state === 'running').length;
    // What it can be made from is not known before.
    fresh.disabled = !live.loaded;
    setText(count, live.loaded ? `${live.sandboxes.length}, ${running} running` : '');
    element.hidden = found.length === 0;
    none.hidden = found.length > 0;
    setText(none, !live.loaded ? 'Loading…' : live.sandboxes.length ? 'None matches.' : 'No sandboxes yet.');
  }
  watch(update, signal);
  const ages = setInterval(update, AGES_MS);
  signal.addEventListener('abort', () => clearInterval(ages));
  return { title: 'Sandboxes' };
}
