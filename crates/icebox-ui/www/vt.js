// What a terminal shows, from what programs write to it: the part of ECMA-48 and of xterm's own sequences that shells, editors
// and pagers use. Nothing here knows of pages; what it gets comes from a guest, and nothing it gets can do more than
// change letters and colours.

const MAX_COLUMNS = 500;
const MAX_PARAMETERS = 32;
/** A sequence that is longer is none. */
const MAX_STRING = 4096;

const PLAIN = Object.freeze({ fg: undefined, bg: undefined, bold: false, dim: false, italic: false, under: false, inverse: false, strike: false });

/** Letters as which DEC's line drawing set has these. */
const LINES = { j: '┘', k: '┐', l: '┌', m: '└', n: '┼', q: '─', t: '├', u: '┤', v: '┴', w: '┬', x: '│', a: '▒', '`': '◆', f: '°', g: '±', '~': '·', o: '⎺', s: '⎽', 0: '█' };

/** How many cells a character takes. */
function widthOf(code) {
  if (code < 0x300) return 1;
  if ((code >= 0x300 && code <= 0x36f) || (code >= 0x200b && code <= 0x200f) || (code >= 0xfe00 && code <= 0xfe0f) || (code >= 0x20d0 && code <= 0x20ff)) return 0;
  const wide = (code >= 0x1100 && code <= 0x115f) || (code >= 0x2e80 && code <= 0xa4cf) || (code >= 0xac00 && code <= 0xd7a3)
    || (code >= 0xf900 && code <= 0xfaff) || (code >= 0xfe30 && code <= 0xfe6f) || (code >= 0xff00 && code <= 0xff60)
    || (code >= 0x1f300 && code <= 0x1faff) || (code >= 0x20000 && code <= 0x3fffd);
  return wide ? 2 : 1;
}

/** A row of cells. `changed` says that it has to be drawn. */
class Line {
  constructor(columns, style = PLAIN) {
    this.cells = Array.from({ length: columns }, () => ({ text: ' ', style }));
    this.changed = true;
  }

  fit(columns) {
    while (this.cells.length < columns) this.cells.push({ text: ' ', style: PLAIN });
    this.cells.length = columns;
    this.changed = true;
  }
}

export class Terminal {
  /** `reply` gets what the terminal answers by itself; `scrolled` gets lines that leave at the top. */
  constructor(columns, rows, { reply, scrolled }) {
    Object.assign(this, { columns, rows, reply, scrolled });
    this.decoder = new TextDecoder();
    this.reset();
  }

  reset() {
    this.lines = this.blank();
    this.other = undefined;
    this.style = PLAIN;
    this.at = { x: 0, y: 0, wrap: false };
    this.saved = undefined;
    this.top = 0;
    this.bottom = this.rows - 1;
    this.modes = { cursor: true, wrap: true, applicationKeys: false, bracketedPaste: false, insert: false, origin: false };
    this.charsets = ['B', 'B'];
    this.charset = 0;
    this.tabs = undefined;
    this.state = 'ground';
    this.title = '';
    this.last = ' ';
  }

  blank() {
    return Array.from({ length: this.rows }, () => new Line(this.columns));
  }

  resize(columns, rows) {
    const [wide, high] = [Math.min(Math.max(2, columns), MAX_COLUMNS), Math.max(2, rows)];
    const fit = (lines, keep) => {
      while (lines.length > high) {
        // Empty rows below the cursor go before written ones above it.
        if (keep && this.at.y >= high) {
          this.scrolled(lines.shift());
          this.at.y -= 1;
        } else lines.pop();
      }
      for (const line of lines) line.fit(wide);
      while (lines.length < high) lines.push(new Line(wide));
    };
    this.columns = wide;
    this.rows = high;
    fit(this.lines, !this.other);
    if (this.other) fit(this.other.lines, false);
    this.top = 0;
    this.bottom = high - 1;
    this.move(this.at.x, this.at.y);
  }

  write(bytes) {
    for (const character of this.decoder.decode(bytes, { stream: true })) this.take(character);
  }

  take(character) {
    const code = character.codePointAt(0);
    if (this.state === 'string') {
      this.inString(character, code);
    } else if (code === 0x1b) {
      this.state = 'escape';
      this.between = '';
    } else if (code < 0x20) {
      this.control(code);
    } else if (this.state === 'ground') {
      if (code !== 0x7f) this.print(character, code);
    } else if (this.state === 'escape') {
      this.escape(character);
    } else if (this.state === 'csi') {
      this.csi(character, code);
    }
  }

