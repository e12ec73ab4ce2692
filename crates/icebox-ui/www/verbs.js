// What can be done with a sandbox, and how it is asked for.

import { ask, part } from './api.js';
import { attempt, form, say } from './dialog.js';
import { button, h } from './dom.js';
import { clock, plural } from './format.js';
import { during, live } from './live.js';

const DOING = {
  create: 'creating', pause: 'pausing', resume: 'resuming', stop: 'stopping', start: 'starting', snapshot: 'snapshotting',
  fork: 'forking', checkpoint: 'saving a point', rollback: 'rolling back', flatten: 'flattening', destroy: 'destroying',
  forget: 'forgetting', timeout: 'changing',
};

/** The verb under way, whoever asked for it. */
export const underWay = (sandbox) => live.pending.get(sandbox.sandboxID) ?? sandbox.verb;

/** Where a sandbox is, in a word, and the class that colours it. */
export function stateOf(sandbox) {
  const verb = underWay(sandbox);
  if (verb) return [DOING[verb] ?? verb, 'busy'];
  if (sandbox.stalled) return ['stalled', 'broken'];
  if (sandbox.unanswering) return ['not answering', 'broken'];
  return [sandbox.state, sandbox.state];
}

/** A coloured word for it. */
export function pill(sandbox) {
  const [word, kind] = stateOf(sandbox);
  return h('span', { class: `pill ${kind}` }, word);
}

/** The path of a sandbox, or of something of it. */
export const at = (id, rest = '') => `/sandboxes/${part(id)}${rest}`;

const REPRESENTATION = { headers: { Prefer: 'return=representation' } };

function plain(verb, label, from) {
  return {
    verb, label, from,
    run: (sandbox) => attempt(async () => {
      const path = at(sandbox.sandboxID, verb === 'checkpoint' ? '/checkpoints' : `/${verb}`);
      const answer = await during(sandbox.sandboxID, verb, () => ask('POST', path, {}, REPRESENTATION));
      if (answer?.hint) say(answer.hint);
      if (verb === 'checkpoint') say(`A point to go back to was saved in ${sandbox.title}.`);
    }),
  };
}

const snapshot = {
  verb: 'snapshot', label: 'Snapshot', from: ['running', 'paused'],
  run: (sandbox) => form({
    title: `Snapshot ${sandbox.title}`,
    text: 'A template is made of it as it is this instant, memory included. The sandbox goes on.',
    fields: [{ name: 'name', label: 'Name', hint: 'Of the new template. Left empty, one is made up.', maxlength: 63 }],
    action: 'Snapshot',
    submit: async ({ name }) => {
      const body = name ? { name } : {};
      const made = await during(sandbox.sandboxID, 'snapshot', () => ask('POST', at(sandbox.sandboxID, '/snapshots'), body));
      say(`${name || made.names[0]} is a template now.`);
    },
  }),
};

const fork = {
  verb: 'fork', label: 'Fork', from: ['running', 'paused'],
  run: (sandbox) => form({
    title: `Fork ${sandbox.title}`,
    text: 'Sandboxes are made that go on from this instant, each by itself. They share what none of them changes.',
    fields: [{ name: 'count', label: 'How many', type: 'number', value: 1, min: 1, max: 100, required: true }],
    action: 'Fork',
    submit: async ({ count }) => {
      const forks = await during(sandbox.sandboxID, 'fork', () => ask('POST', at(sandbox.sandboxID, '/fork'), { count }, REPRESENTATION));
      const failed = forks.find((it) => it.error);
      if (failed) throw new Error(`${plural(forks.filter((it) => it.sandbox).length, 'fork')} made; then: ${failed.error.message}`);
      say(`${plural(forks.length, 'fork')} of ${sandbox.title} made.`);
    },
  }),
};

const flatten = {
  verb: 'flatten', label: 'Flatten', from: ['running', 'paused', 'stopped'],
  run: (sandbox) => form({
    title: `Flatten ${sandbox.title}`,
    text: 'An image template is made of its disk, which needs nothing else. Sandboxes boot from it.',
    fields: [{ name: 'name', label: 'Name', required: true, maxlength: 63 }],
    action: 'Flatten',
    submit: async ({ name }) => {
      await during(sandbox.sandboxID, 'flatten', () => ask('POST', at(sandbox.sandboxID, '/flatten'), { name }));
      say(`${name} is a template now.`);
    },
  }),
};

/** A few sizes of time for sandboxes that end by themselves. */
const ENDS = [
  ['never', 'Never'], ['idle:600', 'Paused after 10 min without use'], ['idle:3600', 'Paused after 1 h without use'],
  ['kill:600', 'Destroyed after 10 min'], ['kill:3600', 'Destroyed after 1 h'], ['kill:86400', 'Destroyed after 1 d'],
];

function lifetime(choice) {
  const [kind, seconds] = choice.split(':');
  if (kind === 'idle') return { timeout: 'never', idleTimeout: Number(seconds), onTimeout: 'pause', autoResume: { enabled: true } };
  if (kind === 'kill') return { timeout: Number(seconds), onTimeout: 'kill' };
  return { timeout: 'never' };
}

