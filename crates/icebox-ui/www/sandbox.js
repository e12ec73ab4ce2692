// One sandbox: what it is, what it uses, and everything that can be done with it.

import { inspect, part, send, why } from './api.js';
import { charts } from './chart.js';
import { h, setText } from './dom.js';
import { eventList } from './events.js';
import { files } from './files.js';
import { ago, bytes, clock, micros, mib, plural } from './format.js';
import { history } from './history.js';
import { live, watch } from './live.js';
import { run } from './run.js';
import { terminal } from './terminal.js';
import { at, buttons, stateOf } from './verbs.js';

/** Parts of the view: `show(root, sandbox, signal)`, and whether a part is shown anew when the sandbox's state changes. */
const PARTS = {
  overview: { label: 'Overview', show: overview },
  terminal: { label: 'Terminal', show: terminal, again: true },
  run: { label: 'Run', show: run, again: true },
  files: { label: 'Files', show: files, again: true },
  history: { label: 'History', show: history },
  events: { label: 'Events', show: (root, sandbox, signal) => eventList(root, signal, sandbox.sandboxID) },
  console: { label: 'Console', show: console_ },
};

export function sandbox(root, [id, first], signal) {
  const heading = h('h1', {});
  const state = h('span', {});
  const verbs = buttons();
  const facts = h('p', { class: 'muted' });
  const trouble = h('p', { class: 'error', role: 'alert' });
  const tabs = h('nav', { class: 'tabs', 'aria-label': 'Parts of this sandbox' });
  const place = h('div', { class: 'part' });
  root.append(h('div', { class: 'bar' }, heading, state, verbs.element), facts, trouble, tabs, place);
  tabs.append(...Object.entries(PARTS).map(([name, { label }]) => h('a', { href: `#/sandboxes/${part(id)}/${name}`, 'data-part': name }, label)));

  let known;
  let shownPart;
  let wanted = first;

  function show() {
    if (!known) return;
    const name = Object.hasOwn(PARTS, wanted ?? '') ? wanted : 'overview';
    const { again } = PARTS[name];
    const now = `${name} ${again ? known.state === 'running' : ''}`;
    if (shownPart?.now === now) return;
    shownPart?.controller.abort();
    const controller = new AbortController();
    shownPart = { now, controller };
    for (const tab of tabs.children) {
      if (tab.dataset.part === name) tab.setAttribute('aria-current', 'page');
      else tab.removeAttribute('aria-current');
    }
    place.replaceChildren();
    place.className = `part ${name}`;
    PARTS[name].show(place, known, controller.signal);
  }

  watch(() => {
    const found = live.sandboxes.find((it) => it.sandboxID === id);
    if (found) known = found;
    const gone = live.loaded && !found;
    if (!known) {
      setText(heading, gone ? 'No such sandbox' : 'Loading…');
      setText(facts, gone ? id : '');
      tabs.hidden = true;
      return;
    }
    tabs.hidden = false;
    setText(heading, known.title);
    const [word, kind] = gone ? ['gone', 'stopped'] : stateOf(known);
    setText(state, word);
    state.className = `pill ${kind}`;
    verbs.element.hidden = gone;
    verbs.update(known);
    const ends = known.endAt ? `ends ${clock(known.endAt)}` : undefined;
    setText(facts, [known.sandboxID, `from ${known.alias ?? known.templateID}`, plural(known.cpuCount, 'CPU'), mib(known.memoryMB),
      `disk ${mib(known.diskSizeMB)}`, known.address, `${ago(known.startedAt)} old`, ends].filter(Boolean).join(' · '));
    setText(trouble, known.broken ?? known.stalled ?? known.unanswering ?? known.diskLost ?? '');
    document.title = `${known.title} · Icebox`;
    // What is seen of it stays, and is asked for no more.
    if (gone) shownPart?.controller.abort();
    else show();
  }, signal);
  signal.addEventListener('abort', () => shownPart?.controller.abort());
  return {
    title: known?.title ?? 'Sandbox',
    moved([, next]) {
      wanted = next;
      show();
    },
  };
}

function overview(root, sandbox, signal) {
  const id = sandbox.sandboxID;
  const facts = h('dl', { class: 'card facts' });
  const occupied = h('div', { class: 'card' });
  const verb = h('div', { class: 'card' });
  root.append(charts(sandbox, signal), h('div', { class: 'columns' }, facts, occupied, verb));
  let seen;

  async function look() {
    let it;
    try {
      it = await inspect(id, { signal });
    } catch {
      // It is gone, or the daemon is: the view says so.
      return;
    }
    const rows = [
      ['Id', it.sandboxID], ['Team', it.team], ['Template', it.alias ?? it.templateID], ['Created', clock(it.startedAt)],
      ['Ends', it.endAt ? `${clock(it.endAt)}, then ${it.lifecycle?.onTimeout ?? 'kill'}` : 'not by itself'],
      ['Idle', it.lifecycle?.idleTimeout && `${it.lifecycle.onTimeout} after ${it.lifecycle.idleTimeout} s without use`],
      ['Runs on', it.vmm && `${it.vmm.name} ${it.vmm.version}, ${it.vmm.accelerator}`], ['Why', it.vmm?.acceleratorReason],
      ['Volumes', it.volumeDriver], ['Internet', it.allowInternetAccess ? 'public addresses' : 'nothing'],
      ['Limits', it.limits], ['Last exit', it.lastExit],
      ...Object.entries(it.metadata ?? {}).map(([name, value]) => [`Label ${name}`, value]),
    ];
    facts.replaceChildren(h('dt', { class: 'title' }, h('h2', {}, 'What it is')), ...rows.filter(([, value]) => value)
      .flatMap(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]));
    occupied.replaceChildren(h('h2', {}, 'What it occupies'),
      h('p', {}, h('b', {}, bytes(it.allocatedBytes)), ' of its own, ', h('b', {}, bytes(it.sharedBytes)), ' shared with others.'),
      h('ul', { class: 'rows' }, (it.parts ?? []).map((object) => h('li', {},
        h('span', {}, object.object, object.sharedWith?.length ? h('small', {}, `also ${object.sharedWith.join(', ')}`) : undefined),
        h('b', {}, bytes(object.allocatedBytes))))));
    const last = it.lastVerb;
    verb.hidden = !last;
    if (last) {
      verb.replaceChildren(...h('div', {}, h('h2', {}, 'What was done last'),
        h('p', {}, `${last.verb}, ${clock(last.beganAt)}, ${micros(last.micros)}`), last.error && h('p', { class: 'error' }, last.error),
        h('ul', { class: 'rows' }, (last.steps ?? []).map((step) => h('li', {}, h('span', {}, step.step), h('b', {}, micros(step.micros)))))).childNodes);
    }
  }
  watch(() => {
    const now = JSON.stringify(live.sandboxes.find((it) => it.sandboxID === id));
    if (now === undefined || now === seen) return;
    seen = now;
    look();
  }, signal);
}

/** What the guest wrote to its console. The end of it, if it is long. */
function console_(root, { sandboxID: id }, signal) {
  const KEPT = 200000;
  const text = h('pre', { class: 'card text', tabindex: '0', 'aria-label': 'Console' }, 'Loading…');
  root.append(text);
  send('GET', at(id, '/console'), { signal })
    .then((answer) => answer.text())
    .then((all) => {
      setText(text, all.slice(-KEPT) || 'The guest has written nothing.');
      text.scrollTop = text.scrollHeight;
    })
    .catch((error) => { if (!signal.aborted) setText(text, why(error)); });
}
