/** The demo: a recorded session of a camera, with questions and their correct answers. */
import { askAbout, beginSession, observe, requireDevice } from "./asking.js";
import { drawLines, formatShare } from "./charts.js";
import { checkCloud } from "./cloud.js";
import { countOf, create, find, setText } from "./elements.js";
import { DeviceError } from "../errors.js";
import { breathe, say } from "./operations.js";

/** @typedef {{clip: string, question?: string, answer?: string, choices?: string[]}} Step */
/** @typedef {{device: string, steps: Step[]}} Demo */
/** @typedef {{clip: string, question: string, answer: string, unadapted: string, text: string}} Row */

const TABLE_ROWS = 4; // last questions that are shown
const FETCH_MS = 10_000; // time for a try to fetch a clip, and from the first try to the last
const RETRY_PAUSE_MS = 1000;

const demoStop = find("demo-stop", HTMLButtonElement);
let demo = /** @type {Demo | null} */ (null);
let stop = new AbortController(); // of the last time that it was played
let lines = /** @type {Parameters<typeof drawLines>[1]} */ ([]); // of the chart
let total = 1; // questions of the chart

/** Loads the demo session, if there is one and it has not been loaded. */
export async function loadDemo() {
  if (demo) {
    return;
  }
  const reply = await fetch("demo/session.json").catch(() => null);
  const loaded = /** @type {Demo | null} */ (reply?.ok ? await reply.json().catch(() => null) : null);
  if (!Array.isArray(loaded?.steps) || !loaded.steps.length) {
    return;
  }
  const asked = loaded.steps.flatMap((step) => step.question || []);
  const examples = [...new Set(asked)].slice(0, 20);
  find("examples", HTMLElement).replaceChildren(...examples.map((text) => new Option("", text)));
  find("question", HTMLInputElement).placeholder = examples[0] ?? "";
  [demo, total] = [loaded, Math.max(asked.length, 1)];
  const [all, some] = [loaded.steps, loaded.steps.filter((step) => step.question)]
    .map((steps) => new Set(steps.map((step) => step.clip)).size);
  setText("demo-about", `Device ${loaded.device}: ${countOf(all ?? 0, "clip")}; ` +
    `${countOf(asked.length, "question")} about ${some} of them. Playing it begins a new session.`);
  find("demo", HTMLElement).hidden = find("demo-hint", HTMLElement).hidden = false;
  showChart();
}

/**
 * Plays the demo session: observes or asks step by step.
 * @returns {Promise<string>}
 */
export async function playDemo() {
  const open = requireDevice();
  const rows = /** @type {Row[]} */ ([]);
  const steps = demo?.steps ?? [];
  stop = new AbortController();
  const { signal } = stop;
  find("demo-about", HTMLElement).hidden = true;
  find("demo-state", HTMLElement).hidden = false;
  demoStop.setAttribute("aria-disabled", "false");
  find("answer-live", HTMLElement).setAttribute("aria-live", "off"); // the record is announced at the end
  let [file, clipsShown] = [new File([], ""), 0];
  try {
    for (const [i, step] of steps.entries()) {
      const name = step.clip;
      const progress = find("demo-progress", HTMLProgressElement);
      [progress.max, progress.value] = [steps.length, i];
      if (file.name !== name) {
        file = await fetchClip(name, signal);
      }
      if (signal.aborted) {
        setText("demo-step", "stopped");
        return `The demo was stopped after ${countOf(rows.length, "question")}.`;
      }
      if (i === 0) { // clips can be fetched, so the last session may go
        await beginSession();
        showRecord(rows, false);
      }
      if (!step.question) {
        clipsShown += 1;
        setText("demo-step", `clip ${clipsShown}, without a question`);
        await observe(open, file, name);
      } else {
        setText("demo-step", `question ${rows.length + 1} of ${total}`);
        const answer = await askAbout(open, file, name, step.question, step.choices ?? []);
        const { ranked: _, unknownWords: __, frame: ___, ...rest } = answer;
        rows.push({ clip: name, question: step.question, answer: step.answer ?? "", ...rest });
        showRecord(rows, false);
      }
      progress.value = i + 1;
      await breathe();
    }
    showRecord(rows, true);
    return `The demo has ended. ${describeScore()}`;
  } finally {
    demoStop.setAttribute("aria-disabled", "true");
    find("demo-about", HTMLElement).hidden = false;
    find("answer-live", HTMLElement).setAttribute("aria-live", "polite");
  }
}

