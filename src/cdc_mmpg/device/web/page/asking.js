/** The device that the page uses, its session, and asking it. */
import { describeOrigin, showAnswer } from "./answer.js";
import { drawFrame } from "./charts.js";
import { countOf, create, find, setText } from "./elements.js";
import { DeviceError } from "../errors.js";

/** @typedef {import("../device.js").Device} Device */
/** @typedef {import("./answer.js").Answer} Answer */

export const CLOUD = "."; // the service that served this page
export const DEADLINE_SECONDS = 5; // maximum time that an answer waits for a layer
const CHECK_PAUSE_MS = 5000; // least time between two checks of the cloud while questions are answered
const MAX_THUMBNAILS = 64; // as many clips as a session has
const THUMBNAIL_PIXELS = 80;

const thumbnails = find("thumbnails", HTMLElement);
const useCloud = find("use-cloud", HTMLInputElement);
let device = /** @type {Device | null} */ (null);
let bytes = { up: 0, down: 0 }; // since the session began or the page was opened
let checkedAt = 0; // when the cloud was last checked
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

/** Shows whether the cloud is reachable. */
export async function checkCloud() {
  const state = find("cloud-state", HTMLElement);
  checkedAt = performance.now();
  if (useCloud.checked) {
    const options = { cache: /** @type {const} */ ("no-store"), signal: AbortSignal.timeout(1000 * DEADLINE_SECONDS) };
    const ready = await fetch("ready", options).then((reply) => reply.ok, () => false);
    state.textContent = ready ? "reachable" : "not reachable";
  }
  if (!useCloud.checked) {
    state.textContent = "switched off";
  }
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
  bytes = { up: bytes.up + given.bytesUp, down: bytes.down + given.bytesDown };
  showAnswer(given, name, text, open.unit);
  showSession();
  const isKnown = !given.trouble && find("cloud-state", HTMLElement).textContent === "reachable";
  if (!isKnown && performance.now() - checkedAt > CHECK_PAUSE_MS) {
    void checkCloud();
  }
  return given;
}

/**
 * Runs what shows a clip to the device, and keeps a thumbnail if the session has grown.
 * @param {Device} open
 * @param {string} name of the clip
 * @param {() => Promise<ImageData>} show returns the clip's middle frame
 */
export async function keepClip(open, name, show) {
  const before = open.anchors;
  const frame = await show();
  const newest = thumbnails.querySelector("canvas")?.getAttribute("aria-label");
  const grown = open.anchors > before || (before >= MAX_THUMBNAILS && newest !== name);
  if (open.unit === "session" && grown) {
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
}

/** Shows the clips, the layer and the bytes of the session. */
function showSession() {
  setText("session-up", bytes.up.toLocaleString("en"));
  setText("session-down", bytes.down.toLocaleString("en"));
  if (!device) {
    return;
  }
  const [shown, sample] = [thumbnails.children.length, device.unit === "sample"];
  const count = device.anchors ? `${countOf(device.anchors, "clip")} of this camera.` : "No clips yet.";
  setText("session-about", sample ? "This model adapts to each question alone and keeps no session." : count);
  const before = sample ? 0 : device.anchors - shown;
  setText("session-before", before > 0 ? `${countOf(before, "clip")} from before` : "");
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
  await requireDevice().newSession();
  thumbnails.replaceChildren();
  bytes = { up: 0, down: 0 };
  session += 1;
  showSession();
  return "A new session has begun: the clips and the layer of the last one are forgotten.";
}