const limit = {
  verb: 'timeout', label: 'Time limit', from: ['running', 'paused', 'stopped'],
  run: (sandbox) => form({
    title: `When ${sandbox.title} ends`,
    text: sandbox.endAt ? `It ends at ${clock(sandbox.endAt)} as it is now. A new limit begins now.` : 'A limit begins now.',
    fields: [{ name: 'ends', label: 'Ends by itself', options: ENDS, value: 'never' }],
    action: 'Set',
    submit: async ({ ends }) => {
      const change = { idleTimeout: 'never', ...lifetime(ends) };
      await during(sandbox.sandboxID, 'timeout', () => ask('POST', at(sandbox.sandboxID, '/timeout'), change));
      say(`The time limit of ${sandbox.title} is changed.`);
    },
  }),
};

const destroy = {
  verb: 'destroy', label: 'Destroy', from: ['running', 'paused', 'stopped', 'broken'], danger: true,
  run: (sandbox) => form({
    title: `Destroy ${sandbox.title}?`,
    text: 'Its disk, its memory and its whole history are removed. Snapshots and forks of it stay.',
    action: 'Destroy',
    danger: true,
    submit: async () => {
      await during(sandbox.sandboxID, 'destroy', () => ask('DELETE', at(sandbox.sandboxID)));
      say(`${sandbox.title} is gone.`);
    },
  }),
};

const ALL = [
  plain('pause', 'Pause', ['running']),
  plain('resume', 'Resume', ['paused']),
  plain('start', 'Start', ['stopped']),
  plain('stop', 'Stop', ['running', 'paused']),
  plain('checkpoint', 'Save point', ['running']),
  snapshot, fork, flatten, limit, destroy,
];

/**
 * Buttons for what can be done now. They are made anew only when that changes, and whoever had the focus on one keeps it.
 */
export function buttons(only) {
  const verbs = only ? ALL.filter((it) => only.includes(it.verb)) : ALL;
  const element = h('div', { class: 'buttons', role: 'group' });
  let before;
  return {
    element,
    update(sandbox) {
      const busy = Boolean(underWay(sandbox));
      const possible = verbs.filter((it) => it.from.includes(sandbox.state));
      const now = `${sandbox.title} ${busy} ${possible.map((it) => it.verb)}`;
      if (now === before) return;
      before = now;
      const focused = element.contains(document.activeElement);
      element.setAttribute('aria-label', `What can be done with ${sandbox.title}`);
      element.replaceChildren(...possible.map((it) => button(it.label, () => it.run(sandbox), {
        class: it.danger ? 'danger-quiet' : undefined,
        disabled: busy && it.verb !== 'destroy',
        'aria-label': only && `${it.label} ${sandbox.title}`,
      })));
      if (focused) element.querySelector('button:not([disabled])')?.focus();
    },
  };
}

function labels(text) {
  const pairs = text.split('\n').map((line) => line.trim()).filter(Boolean);
  return Object.fromEntries(pairs.map((pair) => {
    const equals = pair.indexOf('=');
    if (equals < 1) throw new Error(`“${pair}” is no name=value`);
    return [pair.slice(0, equals), pair.slice(equals + 1)];
  }));
}

/** Asks for what is needed, and creates a sandbox. `then` gets its id. */
export function create(template, then) {
  const names = live.templates.filter((it) => !it.unusable).map((it) => [it.templateID, `${it.names[0] ?? it.templateID} (${it.kind})`]);
  if (names.length === 0) {
    say('There is no template yet: build one first.', true);
    return undefined;
  }
  const chosen = names.find(([id]) => id === template) ?? names.find(([, words]) => words.startsWith('base ')) ?? names[0];
  return form({
    title: 'New sandbox',
    fields: [
      { name: 'template', label: 'Template', options: names, value: chosen[0] },
      { name: 'name', label: 'Name', hint: 'May be left empty.', maxlength: 63 },
      { name: 'cpus', label: 'CPUs', type: 'number', min: 1, max: 64, half: true, placeholder: 'the template’s' },
      { name: 'memory', label: 'Memory, MiB', type: 'number', min: 64, step: 1, half: true, placeholder: 'the template’s' },
      { name: 'ends', label: 'Ends by itself', options: ENDS, value: 'never' },
      { name: 'internet', label: 'Reaches the internet', type: 'checkbox' },
      { name: 'variables', label: 'Environment', type: 'lines', hint: 'One name=value a line, for all that runs in it.', rows: 2 },
      { name: 'labels', label: 'Labels', type: 'lines', hint: 'One name=value a line, to find it by.', rows: 2 },
    ],
    action: 'Create',
    submit: async (values) => {
      const made = await ask('POST', '/sandboxes', {
        templateID: values.template,
        name: values.name || undefined,
        cpuCount: values.cpus,
        memoryMB: values.memory,
        allow_internet_access: values.internet,
        envVars: labels(values.variables),
        metadata: labels(values.labels),
        ...lifetime(values.ends),
      });
      say(`${made.name ?? made.sandboxID} runs.`);
      then?.(made.sandboxID);
    },
  });
}
