// The files in a sandbox: look, fetch, put, make, move, remove.

import { why } from './api.js';
import { attempt, form, say } from './dialog.js';
import { button, h, setText, table } from './dom.js';
import { call, download, upload } from './envd.js';
import { bytes, clock, plural } from './format.js';

const SERVICE = 'filesystem.Filesystem';
const DIRECTORY = 'FILE_TYPE_DIRECTORY';

const join = (directory, name) => (directory === '/' ? `/${name}` : `${directory}/${name}`);

export function files(root, { sandboxID: id, title, state }, signal) {
  if (state !== 'running') {
    root.append(h('p', { class: 'empty' }, `Files can be seen while ${title} runs.`));
    return;
  }
  let here = '/';
  let asked = 0;
  let typed = false;
  const ask = (method, message) => call(id, `${SERVICE}/${method}`, message, { signal });
  const where = h('input', { id: 'where', 'aria-label': 'Directory', spellcheck: 'false', autocomplete: 'off' });
  where.addEventListener('input', () => { typed = true; });
  const chosen = h('input', { type: 'file', multiple: true, class: 'hidden', tabindex: '-1', 'aria-label': 'Files to upload' });
  const state_ = h('p', { class: 'muted', role: 'status' });
  const crumbs = h('nav', { class: 'crumbs', 'aria-label': 'Directories above' });
  const { element, body } = table('Files', ['Name', '#Size', 'Permissions', 'Owner', 'Changed', 'Actions']);
  const jobs = h('ul', { class: 'rows' });
  const go = h('form', { class: 'go', onsubmit: (event) => { event.preventDefault(); open(where.value.trim() || '/'); } }, where, h('button', { type: 'submit' }, 'Go'));
  root.append(
    h('div', { class: 'bar' }, crumbs, go, button('New directory', makeDirectory), button('Upload', () => chosen.click(), { class: 'primary' }), chosen),
    element, jobs, state_);

  async function open(path) {
    asked += 1;
    const turn = asked;
    typed = false;
    setText(state_, 'Loading…');
    try {
      const { entries = [] } = await ask('ListDir', { path, depth: 1 });
      // Somebody has gone elsewhere meanwhile.
      if (turn !== asked) return;
      here = path.length > 1 ? path.replace(/\/+$/, '') : path;
      // Who is in the field is about to type there, and who has typed is about to go there: neither is overwritten.
      if (!typed && document.activeElement !== where) where.value = here;
      show(entries);
    } catch (error) {
      if (!signal.aborted && turn === asked) setText(state_, why(error));
    }
  }
  const again = () => open(here);

  function show(entries) {
    const names = here.split('/').filter(Boolean);
    const steps = names.map((name, index) => [name, `/${names.slice(0, index + 1).join('/')}`]);
    crumbs.replaceChildren(...[['/', '/'], ...steps].map(([name, path]) => button(name, () => open(path), { class: 'quiet' })));
    const isDirectory = (it) => it.type === DIRECTORY;
    const sorted = entries.sort((a, b) => isDirectory(b) - isDirectory(a) || a.name.localeCompare(b.name));
    body.replaceChildren(...sorted.map((it) => line(it, isDirectory(it))));
    setText(state_, plural(entries.length, 'entry', 'entries'));
  }

  function line(it, directory) {
    const path = join(here, it.name);
    const name = directory
      ? button(`${it.name}/`, () => open(path), { class: 'link directory' })
      : h('span', { class: 'file' }, it.name);
    return h('tr', {},
      h('th', { scope: 'row' }, name, it.symlinkTarget && h('small', {}, ` → ${it.symlinkTarget}`)),
      h('td', { class: 'number' }, directory ? '–' : bytes(Number(it.size ?? 0))),
      h('td', {}, h('code', {}, it.permissions)), h('td', {}, it.owner), h('td', {}, it.modifiedTime ? h('time', { datetime: it.modifiedTime }, clock(it.modifiedTime)) : '–'),
      h('td', { class: 'actions' }, h('div', { class: 'buttons' },
        !directory && button('Download', () => fetchFile(path, it.name), { 'aria-label': `Download ${it.name}` }),
        button('Move', () => move(path, it.name), { 'aria-label': `Move ${it.name}` }),
        button('Remove', () => remove(path, it.name, directory), { class: 'danger-quiet', 'aria-label': `Remove ${it.name}` }))));
  }

  const fetchFile = (path, name) => attempt(async () => {
    setText(state_, `Downloading ${name}…`);
    const url = URL.createObjectURL(await download(id, path, { signal }));
    h('a', { href: url, download: name }).click();
    setText(state_, `${name} is downloaded.`);
    // The browser has taken hold of it by then.
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  });

  function makeDirectory() {
    form({
      title: 'New directory',
      text: `In ${here}`,
      fields: [{ name: 'name', label: 'Name', required: true }],
      action: 'Make',
      submit: async ({ name }) => {
        await ask('MakeDir', { path: join(here, name) });
        await again();
      },
    });
  }

  function move(path, name) {
    form({
      title: `Move ${name}`,
      fields: [{ name: 'destination', label: 'To', value: path, required: true }],
      action: 'Move',
      submit: async ({ destination }) => {
        await ask('Move', { source: path, destination });
        await again();
      },
    });
  }

  function remove(path, name, directory) {
    form({
      title: `Remove ${name}?`,
      text: directory ? 'With everything in it.' : path,
      action: 'Remove',
      danger: true,
      submit: async () => {
        await ask('Remove', { path });
        await again();
      },
    });
  }

  async function put(list) {
    const into = here;
    for (const file of list) {
      const meter = h('progress', { max: 1, value: 0, 'aria-label': `Uploading ${file.name}` });
      const job = h('li', {}, h('span', {}, file.name), meter);
      jobs.append(job);
      await attempt(async () => {
        await upload(id, join(into, file.name), file, (done, all) => { meter.value = all ? done / all : 1; });
        say(`${file.name} is uploaded.`);
      });
      job.remove();
    }
    if (!signal.aborted) again();
  }
  chosen.addEventListener('change', () => {
    put([...chosen.files]);
    chosen.value = '';
  });
  root.addEventListener('dragover', (event) => event.preventDefault(), { signal });
  root.addEventListener('drop', (event) => {
    event.preventDefault();
    put([...event.dataTransfer.files]);
  }, { signal });

  // Where commands begin.
  ask('Stat', { path: '.' }).then(({ entry }) => entry.path, () => '/').then((home) => {
    if (asked === 0 && where.value === '' && !signal.aborted) open(home);
  });
}
