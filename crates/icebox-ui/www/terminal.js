// A terminal on a shell in a sandbox. A shell goes on while other views are shown, and is found again where it was; when the
// connection to it was cut, as by a pause, it is taken up with what was written meanwhile.

import { Refusal, why } from './api.js';
import { button, h, setChildren, setText } from './dom.js';
import { call, fromBase64, stream, toBase64 } from './envd.js';
import { Terminal } from './vt.js';

const SERVICE = 'process.Process';
const SCROLLBACK = 2000;
const SHELLS = ['/bin/bash', '/bin/sh'];
const VARIABLES = { TERM: 'xterm-256color', COLORTERM: 'truecolor', LANG: 'C.UTF-8', LC_ALL: 'C.UTF-8' };

/** The sequences of keys that are no letters. */
const KEYS = {
  Enter: '\r', Tab: '\t', Backspace: '\x7f', Escape: '\x1b', Delete: '\x1b[3~', Insert: '\x1b[2~', PageUp: '\x1b[5~', PageDown: '\x1b[6~',
  F1: '\x1bOP', F2: '\x1bOQ', F3: '\x1bOR', F4: '\x1bOS', F5: '\x1b[15~', F6: '\x1b[17~', F7: '\x1b[18~', F8: '\x1b[19~', F9: '\x1b[20~',
  F10: '\x1b[21~', F11: '\x1b[23~', F12: '\x1b[24~',
};
const CURSOR_KEYS = { ArrowUp: 'A', ArrowDown: 'B', ArrowRight: 'C', ArrowLeft: 'D', Home: 'H', End: 'F' };

const CONNECTING = 'Connecting…';

const encoder = new TextEncoder();
/** Sessions by sandbox. */
const sessions = new Map();

/** What a key sends. `undefined`: it is the browser's. */
function keySequence(event, modes) {
  const { key, ctrlKey: ctrl, altKey: alt, shiftKey: shift, metaKey: meta } = event;
  if (meta || event.isComposing) return undefined;
  // The way out, for who has no mouse.
  if (key === 'Tab' && shift) return undefined;
  if (key in CURSOR_KEYS) {
    const modifier = 1 + (shift ? 1 : 0) + (alt ? 2 : 0) + (ctrl ? 4 : 0);
    if (modifier > 1) return `\x1b[1;${modifier}${CURSOR_KEYS[key]}`;
    return `\x1b${modes.applicationKeys ? 'O' : '['}${CURSOR_KEYS[key]}`;
  }
  if (key in KEYS) return (alt ? '\x1b' : '') + (key === 'Backspace' && ctrl ? '\b' : KEYS[key]);
  if ([...key].length !== 1) return undefined;
  if (ctrl && shift) return undefined;
  if (ctrl) {
    // Pasting and copying what is selected are the browser's.
    if (key === 'v' || (key === 'c' && !getSelection().isCollapsed)) return undefined;
    const code = key === ' ' ? 64 : key.toUpperCase().charCodeAt(0);
    return code >= 63 && code < 96 ? (alt ? '\x1b' : '') + String.fromCharCode(code === 63 ? 127 : code & 31) : undefined;
  }
  return (alt ? '\x1b' : '') + key;
}

class Session {
  constructor(id) {
    this.id = id;
    this.received = 0;
    this.input = [];
    this.listeners = new Set();
    this.history = h('div', { class: 'lines' });
    this.screen = h('div', { class: 'lines' });
    this.gone = [];
    this.elements = new WeakMap();
    this.vt = new Terminal(80, 24, {
      reply: (text) => this.send(text),
      scrolled: (line) => this.gone.push(line),
    });
    this.note = CONNECTING;
    this.open = false;
    this.begin();
  }

  say(note, open) {
    this.note = note;
    this.open = open;
    for (const listener of this.listeners) listener();
  }

  async begin() {
    for (const cmd of SHELLS) {
      const size = { cols: this.vt.columns, rows: this.vt.rows };
      const args = cmd.endsWith('bash') ? ['-i', '-l'] : ['-i'];
      const request = { process: { cmd, args, envs: VARIABLES }, pty: { size } };
      // A system that has no bash may have another shell.
      if (!(await this.follow('Start', request, cmd !== SHELLS.at(-1)))) return;
    }
  }

