/** The state of the cloud in the header, checked now and then. */
import { find } from "./elements.js";
import { isBusy } from "./operations.js";

export const DEADLINE_SECONDS = 5; // maximum time that an answer waits for a layer
const CHECK_PAUSE_MS = 5000; // least time between two checks while questions are answered
const AWAY_PAUSE_MS = 10_000; // time between two checks while the cloud is not reachable
const AWAY = "not reachable";

const state = find("cloud-state", HTMLElement);
const useCloud = find("use-cloud", HTMLInputElement);
let checkedAt = 0; // when the last check began
let isRefused = false; // whether the last answer lacked a key

/** Shows whether the cloud is reachable; when it is back, the document gets the event "reachable". */
export async function checkCloud() {
  const started = performance.now();
  checkedAt = started;
  let text = "switched off";
  if (useCloud.checked) {
    const options = { cache: /** @type {const} */ ("no-store"), signal: AbortSignal.timeout(1000 * DEADLINE_SECONDS) };
    const ready = await fetch("ready", options).then((reply) => reply.ok, () => false);
    text = !ready ? AWAY : isRefused ? "key needed or refused" : "reachable";
  }
  const before = state.textContent;
  if (started !== checkedAt || text === before) {
    return; // a newer check will tell, or nothing is new for a screen reader
  }
  state.textContent = text;
  if (before === AWAY && useCloud.checked) {
    document.dispatchEvent(new Event("reachable"));
  }
}

/**
 * Checks the cloud again if the trouble of an answer tells something new about it.
 * @param {string} trouble
 */
export function noteTrouble(trouble) {
  const refused = isKeyRefused(trouble);
  const isKnown = !trouble && state.textContent === "reachable";
  if (refused !== isRefused || (!isKnown && performance.now() - checkedAt > CHECK_PAUSE_MS)) {
    isRefused = refused;
    void checkCloud();
  }
}

/**
 * Returns whether the trouble of an answer is a key that is missing or refused.
 * @param {string} trouble
 */
export function isKeyRefused(trouble) {
  return /\b401\b/.test(trouble);
}

setInterval(() => {
  if (state.textContent === AWAY && !document.hidden && !isBusy()) {
    void checkCloud();
  }
}, AWAY_PAUSE_MS);
for (const [target, type] of /** @type {const} */ ([
  [window, "online"], [window, "offline"], [document, "visibilitychange"],
])) {
  target.addEventListener(type, () => document.hidden || void checkCloud());
}
