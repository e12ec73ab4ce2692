// A sandbox's past: every point that it can go back to.

import { ask, part, why } from './api.js';
import { form, say } from './dialog.js';
import { button, h, setText, table } from './dom.js';
import { bytes, clock } from './format.js';
import { during, live, watch } from './live.js';
import { at } from './verbs.js';

const back = (sandbox, to, title) => form({
  title: `Go back to ${title}?`,
  text: `${sandbox.title} becomes what it was then. Its newest disk is kept, as a branch.`,
  fields: [{ name: 'resume', label: 'Go on from there at once', type: 'checkbox', value: true }],
  action: 'Go back',
  submit: async ({ resume }) => {
    await during(sandbox.sandboxID, 'rollback', () => ask('POST', at(sandbox.sandboxID, '/rollback'), { to, resume }));
    say(`${sandbox.title} is back at ${title}.`);
  },
});

const forget = (sandbox, point, title) => form({
  title: `Forget ${title}?`,
  text: 'It cannot be gone back to any more. What others need of it stays.',
  action: 'Forget',
  danger: true,
  submit: async () => {
    await during(sandbox.sandboxID, 'forget', () => ask('DELETE', at(sandbox.sandboxID, `/history/${part(point)}`)));
    say(`${title} is forgotten.`);
  },
});

function line(sandbox, { point, title, madeBy, when, after, memory, disk, current, unusable }) {
  return h('tr', {},
    h('th', { scope: 'row' }, h('b', {}, title), ' ', current && h('span', { class: 'pill paused' }, 'here'), unusable && h('small', {}, unusable)),
    h('td', {}, madeBy), h('td', {}, when && h('time', { datetime: when }, clock(when))),
    h('td', {}, after === undefined ? '–' : `generation ${after}`), h('td', { class: 'number' }, bytes(memory)), h('td', { class: 'number' }, bytes(disk)),
    h('td', { class: 'actions' }, h('div', { class: 'buttons' },
      button('Go back', () => back(sandbox, point, title), { 'aria-label': `Go back to ${title}`, disabled: Boolean(unusable) }),
      button('Forget', () => forget(sandbox, point, title), { class: 'danger-quiet', 'aria-label': `Forget ${title}` }))));
}

export function history(root, sandbox, signal) {
  const { element, body } = table('History', ['Point', 'Made by', 'When', 'Goes on from', '#Memory', '#Disk', 'Actions']);
  const now = h('p', { class: 'muted', role: 'status' });
  const none = h('p', { class: 'empty' }, 'Nothing to go back to yet: a pause or a saved point makes one.');
  root.append(now, element, none);
  let seen;
  let asked = 0;
  let drawn;

  async function look() {
    asked += 1;
    const turn = asked;
    let past;
    try {
      past = await ask('GET', at(sandbox.sandboxID, '/history'), undefined, { signal });
    } catch (error) {
      if (!signal.aborted && turn === asked) setText(now, why(error));
      return;
    }
    if (turn !== asked) return;
    const points = [
      ...past.generations.map((it) => ({
        point: String(it.number), title: `generation ${it.number}`, madeBy: it.madeBy ?? '–', when: it.createdAt, after: it.after,
        memory: it.memoryBytes, disk: it.diskBytes, current: it.current, unusable: it.unusable,
      })),
      ...past.branches.map((it) => ({
        point: it.name, title: it.name, madeBy: 'set aside', when: it.createdAt, after: it.after, disk: it.diskBytes,
      })),
    ].sort((a, b) => String(b.when).localeCompare(String(a.when)));
    // A button that is replaced while it is pressed does nothing.
    const text = JSON.stringify(points);
    if (text !== drawn) body.replaceChildren(...points.map((it) => line(sandbox, it)));
    drawn = text;
    element.hidden = points.length === 0;
    none.hidden = points.length > 0;
    const { state, after, diskBytes } = past.now;
    const since = after === undefined ? 'from the beginning' : `on from generation ${after}`;
    setText(now, `Now ${state}, ${since}${diskBytes === undefined ? '' : `; ${bytes(diskBytes)} written to its disk since then`}.`);
  }
  watch((event) => {
    const state = JSON.stringify(live.sandboxes.find((it) => it.sandboxID === sandbox.sandboxID));
    if (state === seen && event?.sandboxID !== sandbox.sandboxID) return;
    seen = state;
    look();
  }, signal);
}