/**
 * Fetches a clip of the demo, and tries again while the service does not answer; stopped, returns an empty file.
 * @param {string} name
 * @param {AbortSignal} signal
 * @returns {Promise<File>}
 */
async function fetchClip(name, signal) {
  const path = `demo/${name.split("/").map(encodeURIComponent).join("/")}`;
  const end = performance.now() + FETCH_MS;
  setText("demo-step", "loading a clip");
  for (;;) {
    try {
      const reply = await fetch(path, { signal: AbortSignal.any([signal, AbortSignal.timeout(FETCH_MS)]) });
      if (reply.ok) {
        return new File([await reply.blob()], name);
      }
      if (reply.status < 500) {
        throw new DeviceError(`The service has no clip ${name} of the demo (status ${reply.status}).`);
      }
    } catch (error) {
      if (error instanceof DeviceError) {
        throw error;
      }
    }
    if (signal.aborted) {
      break;
    }
    if (performance.now() > end) {
      void checkCloud();
      setText("demo-step", "interrupted");
      throw new DeviceError("The service does not answer, so the demo has ended.");
    }
    setText("demo-step", "the service does not answer, trying again");
    await new Promise((resolve) => setTimeout(resolve, RETRY_PAUSE_MS));
  }
  return new File([], name);
}

/**
 * Shows the record of the demo: chart, accuracies, last questions.
 * @param {Row[]} rows
 * @param {boolean} finished
 */
function showRecord(rows, finished) {
  /** @param {(row: Row) => string} pick */
  const accuracies = (pick) => {
    let right = 0;
    return rows.map((row, i) => (right += Number(pick(row) === row.answer)) / (i + 1));
  };
  lines = [
    { name: "static", style: "static", values: accuracies((row) => row.unadapted) },
    { name: "adapted", style: "adapted", values: accuracies((row) => row.text) },
  ];
  showChart();
  const table = find("demo-table", HTMLTableElement);
  table.hidden = !rows.length;
  table.tBodies[0]?.replaceChildren(...rows.slice(-TABLE_ROWS).reverse().map((row) => create(
    "tr", "", create("th", row.question), create("td", row.answer),
    ...[row.unadapted, row.text].map((text) => {
      const right = text === row.answer;
      const [mark, word] = [create("span", right ? " ✓" : " ✗"), create("span", right ? " right" : " wrong")];
      mark.setAttribute("aria-hidden", "true");
      mark.className = right ? "" : "problem";
      word.className = "visually-hidden";
      return create("td", text, mark, word);
    }),
  )));
  find("demo-record", HTMLElement).textContent = JSON.stringify({ finished, rows });
}

/**
 * Describes the accuracies in words.
 * @returns {string}
 */
function describeScore() {
  const scores = lines.map(({ name, values }) => `${name} ${formatShare(values.at(-1) ?? 0)}`);
  return `Right: ${scores.join(", ")}.`;
}

/** Draws the chart of the demo. */
function showChart() {
  const chart = find("demo-chart", SVGSVGElement);
  drawLines(chart, lines, total);
  const count = lines[0]?.values.length ?? 0;
  setText("demo-score", count ? describeScore() : "");
  const after = count ? `After ${countOf(count, "question")}: ${describeScore()}` : "No question yet.";
  chart.setAttribute("aria-label", `Chart of the share of right answers over the questions. ${after}`);
}

demoStop.addEventListener("click", () => {
  if (demoStop.getAttribute("aria-disabled") === "false") {
    stop.abort();
    say("Stopping after this step.");
  }
});
document.addEventListener("reachable", () => void loadDemo());
new ResizeObserver(() => showChart()).observe(find("demo", HTMLElement));
