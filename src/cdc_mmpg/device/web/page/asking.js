/** The device that the page uses, its session, and asking it. */
import { clearAnswer, describeOrigin, showAnswer } from "./answer.js";
import { drawFrame } from "./charts.js";
import { noteTrouble } from "./cloud.js";
import { countOf, create, find, setText } from "./elements.js";
import { DeviceError } from "../errors.js";

/** @typedef {import("../device.js").Device} Device */
/** @typedef {import("./answer.js").Answer} Answer */

const MAX_THUMBNAILS = 64; // as many clips as a session has
const THUMBNAIL_PIXELS = 80;

const thumbnails = find("thumbnails", HTMLElement);
let device = /** @type {Device | null} */ (null);
let session = 0; // number of sessions that began on this page

/** Returns the device, or null while there is none. */
export function getDevice() {
  return device;
}

/**
 * Sets the device.
 * @param {Device} opened
 */
export function setDevice(opened) {
  device = opened;
  showSession();
}

/** Returns the number of the session: a clip that was shown in another one is new to this one. */
export function getSession() {
  return session;
}

/**
 * Returns the device, or explains that there is none.
 * @returns {Device}
 */
export function requireDevice() {
  if (!device) {
    throw new DeviceError(`The model is not loaded. ${find("load-error", HTMLElement).textContent}`);
  }
  return device;
}

/**
 * Asks a question about a clip, shows the answer, and returns it.
 * @param {Device} open
 * @param {Blob} file
 * @param {string} name
 * @param {string} text
 * @param {string[]} listed choices
 * @returns {Promise<Answer>}
 */
export async function askAbout(open, file, name, text, listed) {
  const before = open.clipsSeen;
  const answer = await open.answer(file, text, listed);
  showAnswer(answer, name, text, open.model.unit);
  keepClip(open, before, name, answer.frame);
  noteTrouble(answer.trouble);
  return answer;
}

/**
 * Adds a clip to the session without a question.
 * @param {Device} open
 * @param {Blob} file
 * @param {string} name
 * @returns {Promise<boolean>} whether the session has grown
 */
export async function observe(open, file, name) {
  const before = open.clipsSeen;
  return keepClip(open, before, name, await open.observe(file));
}

/**
 * Keeps a thumbnail of a clip that the device has seen if the session has grown, and shows the session.
 * @param {Device} open
 * @param {number} before number of clips before this one
 * @param {string} name of the clip
 * @param {ImageData} frame its middle frame
 * @returns {boolean} whether the session has grown
 */
function keepClip(open, before, name, frame) {
  const grown = open.model.unit === "session" && open.clipsSeen > before;
  if (grown) {
    const canvas = document.createElement("canvas");
    drawFrame(canvas, frame, THUMBNAIL_PIXELS);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", name);
    canvas.title = name;
    thumbnails.prepend(create("li", "", canvas));
    while (thumbnails.children.length > MAX_THUMBNAILS) {
      thumbnails.lastElementChild?.remove();
    }
  }
  showSession();
  return grown;
}

/** Shows the clips, the layer and the bytes of the session. */
function showSession() {
  if (!device) {
    return;
  }
  setText("session-up", device.bytesUp.toLocaleString("en"));
  setText("session-down", device.bytesDown.toLocaleString("en"));
  const [shown, sample] = [thumbnails.children.length, device.model.unit === "sample"];
  const before = device.anchors - shown;
  const visited = before > 0 ? `, ${shown ? before : "all"} from an earlier visit` : "";
  const count = device.anchors ? `${countOf(device.anchors, "clip")} of this camera${visited}.` : "No clips yet.";
  setText("session-about", sample ? "This model adapts to each question alone and keeps no session." : count);
  setText("session-layer", sample ? "one for each question" : describeOrigin(device.origin, device.model.unit));
  setText("storage-trouble", device.storageTrouble);
  thumbnails.hidden = !shown;
  find("new-session", HTMLElement).hidden = sample;
}

/**
 * Begins a new session.
 * @returns {Promise<string>}
 */
export async function beginSession() {
  const open = requireDevice();
  await open.newSession();
  thumbnails.replaceChildren();
  clearAnswer(open.model.unit);
  session += 1;
  document.dispatchEvent(new Event("session")); // no clip of the list is in this one
  showSession();
  return "A new session has begun: the clips and the layer of the last one are forgotten.";
}
