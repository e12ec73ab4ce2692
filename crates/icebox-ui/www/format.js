// Numbers and times as people read them.

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

/** A size. What is not known is a dash. */
export function bytes(count) {
  if (count === undefined || count === null) return '–';
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

/** A size in MiB. */
export const mib = (count) => bytes(count * 1024 * 1024);

/** A span, in seconds, with its largest unit. */
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h`;
  return `${Math.floor(whole / 86400)} d`;
}

/** How long ago a moment was. */
export const ago = (moment) => (moment ? span((Date.now() - Date.parse(moment)) / 1000) : '–');

/** A moment, in this browser's time zone. */
export function clock(moment) {
  const at = new Date(moment);
  const today = at.toDateString() === new Date().toDateString();
  const time = at.toLocaleTimeString(undefined, { hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' });
  return today ? time : `${at.toLocaleDateString()} ${time}`;
}

/** Microseconds. */
export const micros = (count) => (count < 1000 ? `${count} µs` : count < 1e6 ? `${(count / 1000).toFixed(1)} ms` : `${(count / 1e6).toFixed(2)} s`);

/** One of something, or several. */
export const plural = (count, word, words = `${word}s`) => `${count} ${count === 1 ? word : words}`;

/** An id, short enough for a table. */
export const short = (id) => (id.length > 12 ? `${id.slice(0, 10)}…` : id);
