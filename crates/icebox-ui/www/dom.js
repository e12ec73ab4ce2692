// Elements, built from data. Whatever is shown may come from a guest, so text is only ever text: nothing here, and nothing
// in the other modules, makes markup of a string.

const SVG = 'http://www.w3.org/2000/svg';

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked') element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(3).filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** An HTML element. Attributes that begin with `on` are listeners; children that are no elements become text. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Changes a text only where it differs: what a user has selected stays selected. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Makes the children of `parent` exactly these, without moving those that are in place: focus stays where it is. */
export function setChildren(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.childNodes]) if (!wanted.has(child)) child.remove();
  children.forEach((child, index) => {
    if (parent.childNodes[index] !== child) parent.insertBefore(child, parent.childNodes[index] ?? null);
  });
}

/** A list whose elements stay the same as long as what they stand for does. */
export function keyed(parent, make) {
  const known = new Map();
  return (items, keyOf) => {
    const keys = new Set(items.map(keyOf));
    for (const key of known.keys()) if (!keys.has(key)) known.delete(key);
    setChildren(parent, items.map((item) => {
      const key = keyOf(item);
      if (!known.has(key)) known.set(key, make(item));
      const row = known.get(key);
      row.update(item);
      return row.element;
    }));
  };
}

/** A button. */
export function button(label, onclick, attributes = {}) {
  return h('button', { type: 'button', onclick, ...attributes }, label);
}

/** A table with a caption for those who do not see it. Columns that begin with `#` are of numbers. */
export function table(caption, columns) {
  const body = h('tbody');
  const head = columns.map((name) => {
    const number = name.startsWith('#');
    return h('th', { scope: 'col', class: (number && 'number') || (name === 'Actions' && 'number') }, number ? name.slice(1) : name);
  });
  const element = h('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': caption },
    h('table', {}, h('caption', { class: 'hidden' }, caption), h('thead', {}, h('tr', {}, head)), body));
  return { element, body };
}
