/** Elements of index.html: finding, filling and creating them. */

/**
 * Returns the element with an id.
 * @template {HTMLElement | SVGElement} T
 * @param {string} id
 * @param {new () => T} type
 * @returns {T}
 */
export function find(id, type) {
  const element = document.getElementById(id);
  if (!(element instanceof type)) {
    throw new TypeError(`index.html has no ${type.name} with the id ${id}`);
  }
  return element;
}

/**
 * Sets the text of an element, and hides the element if the text is empty.
 * @param {string} id
 * @param {string} text
 */
export function setText(id, text) {
  const element = find(id, HTMLElement);
  element.textContent = text;
  element.hidden = !text;
}

/**
 * Creates an element with a text and children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} name
 * @param {string} text
 * @param {...Node} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function create(name, text, ...children) {
  const element = document.createElement(name);
  element.textContent = text;
  element.append(...children);
  return element;
}

/**
 * Formats a count with its noun, such as "3 clips".
 * @param {number} count
 * @param {string} noun
 * @returns {string}
 */
export function countOf(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