  /** Goes on with the shell, or with a new one if it is gone. */
  async again() {
    this.say(CONNECTING, false);
    if (this.pid === undefined || this.ended) {
      this.restart();
      return;
    }
    const request = { process: { pid: this.pid }, outputFrom: String(this.received) };
    if (await this.follow('Connect', request, true)) this.restart();
  }

  restart() {
    this.say(CONNECTING, false);
    this.vt.write(encoder.encode('\r\n'));
    this.received = 0;
    this.ended = false;
    this.pid = undefined;
    this.begin();
  }

  /** Returns whether there is no such program or process, where that is `excused`. */
  async follow(method, request, excused) {
    try {
      for await (const { event } of stream(this.id, `${SERVICE}/${method}`, request)) {
        if (event.start) {
          this.pid = event.start.pid;
          this.say('', true);
          if (!this.sending) this.flush();
          this.resize(this.vt.columns, this.vt.rows, true);
        } else if (event.data?.pty) {
          const bytes = fromBase64(event.data.pty);
          this.received += bytes.length;
          this.vt.write(bytes);
          this.draw();
        } else if (event.end) {
          this.ended = true;
          this.say(`The shell has ended: ${event.end.status ?? 'exit status 0'}.`, false);
        }
      }
    } catch (error) {
      if (excused && error instanceof Refusal && error.status === 0) return true;
      this.say(why(error), false);
    }
    return false;
  }

  /** Sends what was typed, in order. What comes while something is on its way, or the shell still begins, goes together. */
  send(text) {
    if (!this.open && this.note !== CONNECTING) return;
    this.input.push(text);
    if (this.open && !this.sending) this.flush();
  }

  async flush() {
    this.sending = true;
    try {
      while (this.input.length) {
        const pty = toBase64(encoder.encode(this.input.splice(0).join('')));
        await call(this.id, `${SERVICE}/SendInput`, { process: { pid: this.pid }, input: { pty } });
      }
    } catch (error) {
      this.input = [];
      this.say(why(error), false);
    } finally {
      this.sending = false;
    }
  }

  resize(columns, rows, always = false) {
    if (!always && columns === this.vt.columns && rows === this.vt.rows) return;
    if (columns !== this.vt.columns || rows !== this.vt.rows) this.vt.resize(columns, rows);
    this.draw();
    if (!this.open) return;
    const size = { cols: this.vt.columns, rows: this.vt.rows };
    // A size that is not taken is seen, and corrected by the next one.
    call(this.id, `${SERVICE}/Update`, { process: { pid: this.pid }, pty: { size } }).catch(() => {});
  }

  draw() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = undefined;
      const view = this.history.parentElement;
      const atEnd = !view || view.scrollTop + view.clientHeight >= view.scrollHeight - 8;
      for (const line of this.gone.splice(0)) {
        if (line) this.history.append(this.row(line, -1));
        else this.history.replaceChildren();
      }
      while (this.history.childElementCount > SCROLLBACK) this.history.firstChild.remove();
      const { at, modes } = this.vt;
      setChildren(this.screen, this.vt.lines.map((line, y) => this.row(line, y === at.y && modes.cursor ? at.x : -1)));
      if (view && atEnd) view.scrollTop = view.scrollHeight;
      for (const listener of this.listeners) listener();
    });
  }

  /** The element of a line, drawn anew if it has changed. */
  row(line, cursor) {
    let element = this.elements.get(line);
    if (element && !line.changed && cursor < 0) return element;
    if (!element) {
      element = h('div', {});
      this.elements.set(line, element);
    }
    // The next look takes the cursor away from where it is no more.
    line.changed = cursor >= 0;
    const runs = [];
    line.cells.forEach((cell, x) => {
      const before = runs.at(-1);
      if (before && before.style === cell.style && x !== cursor && before.end !== cursor) {
        before.text += cell.text;
        before.end = x;
      } else runs.push({ style: cell.style, text: cell.text, end: x, cursor: x === cursor });
    });
    element.replaceChildren(...runs.map(span));
    return element;
  }
}

