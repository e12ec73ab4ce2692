// Templates, and builds of them with what they say meanwhile.

import { Refusal, ask, lines, part, send, why } from './api.js';
import { form, say } from './dialog.js';
import { button, h, keyed, setText, table } from './dom.js';
import { ago, bytes, clock, mib, plural } from './format.js';
import { live, refresh, watch } from './live.js';
import { create } from './verbs.js';

const LINES_KEPT = 2000;
const POLL_MS = 500;

/** Builds that this page has begun, newest first. They go on while other views are shown. */
const builds = [];
const followers = new Set();
const changed = () => { for (const follower of followers) follower(); };

function begin(name, work) {
  const build = { name, state: 'building', lines: [], progress: '', at: new Date().toISOString(), id: builds.length };
  const log = (text) => {
    build.lines.push(text);
    if (build.lines.length > LINES_KEPT) build.lines.shift();
    changed();
  };
  builds.unshift(build);
  work(build, log).then(() => {
    build.state = 'ready';
  }, (error) => {
    build.state = 'error';
    log(why(error));
  }).finally(() => {
    build.progress = '';
    changed();
    refresh();
  });
  changed();
}

/** A build from packages: its answer is its log. Whoever leaves the page ends it. */
async function fromPackages(request, build, log) {
  const headers = { 'Content-Type': 'application/json' };
  const answer = await send('POST', '/builds', { body: JSON.stringify(request), headers });
  for await (const event of lines(answer)) {
    if (event.event === 'stage') log(`── ${event.name}`);
    else if (event.event === 'message') log(event.text);
    else if (event.event === 'error') throw new Refusal(event.error.code, event.error);
    else if (event.event === 'done') return;
    else if (event.event === 'progress') {
      const count = event.bytes ? bytes(event.done) : String(event.done);
      build.progress = event.total ? `${Math.floor((100 * event.done) / event.total)} %` : count;
      changed();
    }
  }
  throw new Error('the build ended without saying how');
}

