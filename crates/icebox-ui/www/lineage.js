// The family of everything: templates, the sandboxes that were made from them, their snapshots and forks, and what each of them
// alone occupies.

import { part } from './api.js';
import { h, s, setText } from './dom.js';
import { bytes, plural } from './format.js';
import { live, watch } from './live.js';
import { stateOf } from './verbs.js';

const BOX = { width: 224, height: 50 };
const STEP = { x: BOX.width + 64, y: BOX.height + 14 };
const TITLE_CHARS = 22;

/** What the engine notes of a fork. */
const FORKED_FROM = 'icebox.forked-from';

/** Everything, with what it came from. What is gone but has descendants is there, too. */
function family() {
  const nodes = new Map();
  const add = (node) => nodes.set(node.id, { children: [], ...node });
  for (const it of live.templates) {
    const title = it.names[0] ?? it.templateID;
    add({
      id: it.templateID, parent: it.sandboxID, title, kind: it.kind, word: it.kind, size: it.allocatedBytes, at: it.createdAt,
      href: '#/templates', label: `${it.kind} template ${title}`,
    });
  }
  for (const it of live.sandboxes) {
    const [word, kind] = stateOf(it);
    add({
      id: it.sandboxID, parent: it.metadata?.[FORKED_FROM] ?? it.templateID, template: it.templateID, title: it.title, kind, word, size: it.allocatedBytes,
      at: it.startedAt, href: `#/sandboxes/${part(it.sandboxID)}`, label: `sandbox ${it.title}`,
      how: it.metadata?.[FORKED_FROM] ? 'fork of' : 'from',
    });
  }
  for (const it of [...nodes.values()]) {
    if (it.parent && !nodes.has(it.parent)) {
      add({ id: it.parent, parent: it.template === it.parent ? undefined : it.template, title: it.parent, kind: 'gone', word: 'gone', at: it.at, label: it.parent });
    }
  }
  const roots = [];
  for (const it of [...nodes.values()].sort((a, b) => String(a.at).localeCompare(String(b.at)))) {
    const parent = nodes.get(it.parent);
    if (parent) parent.children.push(it);
    else roots.push(it);
  }
  return roots;
}

/** Gives everyone a place: generations are columns, and parents stand in the middle of their children. */
function place(roots) {
  const all = [];
  let row = 0;
  const put = (node, depth) => {
    node.x = depth * STEP.x;
    all.push(node);
    for (const child of node.children) put(child, depth + 1);
    if (node.children.length) node.y = (node.children[0].y + node.children.at(-1).y) / 2;
    else {
      node.y = row * STEP.y;
      row += 1;
    }
  };
  for (const root of roots) put(root, 0);
  return all;
}

function edge(from, to) {
  const [x1, y1, x2, y2] = [from.x + BOX.width, from.y + BOX.height / 2, to.x, to.y + BOX.height / 2];
  const half = (x1 + x2) / 2;
  return s('path', { class: to.how === 'fork of' ? 'edge fork' : 'edge', d: `M${x1} ${y1}C${half} ${y1} ${half} ${y2} ${x2} ${y2}` });
}

function box(node, largest, parent) {
  const title = node.title.length > TITLE_CHARS ? `${node.title.slice(0, TITLE_CHARS - 1)}…` : node.title;
  const share = node.size && largest ? Math.max(2, (node.size / largest) * (BOX.width - 24)) : 0;
  const size = node.size === undefined ? '' : ` · ${bytes(node.size)}`;
  const label = `${node.label}, ${node.word}${size}${parent ? `, ${node.how ?? 'of'} ${parent.title}` : ''}`;
  const drawn = s('g', { class: `node ${node.kind}`, transform: `translate(${node.x} ${node.y})` },
    s('title', {}, label),
    s('rect', { class: 'box', width: BOX.width, height: BOX.height, rx: 7 }),
    s('circle', { class: 'dot', cx: 16, cy: 17, r: 4.5 }),
    s('text', { class: 'name', x: 28, y: 21 }, title),
    s('text', { class: 'more', x: 28, y: 37 }, `${node.word}${size}`),
    share ? s('rect', { class: 'share', x: 12, y: BOX.height - 6, width: share, height: 3, rx: 1.5 }) : undefined);
  return node.href ? s('a', { href: node.href, 'aria-label': label }, drawn) : drawn;
}

export function lineage(root, _, signal) {
  const count = h('p', { class: 'muted', role: 'status' });
  const picture = h('div', { class: 'card tree', tabindex: '0', role: 'region', 'aria-label': 'Picture of the lineage' });
  const none = h('p', { class: 'empty' }, 'Nothing there yet.');
  const keys = [['image', 'image template'], ['snapshot', 'snapshot template'], ['running', 'running'], ['paused', 'paused'], ['stopped', 'stopped'], ['gone', 'gone']];
  root.append(
    h('div', { class: 'bar' }, h('h1', {}, 'Lineage'), count,
      h('ul', { class: 'keys', 'aria-label': 'Colours' }, keys.map(([kind, words]) => h('li', { class: kind }, words)), h('li', { class: 'forked' }, 'fork'))),
    picture, none);
  let seen;
  watch(() => {
    const roots = family();
    const now = JSON.stringify(roots);
    if (now === seen) return;
    seen = now;
    const all = place(roots);
    const width = Math.max(0, ...all.map((it) => it.x)) + BOX.width + 4;
    const height = Math.max(0, ...all.map((it) => it.y)) + BOX.height + 4;
    const largest = Math.max(0, ...all.map((it) => it.size ?? 0));
    const parents = new Map(all.flatMap((it) => it.children.map((child) => [child.id, it])));
    const focused = document.activeElement?.getAttribute('aria-label');
    picture.replaceChildren(s('svg', { width, height, viewBox: `-2 -2 ${width} ${height}`, role: 'group', 'aria-label': 'Lineage' },
      all.flatMap((it) => it.children.map((child) => edge(it, child))), all.map((it) => box(it, largest, parents.get(it.id)))));
    for (const link of picture.querySelectorAll('a')) if (link.getAttribute('aria-label') === focused) link.focus();
    picture.hidden = all.length === 0;
    none.hidden = all.length > 0 || !live.loaded;
    const own = all.reduce((sum, it) => sum + (it.size ?? 0), 0);
    setText(count, live.loaded ? `${plural(live.templates.length, 'template')}, ${plural(live.sandboxes.length, 'sandbox', 'sandboxes')}; ${bytes(own)} that each needs alone` : '');
  }, signal);
  return { title: 'Lineage' };
}
