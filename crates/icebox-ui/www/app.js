// The page: who is asking, where they are, and which view that is.

import { ask, session, why } from './api.js';
import { button, h, setChildren, setText } from './dom.js';
import { events } from './events.js';
import { lineage } from './lineage.js';
import { live, start, stop, watch } from './live.js';
import { sandbox } from './sandbox.js';
import { sandboxes } from './sandboxes.js';
import { templates } from './templates.js';

/** The first part of the address leads to a view: `view(root, rest, signal)` fills the root, and returns its title. */
const VIEWS = {
  sandboxes: { label: 'Sandboxes', show: (root, rest, signal) => (rest.length ? sandbox : sandboxes)(root, rest, signal) },
  templates: { label: 'Templates', show: templates },
  lineage: { label: 'Lineage', show: lineage },
  events: { label: 'Events', show: events },
};

const main = document.querySelector('#main');
const nav = document.querySelector('#nav');
const corner = document.querySelector('#session');
let shown;
let signedIn;

const where = () => location.hash.replace(/^#\/?/, '').split('/').filter(Boolean).map(decodeURIComponent);

/** Shows the view that the address names. */
function route() {
  if (!session.key) return;
  const [first, ...rest] = where();
  const view = Object.hasOwn(VIEWS, first ?? '') ? VIEWS[first] : undefined;
  if (!view) {
    location.replace('#/sandboxes');
    return;
  }
  // A part of a view that stays is the view's own to change.
  const place = `${first}/${rest[0] ?? ''}`;
  if (shown?.place === place && shown.moved) {
    shown.moved(rest);
    return;
  }
  const again = Boolean(shown);
  shown?.controller.abort();
  const controller = new AbortController();
  const root = h('section', { class: first });
  main.replaceChildren(root);
  shown = { place, controller };
  const { title, moved } = view.show(root, rest, controller.signal);
  shown.moved = moved;
  document.title = `${title} · Icebox`;
  for (const link of nav.children) {
    if (link.dataset.view === first) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  // Who comes by keyboard or by ear is where the news is.
  if (again) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function begin() {
  signedIn = new AbortController();
  start();
  nav.replaceChildren(...Object.entries(VIEWS).map(([name, { label }]) => h('a', { href: `#/${name}`, 'data-view': name }, label)));
  nav.hidden = false;
  corner.hidden = false;
  const state = h('span', { class: 'live', role: 'status' });
  const words = { connecting: 'Connecting…', live: 'Live', lost: 'Connection lost, trying again…' };
  setChildren(corner, [state, button('Sign out', () => session.end(), { class: 'quiet' })]);
  watch(() => {
    setText(state, words[live.state]);
    state.dataset.state = live.state;
  }, signedIn.signal);
  route();
}

function signIn() {
  signedIn?.abort();
  stop();
  shown?.controller.abort();
  shown = undefined;
  nav.hidden = true;
  corner.hidden = true;
  document.title = 'Sign in · Icebox';
  const key = h('input', {
    id: 'key', type: 'password', autocomplete: 'off', spellcheck: 'false', required: true, placeholder: 'e2b_…',
    'aria-describedby': 'key-hint',
  });
  const error = h('p', { class: 'error', role: 'alert' });
  const onsubmit = async (event) => {
    event.preventDefault();
    error.textContent = '';
    try {
      await ask('GET', '/v2/sandboxes?limit=1', undefined, { key: key.value.trim() });
    } catch (refused) {
      error.textContent = why(refused);
      key.select();
      return;
    }
    session.begin(key.value.trim());
    begin();
  };
  main.replaceChildren(h('form', { class: 'card sign-in', onsubmit },
    h('h1', {}, 'Sign in'),
    h('div', { class: 'field' }, h('label', { for: 'key' }, 'API key'), key,
      h('small', { id: 'key-hint' }, 'icebox key create makes one. It is kept until this tab is closed.')),
    error,
    h('div', { class: 'buttons' }, h('button', { type: 'submit', class: 'primary' }, 'Sign in'))));
  key.focus();
}

window.addEventListener('hashchange', route);
window.addEventListener('icebox:signed-out', signIn);
document.querySelector('.skip').addEventListener('click', (event) => {
  event.preventDefault();
  main.focus();
});
if (session.key) begin();
else signIn();
