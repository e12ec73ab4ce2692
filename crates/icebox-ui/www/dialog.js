// Questions, forms and short messages.

import { why } from './api.js';
import { button, h } from './dom.js';

const MESSAGE_MS = 6000;
/** More at once would hide what they are about. */
const MESSAGES_MAX = 3;
let ids = 0;

/** Says something for a moment; what went wrong, until it is dismissed. */
export function say(text, bad = false) {
  const message = h('div', { class: bad ? 'message bad' : 'message' }, h('span', {}, text));
  message.append(button('Dismiss', () => message.remove(), { class: 'quiet' }));
  const messages = document.querySelector('#messages');
  messages.append(message);
  while (messages.childElementCount > MESSAGES_MAX) (messages.querySelector('.message:not(.bad)') ?? messages.firstChild).remove();
  if (!bad) setTimeout(() => message.remove(), MESSAGE_MS);
}

/** Does something of which the user is told if it fails. Returns whether it did not. */
export async function attempt(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (error.name !== 'AbortError') say(why(error), true);
    return false;
  }
}

/**
 * A form in a dialog. `submit` gets the values; while it fails, the dialog stays and says why. Fields are
 * `{name, label, type?, value?, hint?, required?, options?, ...attributes}`.
 * Returns whether it was submitted.
 */
export function form({ title, text, fields = [], action, danger = false, submit }) {
  ids += 1;
  const id = `dialog-${ids}`;
  const error = h('p', { class: 'error', role: 'alert' });
  const go = h('button', { type: 'submit', class: danger ? 'danger' : 'primary' }, action);
  const inputs = fields.map((field) => [field, input(field, `${id}-${field.name}`)]);
  const rows = inputs.map(([field, element]) => row(field, element, `${id}-${field.name}`));
  return new Promise((resolve) => {
    const close = (done) => {
      dialog.close();
      dialog.remove();
      resolve(done);
    };
    const onsubmit = async (event) => {
      event.preventDefault();
      if (go.disabled) return;
      const values = Object.fromEntries(inputs.map(([field, element]) => [field.name, read(element)]));
      go.disabled = true;
      error.textContent = '';
      try {
        await submit(values);
        close(true);
      } catch (refused) {
        error.textContent = why(refused);
        go.disabled = false;
      }
    };
    const cancel = button('Cancel', () => close(false));
    const dialog = h('dialog', { 'aria-labelledby': id, oncancel: (event) => { event.preventDefault(); close(false); } },
      h('form', { novalidate: false, onsubmit },
        h('h2', { id }, title), text && h('p', {}, text), h('div', { class: 'fields' }, rows), error,
        h('div', { class: 'buttons' }, cancel, go)));
    document.body.append(dialog);
    dialog.showModal();
    (danger ? cancel : inputs[0]?.[1] ?? go).focus();
  });
}

function input(field, id) {
  const { label, hint, options, name, type, value, half, ...attributes } = field;
  const described = hint && `${id}-hint`;
  const common = { id, name, autocomplete: 'off', 'aria-describedby': described, ...attributes };
  if (options) {
    return h('select', common, options.map(([key, words]) => h('option', { value: key, selected: key === value }, words)));
  }
  if (type === 'lines') return h('textarea', { rows: 4, spellcheck: 'false', ...common, value: value ?? '' });
  if (type === 'checkbox') return h('input', { type, ...common, checked: Boolean(value) });
  return h('input', { type: type ?? 'text', spellcheck: 'false', ...common, value: value ?? '' });
}

function read(element) {
  if (element.type === 'checkbox') return element.checked;
  if (element.type === 'number') return element.value === '' ? undefined : Number(element.value);
  return element.value.trim();
}

function row(field, element, id) {
  const label = h('label', { for: id }, field.label);
  const hint = field.hint && h('small', { id: `${id}-hint` }, field.hint);
  const kind = field.type === 'checkbox' ? 'field check' : field.half ? 'field half' : 'field';
  return h('div', { class: kind }, field.type === 'checkbox' ? [element, label] : [label, element], hint);
}