  /** Titles and the like: read to their end. */
  inString(character, code) {
    const ends = code === 0x07 || (this.text.endsWith('\x1b') && character === '\\');
    if (ends || code === 0x18 || this.text.length > MAX_STRING) {
      const [, title] = this.text.replace(/\x1b$/, '').match(/^[02];(.*)$/s) ?? [];
      if (ends && this.kind === ']' && title !== undefined) this.title = title;
      this.state = 'ground';
    } else this.text += character;
  }

  control(code) {
    if (code === 0x08) this.move(this.at.x - 1, this.at.y);
    else if (code === 0x09) this.tab(1);
    else if (code === 0x0a || code === 0x0b || code === 0x0c) this.feed();
    else if (code === 0x0d) this.move(0, this.at.y);
    else if (code === 0x0e) this.charset = 1;
    else if (code === 0x0f) this.charset = 0;
    else if (code === 0x18 || code === 0x1a) this.state = 'ground';
  }

  escape(character) {
    this.state = 'ground';
    if (this.between) {
      if (this.between === '(') this.charsets[0] = character;
      else if (this.between === ')') this.charsets[1] = character;
      else if (this.between === '#' && character === '8') this.lines.forEach((line) => { line.fit(0); line.fit(this.columns); line.cells.forEach((cell) => { cell.text = 'E'; }); });
      return;
    }
    if (character === '[') {
      this.state = 'csi';
      this.parameters = '';
    } else if (']P^_X'.includes(character)) {
      this.state = 'string';
      this.kind = character;
      this.text = '';
    } else if ('()*+#% '.includes(character)) {
      this.state = 'escape';
      this.between = character;
    } else if (character === '7') this.save();
    else if (character === '8') this.restore();
    else if (character === 'D') this.feed();
    else if (character === 'E') {
      this.feed();
      this.move(0, this.at.y);
    } else if (character === 'M') {
      if (this.at.y === this.top) this.scroll(this.top, -1);
      else this.move(this.at.x, this.at.y - 1);
    } else if (character === 'c') this.reset();
  }

  csi(character, code) {
    if (code < 0x40) {
      this.parameters += character;
      if (this.parameters.length > MAX_STRING) this.state = 'ground';
      return;
    }
    this.state = 'ground';
    const [, mark, list, between] = this.parameters.match(/^([<-?]?)([\d;:]*)(.*)$/s);
    const numbers = list.split(/[;:]/).slice(0, MAX_PARAMETERS).map((it) => (it === '' ? undefined : Math.min(Number(it), 65535)));
    if (mark === '?') this.modesOf(character, numbers);
    else if (!mark && between === '!' && character === 'p') this.softReset();
    else if (!mark && !between) this.order(character, numbers);
    else if (mark === '>' && character === 'c') this.reply('\x1b[>0;0;0c');
  }

  order(character, numbers) {
    const n = Math.max(1, numbers[0] ?? 1);
    const { at } = this;
    switch (character) {
      case '@': this.insertCells(n); break;
      case 'A': this.move(at.x, Math.max(at.y - n, at.y >= this.top ? this.top : 0)); break;
      case 'B': case 'e': this.move(at.x, Math.min(at.y + n, at.y <= this.bottom ? this.bottom : this.rows - 1)); break;
      case 'C': case 'a': this.move(at.x + n, at.y); break;
      case 'D': this.move(at.x - n, at.y); break;
      case 'E': this.move(0, at.y + n); break;
      case 'F': this.move(0, at.y - n); break;
      case 'G': case '`': this.move(n - 1, at.y); break;
      case 'H': case 'f': this.move((numbers[1] || 1) - 1, n - 1 + (this.modes.origin ? this.top : 0)); break;
      case 'I': this.tab(n); break;
      case 'J': this.eraseScreen(numbers[0] ?? 0); break;
      case 'K': this.eraseLine(numbers[0] ?? 0); break;
      case 'L': if (at.y >= this.top && at.y <= this.bottom) this.scroll(at.y, -n); break;
      case 'M': if (at.y >= this.top && at.y <= this.bottom) this.scroll(at.y, n, false); break;
      case 'P': this.deleteCells(n); break;
      case 'S': this.scroll(this.top, n); break;
      case 'T': this.scroll(this.top, -n); break;
      case 'X': this.clear(at.y, at.x, at.x + n); break;
      case 'Z': this.move(Math.max(0, (Math.ceil(at.x / 8) - n) * 8), at.y); break;
      case 'b': for (let i = 0; i < Math.min(n, this.columns); i += 1) this.print(this.last, this.last.codePointAt(0)); break;
      case 'c': this.reply('\x1b[?1;2c'); break;
      case 'd': this.move(at.x, n - 1); break;
      case 'h': case 'l': if (numbers[0] === 4) this.modes.insert = character === 'h'; break;
      case 'm': this.colours(numbers); break;
      case 'n':
        if (numbers[0] === 5) this.reply('\x1b[0n');
        else if (numbers[0] === 6) this.reply(`\x1b[${at.y + 1};${at.x + 1}R`);
        break;
      case 'r': {
        const [top, bottom] = [(numbers[0] || 1) - 1, Math.min(numbers[1] || this.rows, this.rows) - 1];
        if (top < bottom) {
          Object.assign(this, { top, bottom });
          this.move(0, this.modes.origin ? top : 0);
        }
        break;
      }
      case 's': this.save(); break;
      case 'u': this.restore(); break;
      default:
    }
  }