/** A build by steps. It goes on by itself, whoever looks. */
async function bySteps({ name, what }, build, log) {
  const { templateID, buildID } = await ask('POST', '/v3/templates', { name });
  const path = `/templates/${part(templateID)}/builds/${part(buildID)}`;
  await ask('POST', `/v2${path}`, what);
  for (let offset = 0; ;) {
    const status = await ask('GET', `${path}/status?logsOffset=${offset}`);
    offset += status.logEntries.length;
    for (const entry of status.logEntries) log(entry.message);
    if (status.status === 'ready' && status.logEntries.length === 0) return;
    if (status.status === 'error' && status.logEntries.length === 0) throw new Error(status.reason?.message ?? 'it failed');
    if (status.logEntries.length === 0) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

const NAME = { name: 'name', label: 'Name', required: true, maxlength: 63 };
const START = { name: 'start', label: 'Start command', hint: 'Runs in every sandbox that is made from it. May be left empty.' };
const READY = { name: 'ready', label: 'Ready command', hint: 'Succeeds once that is ready.' };

const buildFromPackages = () => form({
  title: 'Build from packages',
  fields: [
    NAME,
    { name: 'suite', label: 'Debian', options: [['bookworm', '12, bookworm'], ['trixie', '13, trixie']] },
    { name: 'include', label: 'Packages', hint: 'Beside the essential ones, with spaces between them.' },
    { name: 'cpus', label: 'CPUs', type: 'number', min: 1, half: true }, { name: 'memory', label: 'Memory, MiB', type: 'number', min: 64, half: true },
    { name: 'disk', label: 'Disk, MiB', type: 'number', min: 64, half: true },
    START, READY,
  ],
  action: 'Build',
  submit: async ({ name, suite, include, cpus, memory, disk, start, ready }) => begin(name, (build, log) => fromPackages({
    name,
    source: { debian: { suite, include: include.split(/\s+/).filter(Boolean) } },
    cpuCount: cpus, memoryMB: memory, diskSizeMB: disk, startCmd: start || undefined, readyCmd: ready || undefined,
  }, build, log)),
});

/** A line is a step: what begins with none of their words is run. */
function step(line) {
  const [, kind, rest] = line.match(/^(RUN|ENV|WORKDIR|USER)\s+(.*)$/) ?? [undefined, 'RUN', line];
  const equals = rest.indexOf('=');
  const args = kind === 'ENV' && equals > 0 ? [rest.slice(0, equals), rest.slice(equals + 1)] : [rest];
  return { type: kind, args };
}

const buildBySteps = () => form({
  title: 'Build on a template',
  fields: [
    NAME,
    { name: 'from', label: 'Begins as', options: live.templates.map((it) => [it.templateID, it.names[0] ?? it.templateID]) },
    { name: 'steps', label: 'Steps', type: 'lines', hint: 'A command a line, run in order; or ENV name=value, WORKDIR path, USER name.', rows: 5 },
    START, READY,
  ],
  action: 'Build',
  submit: async ({ name, from, steps, start, ready }) => begin(name, (build, log) => bySteps({
    name,
    what: {
      fromTemplate: from, steps: steps.split('\n').map((it) => it.trim()).filter(Boolean).map(step),
      startCmd: start || undefined, readyCmd: ready || undefined,
    },
  }, build, log)),
});

const remove = (template, title) => form({
  title: `Remove ${title}?`,
  text: 'What sandboxes need of it stays until they are gone.',
  action: 'Remove',
  danger: true,
  submit: async () => {
    await ask('DELETE', `/templates/${part(template.templateID)}`);
    say(`${title} is removed.`);
    refresh();
  },
});

function line() {
  const cells = Array.from({ length: 6 }, (_, index) => h('td', { class: index ? 'number' : undefined }));
  const name = h('b', {});
  const more = h('small', {});
  const actions = h('div', { class: 'buttons' });
  let before;
  return {
    element: h('tr', {}, h('th', { scope: 'row' }, name, ' ', more), cells, h('td', { class: 'actions' }, actions)),
    update(it) {
      const title = it.names[0] ?? it.templateID;
      setText(name, title);
      setText(more, [it.public && 'public', ...it.names.slice(1), it.unusable].filter(Boolean).join(', '));
      const size = `${plural(it.cpuCount, 'CPU')} · ${mib(it.memoryMB)}`;
      const texts = [it.kind, size, mib(it.diskSizeMB), bytes(it.allocatedBytes), bytes(it.sharedBytes), ago(it.createdAt)];
      texts.slice(1).forEach((text, index) => setText(cells[index + 1], text));
      if (before === it.kind + title) return;
      before = it.kind + title;
      cells[0].replaceChildren(h('span', { class: `pill ${it.kind}` }, it.kind));
      const open = (id) => { location.hash = `#/sandboxes/${part(id)}`; };
      actions.replaceChildren(
        button('Create sandbox', () => create(it.templateID, open), { 'aria-label': `Create a sandbox from ${title}`, disabled: Boolean(it.unusable) }),
        button('Remove', () => remove(it, title), { class: 'danger-quiet', 'aria-label': `Remove ${title}` }));
    },
  };
}

function progress() {
  const name = h('b', {});
  const state = h('span', {});
  const said = h('span', { class: 'muted' });
  const log = h('pre', { class: 'text log', tabindex: '0' });
  let shown = 0;
  return {
    element: h('article', { class: 'card build' }, h('div', { class: 'bar' }, name, state, said), log),
    update(build) {
      setText(name, build.name);
      setText(state, build.state);
      state.className = `pill ${build.state === 'building' ? 'busy' : build.state}`;
      setText(said, [clock(build.at), build.progress].filter(Boolean).join(' · '));
      log.setAttribute('aria-label', `Log of the build of ${build.name}`);
      if (shown === build.lines.length && shown < LINES_KEPT) return;
      shown = build.lines.length;
      const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
      setText(log, build.lines.join('\n'));
      if (atEnd) log.scrollTop = log.scrollHeight;
    },
  };
}

export function templates(root, _, signal) {
  const { element, body } = table('Templates', ['Name', 'Kind', '#Size', '#Disk', '#Allocated', '#Shared', '#Age', 'Actions']);
  const none = h('p', { class: 'empty' });
  const begun = h('div', { class: 'builds' });
  const heading = h('h2', {}, 'Builds');
  const show = keyed(body, line);
  const showBuilds = keyed(begun, progress);
  const onTemplate = button('Build on a template', buildBySteps);
  root.append(
    h('div', { class: 'bar' }, h('h1', {}, 'Templates'), h('p', { class: 'muted' }, 'What sandboxes are made from.'),
      onTemplate, button('Build from packages', buildFromPackages, { class: 'primary' })),
    element, none, heading, begun);
  watch(() => {
    show(live.templates, (it) => it.templateID);
    element.hidden = live.templates.length === 0;
    none.hidden = live.templates.length > 0;
    // Which there are is not known before.
    onTemplate.disabled = !live.loaded;
    setText(none, live.loaded ? 'No templates yet.' : 'Loading…');
  }, signal);
  const follower = () => {
    heading.hidden = builds.length === 0;
    showBuilds(builds, (it) => it.id);
  };
  followers.add(follower);
  signal.addEventListener('abort', () => followers.delete(follower));
  follower();
  return { title: 'Templates' };
}