function span({ style, text, cursor }) {
  const names = ['bold', 'dim', 'italic', 'under', 'strike'].filter((name) => style[name]);
  let { fg, bg } = style;
  if (style.inverse) [fg, bg] = [bg ?? 'page', fg ?? 'text'];
  const element = h('span', {});
  for (const [name, colour] of [['fg', fg], ['bg', bg]]) {
    if (typeof colour === 'number' || colour === 'page' || colour === 'text') names.push(`${name}-${colour}`);
    else if (colour) element.style[name === 'fg' ? 'color' : 'backgroundColor'] = colour;
  }
  if (cursor) names.push('cursor');
  if (names.length) element.className = names.join(' ');
  element.textContent = text;
  return element;
}

export function terminal(root, { sandboxID: id, title, state }, signal) {
  if (state !== 'running') {
    root.append(h('p', { class: 'empty' }, `A terminal can be had while ${title} runs.`));
    return;
  }
  if (!sessions.has(id)) sessions.set(id, new Session(id));
  const session = sessions.get(id);
  const input = h('textarea', { class: 'typed', 'aria-label': `Terminal of ${title}`, autocomplete: 'off', autocapitalize: 'off', spellcheck: 'false', rows: 1 });
  const ruler = h('span', { class: 'ruler', 'aria-hidden': 'true' }, 'M'.repeat(20));
  const view = h('div', { class: 'tty' }, session.history, session.screen, ruler, input);
  const note = h('p', { class: 'muted', role: 'status' });
  const again = button('Connect again', () => {
    session.again();
    input.focus();
  });
  root.append(view, h('div', { class: 'bar' }, note, again, h('small', {}, 'Shift and Tab leave the terminal.')));

  const type = (text) => {
    view.scrollTop = view.scrollHeight;
    session.send(text);
  };
  input.addEventListener('keydown', (event) => {
    const sequence = keySequence(event, session.vt.modes);
    if (sequence === undefined) return;
    event.preventDefault();
    type(sequence);
  });
  // What comes by other ways than keys: composed letters, and keyboards that are drawn.
  input.addEventListener('input', (event) => {
    if (event.isComposing) return;
    if (input.value) type(input.value);
    input.value = '';
  });
  input.addEventListener('compositionend', () => {
    if (input.value) type(input.value);
    input.value = '';
  });
  input.addEventListener('paste', (event) => {
    event.preventDefault();
    const text = event.clipboardData.getData('text').replace(/\r?\n/g, '\r').replaceAll('\x1b', '');
    type(session.vt.modes.bracketedPaste ? `\x1b[200~${text}\x1b[201~` : text);
  });
  view.addEventListener('mouseup', () => { if (getSelection().isCollapsed) input.focus({ preventScroll: true }); });

  const fit = () => {
    const cell = { width: ruler.getBoundingClientRect().width / 20, height: ruler.getBoundingClientRect().height };
    if (!cell.width || !view.clientHeight) return;
    const style = getComputedStyle(view);
    const inside = (size, ...edges) => size - edges.reduce((sum, edge) => sum + Number.parseFloat(style[edge]), 0);
    session.resize(Math.floor(inside(view.clientWidth, 'paddingLeft', 'paddingRight') / cell.width),
      Math.floor(inside(view.clientHeight, 'paddingTop', 'paddingBottom') / cell.height));
  };
  const observer = new ResizeObserver(fit);
  observer.observe(view);
  const update = () => {
    setText(note, session.note || (session.vt.title ? session.vt.title : ''));
    again.hidden = session.open || session.note === CONNECTING;
  };
  session.listeners.add(update);
  signal.addEventListener('abort', () => {
    observer.disconnect();
    session.listeners.delete(update);
  });
  update();
  fit();
  session.draw();
  // A shell that was cut off is gone on with when somebody looks.
  if (!session.open && session.note !== CONNECTING) session.again();
  input.focus({ preventScroll: true });
}

/** Shells end with the page that they belong to, as they do when a window is closed. */
function hangUp() {
  for (const { id, pid, open } of sessions.values()) {
    // Nobody is there any more who could be told of a failure.
    if (open) call(id, `${SERVICE}/SendSignal`, { process: { pid }, signal: 'SIGNAL_SIGHUP' }, { keepalive: true }).catch(() => {});
  }
  sessions.clear();
}
window.addEventListener('pagehide', hangUp);
window.addEventListener('icebox:signing-out', hangUp);