  modesOf(character, numbers) {
    if (character !== 'h' && character !== 'l') return;
    const on = character === 'h';
    for (const number of numbers) {
      if (number === 1) this.modes.applicationKeys = on;
      else if (number === 6) this.modes.origin = on;
      else if (number === 7) this.modes.wrap = on;
      else if (number === 25) {
        this.modes.cursor = on;
        this.touch();
      } else if (number === 2004) this.modes.bracketedPaste = on;
      else if (number === 47 || number === 1047 || number === 1049) this.alternate(on);
    }
  }

  /** The second screen, which programs that fill the whole of it use and leave. */
  alternate(on) {
    if (on && !this.other) {
      this.save();
      this.other = { lines: this.lines, saved: this.saved };
      this.lines = this.blank();
      this.move(0, 0);
    } else if (!on && this.other) {
      this.lines = this.other.lines;
      this.saved = this.other.saved;
      this.other = undefined;
      this.lines.forEach((line) => { line.changed = true; });
      this.restore();
    }
    this.top = 0;
    this.bottom = this.rows - 1;
  }

  softReset() {
    this.style = PLAIN;
    this.modes = { ...this.modes, cursor: true, wrap: true, applicationKeys: false, insert: false, origin: false };
    this.top = 0;
    this.bottom = this.rows - 1;
    this.charsets = ['B', 'B'];
    this.charset = 0;
  }

  save() {
    this.saved = { x: this.at.x, y: this.at.y, style: this.style, charset: this.charset, charsets: [...this.charsets] };
  }

  restore() {
    const { x = 0, y = 0, style = PLAIN, charset = 0, charsets = ['B', 'B'] } = this.saved ?? {};
    Object.assign(this, { style, charset, charsets: [...charsets] });
    this.move(x, y);
  }

  touch() {
    this.lines[this.at.y].changed = true;
  }

  move(x, y) {
    if (this.lines[this.at.y]) this.touch();
    this.at = { x: Math.max(0, Math.min(x, this.columns - 1)), y: Math.max(0, Math.min(y, this.rows - 1)), wrap: false };
    this.touch();
  }

  tab(n) {
    this.move(Math.min(this.columns - 1, (Math.floor(this.at.x / 8) + n) * 8), this.at.y);
  }

  feed() {
    if (this.at.y === this.bottom) this.scroll(this.top, 1);
    else this.move(this.at.x, this.at.y + 1);
  }

  /** Moves the rows from `from` to the region's end up by `n`, or down. */
  scroll(from, n, keeps = true) {
    const count = Math.min(Math.abs(n), this.bottom - from + 1);
    for (let i = 0; i < count; i += 1) {
      const blank = new Line(this.columns, this.erased());
      if (n > 0) {
        const [gone] = this.lines.splice(from, 1);
        this.lines.splice(this.bottom, 0, blank);
        if (keeps && from === 0 && !this.other) this.scrolled(gone);
      } else {
        this.lines.splice(this.bottom, 1);
        this.lines.splice(from, 0, blank);
      }
    }
    this.lines.forEach((line, index) => { if (index === this.at.y || index === this.at.y - 1 || index === this.at.y + 1) line.changed = true; });
  }

  erased() {
    return this.style.bg === undefined ? PLAIN : { ...PLAIN, bg: this.style.bg };
  }

  clear(y, from, to) {
    const line = this.lines[y];
    const style = this.erased();
    for (let x = Math.max(0, from); x < Math.min(to, this.columns); x += 1) line.cells[x] = { text: ' ', style };
    line.changed = true;
  }

