// What a sandbox uses, as lines. The drawing is scaled to its place; words are beside it, so that they are not.

import { ask, part } from './api.js';
import { h, s, setText } from './dom.js';
import { bytes } from './format.js';

const WIDTH = 600;
const HEIGHT = 120;
/** How often it is looked while somebody looks: samples are a second apart. */
const EVERY_MS = 2000;

/** A sandbox that is younger than the span is shown from its beginning on, but not less than this. */
const LEAST_SECONDS = 60;

/** Spans of time, in seconds, with the resolution that is kept for so long. */
const SPANS = [[600, '1s', '10 min'], [7200, '10s', '2 h'], [172800, '60s', '2 d']];

const rate = (value) => `${bytes(value)}/s`;
const percent = (value) => `${value.toFixed(value < 10 ? 1 : 0)} %`;

const CHARTS = [
  { title: 'CPU', format: percent, least: () => 100, lines: [['of all CPUs', (it) => it.cpuUsedPct]] },
  { title: 'Memory', format: bytes, least: (it) => it.memTotal, lines: [['on the host', (it) => it.memUsed]] },
  { title: 'Disk', format: rate, least: () => 65536, lines: [['read', (it) => it.diskReadRate], ['written', (it) => it.diskWriteRate]] },
  { title: 'Network', format: rate, least: () => 65536, lines: [['in', (it) => it.networkInRate], ['out', (it) => it.networkOutRate]] },
];

/** Points of one line; a hole in the samples is a hole in the line. */
function path(samples, value, begin, seconds, top, gap) {
  let before;
  return samples.map((it) => {
    const x = ((it.timestampUnix - begin) / seconds) * WIDTH;
    const y = HEIGHT - (Math.min(value(it), top) / top) * (HEIGHT - 2) - 1;
    const joins = before !== undefined && it.timestampUnix - before <= gap;
    before = it.timestampUnix;
    return `${joins ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`;
  }).join('');
}

function chart({ title, format, least, lines }) {
  const drawn = lines.map((_, index) => s('path', { class: `line-${index}` }));
  const grid = [0.25, 0.5, 0.75].map((y) => s('line', { x1: 0, x2: WIDTH, y1: y * HEIGHT, y2: y * HEIGHT, class: 'grid' }));
  const picture = s('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img' }, grid, drawn);
  const keys = lines.map(([name], index) => h('span', { class: `key key-${index}` }, name));
  const now = lines.map(() => h('b', {}));
  const most = h('span', { class: 'most' });
  const element = h('figure', { class: 'card chart' },
    h('figcaption', {}, h('h3', {}, title), keys.map((key, index) => h('span', {}, key, ' ', now[index]))), h('div', { class: 'plot' }, picture, most));
  return {
    element,
    update(samples, begin, seconds, gap) {
      const newest = samples.at(-1);
      const top = Math.max(newest ? least(newest) : 1, ...samples.flatMap((it) => lines.map(([, value]) => value(it))));
      lines.forEach(([, value], index) => {
        drawn[index].setAttribute('d', path(samples, value, begin, seconds, top, gap));
        setText(now[index], newest ? format(value(newest)) : '–');
      });
      setText(most, newest ? format(top) : '');
      const said = lines.map(([name], index) => `${name} ${now[index].textContent}`).join(', ');
      picture.setAttribute('aria-label', `${title}: ${said}`);
    },
  };
}

/** Charts of a sandbox, drawn anew while they are seen. */
export function charts({ sandboxID: id, startedAt }, signal) {
  let span = SPANS[0];
  const all = CHARTS.map(chart);
  const from = h('span', { class: 'muted' });
  const choices = SPANS.map((it) => h('button', {
    type: 'button', 'aria-pressed': String(it === span), onclick: () => {
      span = it;
      choices.forEach((choice, index) => choice.setAttribute('aria-pressed', String(SPANS[index] === it)));
      draw();
    },
  }, it[2]));
  const element = h('div', {},
    h('div', { class: 'bar' }, h('h2', {}, 'Use'), from, h('div', { class: 'choices', role: 'group', 'aria-label': 'Span of time' }, choices)),
    h('div', { class: 'charts' }, all.map((it) => it.element)));

  async function draw() {
    const [longest, resolution] = span;
    const end = Math.floor(Date.now() / 1000);
    const age = end - Math.floor(Date.parse(startedAt) / 1000);
    const seconds = Math.min(longest, Math.max(age, LEAST_SECONDS));
    const query = `start=${end - seconds}&resolution=${resolution}`;
    try {
      const samples = await ask('GET', `/sandboxes/${part(id)}/metrics?${query}`, undefined, { signal });
      const gap = Number.parseInt(resolution, 10) * 3;
      all.forEach((it) => it.update(samples, end - seconds, seconds, gap));
      setText(from, samples.length ? '' : 'no samples in this time');
    } catch {
      // The next look says more; the state of the connection is shown elsewhere.
      setText(from, 'not known now');
    }
  }
  const timer = setInterval(() => { if (!document.hidden && element.isConnected) draw(); }, EVERY_MS);
  signal.addEventListener('abort', () => clearInterval(timer));
  draw();
  return element;
}
