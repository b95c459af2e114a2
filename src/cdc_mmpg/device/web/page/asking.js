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
  let answer = /** @type {Answer | null} */ (null);
  await keepClip(open, name, async () => (answer = await open.answer(file, text, listed)).frame);
  const given = /** @type {Answer} */ (/** @type {unknown} */ (answer));
  showAnswer(given, name, text, open.unit);
  showSession();
  noteTrouble(given.trouble);
  return given;
}

/**
 * Runs what shows a clip to the device, and keeps a thumbnail if the session has grown.
 * @param {Device} open
 * @param {string} name of the clip
 * @param {() => Promise<ImageData>} show returns the clip's middle frame
 * @returns {Promise<boolean>} whether the session has grown
 */
export async function keepClip(open, name, show) {
  const before = open.clipsSeen;
  const frame = await show();
  const grown = open.unit === "session" && open.clipsSeen > before;
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
  const [shown, sample] = [thumbnails.children.length, device.unit === "sample"];
  const before = device.anchors - shown;
  const visited = before > 0 ? `, ${shown ? before : "all"} from an earlier visit` : "";
  const count = device.anchors ? `${countOf(device.anchors, "clip")} of this camera${visited}.` : "No clips yet.";
  setText("session-about", sample ? "This model adapts to each question alone and keeps no session." : count);
  setText("session-layer", sample ? "one for each question" : describeOrigin(device.origin, device.unit));
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
  clearAnswer(open.unit);
  session += 1;
  document.dispatchEvent(new Event("session")); // no clip of the list is in this one
  showSession();
  return "A new session has begun: the clips and the layer of the last one are forgotten.";
}