  eraseLine(what) {
    const { x, y } = this.at;
    this.clear(y, what === 0 ? x : 0, what === 1 ? x + 1 : this.columns);
  }

  eraseScreen(what) {
    const { y } = this.at;
    if (what === 0 || what === 1) this.eraseLine(what);
    for (let row = 0; row < this.rows; row += 1) {
      if (what === 2 || (what === 0 && row > y) || (what === 1 && row < y)) this.clear(row, 0, this.columns);
    }
    if (what === 3) this.scrolled(undefined);
  }

  insertCells(n) {
    const { cells } = this.lines[this.at.y];
    const count = Math.min(n, this.columns - this.at.x);
    cells.splice(this.at.x, 0, ...Array.from({ length: count }, () => ({ text: ' ', style: this.erased() })));
    cells.length = this.columns;
    this.touch();
  }

  deleteCells(n) {
    const { cells } = this.lines[this.at.y];
    cells.splice(this.at.x, Math.min(n, this.columns - this.at.x));
    this.lines[this.at.y].fit(this.columns);
  }

  print(given, code) {
    const drawn = this.charsets[this.charset] === '0' ? LINES[given] ?? given : given;
    const width = widthOf(code);
    if (width === 0) {
      const cell = this.lines[this.at.y].cells[Math.max(0, this.at.x - (this.at.wrap ? 0 : 1))];
      if (cell.text.length < 16) cell.text += drawn;
      return;
    }
    if (this.at.wrap || this.at.x + width > this.columns) {
      if (this.modes.wrap) {
        this.at.wrap = false;
        this.feed();
        this.move(0, this.at.y);
      } else this.move(this.columns - width, this.at.y);
    }
    if (this.modes.insert) this.insertCells(width);
    const line = this.lines[this.at.y];
    line.cells[this.at.x] = { text: drawn, style: this.style };
    // The second half of a wide one has no text of its own.
    if (width === 2) line.cells[this.at.x + 1] = { text: '', style: this.style };
    line.changed = true;
    this.last = given;
    if (this.at.x + width >= this.columns) this.at.wrap = this.modes.wrap;
    else this.at.x += width;
  }

  colours(numbers) {
    const rest = numbers.map((it) => it ?? 0);
    let style = { ...this.style };
    while (rest.length) {
      const n = rest.shift();
      if (n === 0) style = { ...PLAIN };
      else if (n === 1) style.bold = true;
      else if (n === 2) style.dim = true;
      else if (n === 3) style.italic = true;
      else if (n === 4) style.under = true;
      else if (n === 7) style.inverse = true;
      else if (n === 9) style.strike = true;
      else if (n === 22) style.bold = style.dim = false;
      else if (n === 23) style.italic = false;
      else if (n === 24) style.under = false;
      else if (n === 27) style.inverse = false;
      else if (n === 29) style.strike = false;
      else if (n >= 30 && n <= 37) style.fg = n - 30;
      else if (n >= 90 && n <= 97) style.fg = n - 82;
      else if (n === 39) style.fg = undefined;
      else if (n >= 40 && n <= 47) style.bg = n - 40;
      else if (n >= 100 && n <= 107) style.bg = n - 92;
      else if (n === 49) style.bg = undefined;
      else if (n === 38 || n === 48) {
        const colour = exact(rest);
        if (colour !== undefined) style[n === 38 ? 'fg' : 'bg'] = colour;
      }
    }
    this.style = Object.freeze(style);
  }
}

/** One of 256 colours: the first 16 are the page's, by number. Others, and those given exactly, are `rgb(…)`. */
function exact(rest) {
  const kind = rest.shift();
  const byte = (value) => Math.min(255, value ?? 0);
  if (kind === 2) {
    const [r, g, b] = rest.splice(0, 3).map(byte);
    return `rgb(${r ?? 0} ${g ?? 0} ${b ?? 0})`;
  }
  if (kind !== 5) return undefined;
  const n = byte(rest.shift());
  if (n < 16) return n;
  if (n >= 232) {
    const grey = 8 + (n - 232) * 10;
    return `rgb(${grey} ${grey} ${grey})`;
  }
  const part = (value) => (value ? 55 + value * 40 : 0);
  const cube = n - 16;
  return `rgb(${part(Math.floor(cube / 36))} ${part(Math.floor(cube / 6) % 6)} ${part(cube % 6)})`;
}
