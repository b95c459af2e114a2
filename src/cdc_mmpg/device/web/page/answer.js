/** The card with an answer, and words for layers. */
import { drawFrame, formatShare, showBars } from "./charts.js";
import { countOf, find, setText } from "./elements.js";

/** @typedef {Awaited<ReturnType<import("../device.js").Device["answer"]>>} Answer */

const FRAME_PIXELS = 192;
const LONG_ANSWER = 11; // characters from which an answer is set smaller
const CLOUD_STAGES = ["upload", "generate", "download"];

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
  const locked = /\b401\b/.test(answer.trouble) ? " (type the access key in Settings)" : "";
  setText("answer-trouble", answer.trouble ? `No newer layer: ${answer.trouble}${locked}.`.replace("..", ".") : "");
  showBars(find("ranked", HTMLTableElement), answer.ranked.map(([label, value]) => (
    { label, value, text: (100 * value).toFixed(1), style: "adapted" }
  )), 1);
  const stages = Object.entries(answer.milliseconds);
  const sum = stages.reduce((before, [, value]) => before + value, 0);
  setText("stages-title", `Milliseconds, ${sum.toFixed(0)} in all`);
  showBars(find("stages", HTMLTableElement), stages.map(([stage, value]) => {
    const cloud = CLOUD_STAGES.includes(stage);
    return { label: cloud ? `${stage} *` : stage, value, text: value.toFixed(1), style: cloud ? "cloud" : "plain" };
  }));
  find("stages-note", HTMLElement).hidden = !stages.some(([stage]) => CLOUD_STAGES.includes(stage));
  find("answer-empty", HTMLElement).hidden = find("answer-how", HTMLElement).hidden = true;
  find("verdict", HTMLElement).hidden = find("evidence", HTMLElement).hidden = false;
  find("answer-frame", HTMLElement).hidden = false;
  drawFrame(find("answer-frame", HTMLCanvasElement), answer.frame, FRAME_PIXELS);
  const { frame: _, ...rest } = answer;
  find("last-answer", HTMLElement).textContent = JSON.stringify({ clip: name, question: text, ...rest });
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
 * @param {import("../device.js").Device} device
 * @returns {string}
 */
export function describeLayout({ layout, messageBytes }) {
  const size = `${layout.outputs} × ${layout.columns}`;
  /** @type {Record<string, string>} */
  const counted = { low_rank: `low rank ${layout.number}`, basis: `basis of ${layout.number}` };
  return `${counted[layout.kind] ?? layout.kind}, ${size}, ${messageBytes.toLocaleString("en")} bytes`;
}
