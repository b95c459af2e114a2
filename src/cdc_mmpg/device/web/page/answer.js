/** The card with an answer, and words for layers. */
import { drawFrame, formatShare, showBars } from "./charts.js";
import { isKeyRefused } from "./cloud.js";
import { countOf, find, setText } from "./elements.js";

/** @typedef {Awaited<ReturnType<import("../device.js").Device["answer"]>>} Answer */

const FRAME_PIXELS = 192;
const LONG_ANSWER = 11; // characters from which an answer is set smaller
const CLOUD_STAGES = ["upload", "generate", "download"];
/** @type {Record<string, string>} */
const STAGE_TITLES = {
  decode: "Read frames of the clip",
  encode: "Turn frames and question into features",
  anchor: "Turn the clip into 192 numbers",
  upload: "Send the mean of the clips, and wait for the network",
  generate: "Generate a layer in the cloud",
  download: "Receive the layer",
  verify: "Check the layer's signature",
  swap: "Install the layer",
  keep: "Store the layer in this browser",
  answer: "Score the answers with the layer",
};

/**
 * Shows an answer.
 * @param {Answer} answer
 * @param {string} name of the clip
 * @param {string} text question
 * @param {string} unit
 */
export function showAnswer(answer, name, text, unit) {
  const [same, shared] = [answer.text === answer.unadapted, answer.origin === "shared"];
  const isLong = Math.max(answer.text.length, answer.unadapted.length) >= LONG_ANSWER;
  find("verdict", HTMLElement).classList.toggle("long", isLong);
  setText("answer-text", answer.text);
  setText("answer-static", answer.unadapted);
  setText("answer-about", `${text} (${name})`);
  setText("answer-probability", formatShare(answer.ranked[0]?.[1] ?? 0));
  setText("answer-differs", shared ? "same layer" : same ? "same answer" : "different");
  const traffic = `${countOf(answer.bytesUp, "byte")} up, ${answer.bytesDown.toLocaleString("en")} down.`;
  setText("answer-layer", `Answered with ${describeOrigin(answer.origin, unit, answer.anchors)}.`);
  setText("answer-bytes", traffic);
  setText("answer-unknown", answer.unknownWords.length ? `Unknown words: ${answer.unknownWords.join(", ")}.` : "");
  setText("answer-trouble", describeTrouble(answer));
  showBars(find("ranked", HTMLTableElement), answer.ranked.map(([label, value]) => (
    { label, value, text: (100 * value).toFixed(1), style: "adapted" }
  )), 1);
  const stages = Object.entries(answer.milliseconds);
  const sum = stages.reduce((before, [, value]) => before + value, 0);
  setText("stages-title", `Milliseconds, ${sum.toFixed(0)} in all`);
  showBars(find("stages", HTMLTableElement), stages.map(([stage, value]) => {
    const cloud = CLOUD_STAGES.includes(stage);
    const [label, style] = cloud ? [`${stage} *`, "cloud"] : [stage, "plain"];
    return { label, value, text: value.toFixed(1), style, title: STAGE_TITLES[stage] ?? stage };
  }));
  find("stages-note", HTMLElement).hidden = !stages.some(([stage]) => CLOUD_STAGES.includes(stage));
  showParts(true, unit);
  drawFrame(find("answer-frame", HTMLCanvasElement), answer.frame, FRAME_PIXELS);
  const { frame: _, ...rest } = answer;
  find("last-answer", HTMLElement).textContent = JSON.stringify({ clip: name, question: text, ...rest });
}

/**
 * Clears the card.
 * @param {string} unit
 */
export function clearAnswer(unit) {
  showParts(false, unit);
  find("last-answer", HTMLElement).textContent = "";
}

/**
 * Shows either an answer, or what answers are.
 * @param {boolean} answered
 * @param {string} unit
 */
function showParts(answered, unit) {
  for (const id of ["verdict", "evidence", "answer-frame"]) {
    find(id, HTMLElement).hidden = !answered;
  }
  find("answer-empty", HTMLElement).hidden = answered;
  find("answer-how", HTMLElement).hidden = answered || unit === "sample"; // it describes sessions
}

/**
 * Describes why an answer has no newer layer.
 * @param {Answer} answer
 * @returns {string}
 */
function describeTrouble({ trouble, origin }) {
  const missing = origin === "shared" ? "No layer from the cloud" : "No newer layer";
  return isKeyRefused(trouble) ? "The service needs an access key: type it in Settings."
    : trouble ? `${missing}: ${trouble}.`.replace("..", ".") : "";
}

/**
 * Describes where a layer came from.
 * @param {string} origin
 * @param {string} unit
 * @param {number} [anchors] number of clips that it was generated from
 * @returns {string}
 */
export function describeOrigin(origin, unit, anchors) {
  const source = anchors === undefined ? "" : `, from ${countOf(anchors, "clip")}`;
  return origin === "shared" ? "the shared layer of all devices"
    : unit === "sample" ? "a layer for this question"
      : `${origin === "kept" ? "a layer stored in this browser" : "a layer for this session"}${source}`;
}

/**
 * Describes the layers that the cloud sends.
 * @param {import("../model.js").DeviceModel} model
 * @returns {string}
 */
export function describeLayout({ layout, messageBytes }) {
  const size = `${layout.outputs} × ${layout.columns}`;
  /** @type {Record<string, string>} */
  const counted = { low_rank: `low rank ${layout.number}`, basis: `basis of ${layout.number}` };
  return `${counted[layout.kind] ?? layout.kind}, ${size}, ${messageBytes.toLocaleString("en")} bytes`;
}
