/** Bars, lines and frames: what the page draws. All colours are classes of page.css. */

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 152; // pixels of the line chart
const MARGIN = { left: 34, right: 108, top: 24, bottom: 20 }; // pixels around its plot
const LABEL_DISTANCE = 17; // least pixels between the labels of two lines
const MAX_MARKERS = 60; // with more questions, only the last one has a marker

/** @typedef {{label: string, value: number, text: string, style: string, title?: string}} Bar */
/** @typedef {{name: string, style: string, values: number[]}} Line values: shares from 0 to 1 */

/**
 * Creates an SVG element with attributes.
 * @param {string} name
 * @param {Record<string, string | number>} attributes
 * @param {string} [text]
 * @returns {SVGElement}
 */
function createShape(name, attributes, text = "") {
  const shape = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    shape.setAttribute(key, String(value));
  }
  shape.textContent = text;
  return shape;
}

/**
 * Shows bars as the rows of a table: label, bar, number. The table itself is the text alternative.
 * @param {HTMLTableElement} table
 * @param {Bar[]} bars
 * @param {number} [full] value of a bar of full length; by default the largest value
 */
export function showBars(table, bars, full = Math.max(...bars.map((bar) => bar.value), 1e-9)) {
  const rows = bars.map((bar) => {
    const row = document.createElement("tr");
    const label = document.createElement("th");
    label.scope = "row";
    [label.textContent, label.title] = [bar.label, bar.title ?? bar.label];
    const svg = createShape("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.append(
      createShape("rect", { width: 100, height: 10, class: "track" }),
      createShape("rect", { width: Math.min(100, (100 * bar.value) / full), height: 10, class: bar.style }),
    );
    const cell = document.createElement("td");
    cell.append(svg);
    const number = document.createElement("td");
    number.textContent = bar.text;
    row.append(label, cell, number);
    return row;
  });
  table.tBodies[0]?.replaceChildren(...rows);
}

/**
 * Draws shares over the question number as lines, with names and last values at their ends.
 * @param {SVGSVGElement} svg
 * @param {Line[]} lines
 * @param {number} total number of questions on the x axis
 */
export function drawLines(svg, lines, total) {
  const width = Math.max(svg.clientWidth, 280);
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  /** @param {number} question */
  const x = (question) => MARGIN.left + ((right - MARGIN.left) * (question - 1)) / Math.max(total - 1, 1);
  /** @param {number} share */
  const y = (share) => bottom - (bottom - MARGIN.top) * share;
  const shapes = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
    createShape("line", { x1: MARGIN.left, x2: right, y1: y(share), y2: y(share), class: share ? "grid" : "axis" }),
    ...(share % 0.5 === 0
      ? [createShape("text", { x: MARGIN.left - 6, y: y(share) + 4, class: "tick end" }, String(100 * share))]
      : []),
  ]);
  const distance = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((step) => total / step <= 6) ?? total;
  for (let question = distance; question <= total; question += distance) {
    shapes.push(createShape("text", { x: x(question), y: bottom + 16, class: "tick middle" }, String(question)));
  }
  shapes.push(createShape("text", { x: right + 16, y: bottom + 16, class: "tick" }, "question"));
  shapes.push(createShape("text", { x: 0, y: 12, class: "tick" }, "% right so far"));
  for (const line of lines.filter(({ values }) => values.length)) {
    const points = line.values.map((value, i) => `${x(i + 1).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    shapes.push(createShape("polyline", { points, class: `line ${line.style}` }));
    line.values.forEach((value, i) => {
      const last = i === line.values.length - 1;
      if (last || line.values.length <= MAX_MARKERS) {
        shapes.push(createMarker(line.style, x(i + 1), y(value), last ? 4 : 2));
      }
    });
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("height", String(HEIGHT));
  svg.replaceChildren(...shapes, ...createLabels(lines, x, y, bottom));
}

/**
 * Creates the labels at the ends of lines, far enough from each other to be read.
 * @param {Line[]} lines
 * @param {(question: number) => number} x
 * @param {(share: number) => number} y
 * @param {number} bottom
 * @returns {SVGElement[]}
 */
function createLabels(lines, x, y, bottom) {
  const labels = lines
    .filter(({ values }) => values.length)
    .map((line) => ({ line, last: line.values.at(-1) ?? 0 }))
    .sort((one, other) => other.last - one.last);
  let above = -Infinity;
  const places = labels.map(({ last }) => (above = Math.max(y(last) + 4, above + LABEL_DISTANCE)));
  const excess = Math.max(0, (places.at(-1) ?? 0) - bottom);
  return labels.map(({ line, last }, i) => {
    const attributes = { x: x(line.values.length) + 9, y: (places[i] ?? 0) - excess, class: `name ${line.style}` };
    return createShape("text", attributes, `${line.name} ${formatShare(last)}`);
  });
}

/**
 * Creates a marker: a square for the static line, else a circle.
 * @param {string} style
 * @param {number} x
 * @param {number} y
 * @param {number} size half of its width
 * @returns {SVGElement}
 */
function createMarker(style, x, y, size) {
  return style === "static"
    ? createShape("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, class: `marker ${style}` })
    : createShape("circle", { cx: x, cy: y, r: size, class: `marker ${style}` });
}

/**
 * Draws a frame on a canvas, scaled to a square of some pixels.
 * @param {HTMLCanvasElement} canvas
 * @param {ImageData} frame
 * @param {number} size
 */
export function drawFrame(canvas, frame, size) {
  const full = document.createElement("canvas");
  [full.width, full.height] = [frame.width, frame.height];
  full.getContext("2d")?.putImageData(frame, 0, 0);
  [canvas.width, canvas.height] = [size, size];
  canvas.getContext("2d")?.drawImage(full, 0, 0, size, size);
}

/**
 * Formats a share as percent; one that is not quite all gets a decimal.
 * @param {number} share
 * @returns {string}
 */
export function formatShare(share) {
  return `${(100 * share).toFixed(share > 0.99 && share < 1 ? 1 : 0)} %`;
}
