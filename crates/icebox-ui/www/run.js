// One command in a sandbox, with all that it says and how it ended.

import { why } from './api.js';
import { button, h, setText } from './dom.js';
import { call, fromBase64, stream } from './envd.js';
import { micros } from './format.js';

/** What is kept of an output on the page. */
const SHOWN = 500000;

export function run(root, { sandboxID: id, title, state }, signal) {
  if (state !== 'running') {
    root.append(h('p', { class: 'empty' }, `Commands can be run while ${title} runs.`));
    return;
  }
  const command = h('input', { 'aria-label': 'Command', spellcheck: 'false', autocomplete: 'off', required: true, placeholder: 'uname -a' });
  const go = h('button', { type: 'submit', class: 'primary' }, 'Run');
  const end = button('End it', () => call(id, 'process.Process/SendSignal', { process: { pid }, signal: 'SIGNAL_SIGKILL' }).catch(() => {}), { hidden: true });
  const state_ = h('p', { class: 'muted', role: 'status' });
  const output = h('pre', { class: 'card text output', tabindex: '0', 'aria-label': 'Output' });
  let pid;

  function append(kind, text) {
    const atEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 4;
    if (output.lastChild?.className === kind) output.lastChild.append(text);
    else output.append(h('span', { class: kind }, text));
    while (output.textContent.length > SHOWN && output.childNodes.length > 1) output.firstChild.remove();
    if (atEnd) output.scrollTop = output.scrollHeight;
  }

  async function onsubmit(event) {
    event.preventDefault();
    if (go.disabled) return;
    go.disabled = true;
    output.replaceChildren();
    setText(state_, 'Running…');
    const begun = performance.now();
    const decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
    const request = { process: { cmd: '/bin/bash', args: ['-l', '-c', command.value] }, stdin: false };
    try {
      for await (const { event: it } of stream(id, 'process.Process/Start', request, { signal })) {
        if (it.start) {
          pid = it.start.pid;
          end.hidden = false;
        }
        for (const kind of ['stdout', 'stderr']) {
          if (it.data?.[kind]) append(kind, decoders[kind].decode(fromBase64(it.data[kind]), { stream: true }));
        }
        if (it.end) {
          const how = it.end.exited ? `exit status ${it.end.exitCode ?? 0}` : it.end.status;
          setText(state_, `Ended after ${micros(Math.round((performance.now() - begun) * 1000))}: ${how}`);
        }
      }
    } catch (error) {
      if (!signal.aborted) setText(state_, why(error));
    }
    end.hidden = true;
    go.disabled = false;
    command.select();
  }
  root.append(h('form', { class: 'bar run', onsubmit }, command, go, end), output, state_);
  command.focus();
}
