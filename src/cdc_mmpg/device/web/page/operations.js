/** Operations of the page, one at a time, and the message bar that tells about them. */
import { find } from "./elements.js";
import { DeviceError, describe } from "../errors.js";

const HINT_MS = 2500; // time for which a hint is shown

const progress = find("operation-progress", HTMLProgressElement);
const hint = find("hint", HTMLElement);
let busy = false;
let hintTimer = 0;

/** Returns whether an operation runs. */
export function isBusy() {
  return busy;
}

/**
 * Shows how far the present operation is.
 * @param {number} done
 * @param {number} all
 */
export function showProgress(done, all) {
  [progress.max, progress.value] = [all, done];
}

/**
 * Shows a message, announced by screen readers.
 * @param {string} text
 * @param {boolean} [problem]
 */
export function say(text, problem = false) {
  find("message", HTMLElement).textContent = text;
  find("message-bar", HTMLElement).classList.toggle("problem", problem);
}

/**
 * Returns a sentence that describes an error.
 * @param {unknown} error
 * @returns {string}
 */
export function describeError(error) {
  return error instanceof DeviceError ? error.message : `Unexpected failure: ${describe(error)}`;
}

/** Asks the user for a moment to wait for the operation that runs; its own message stays. */
export function sayWait() {
  hint.textContent = "Wait until this has ended.";
  clearTimeout(hintTimer);
  hintTimer = setTimeout(() => (hint.textContent = ""), HINT_MS);
}

/**
 * Runs an operation unless another one runs; shows its message, and its failure as a sentence.
 * @param {string} text message during the operation
 * @param {() => Promise<string>} operation returns the message at its end
 */
export async function run(text, operation) {
  if (busy) {
    sayWait();
    return;
  }
  setBusy(true);
  say(text);
  try {
    say(await operation());
  } catch (error) {
    if (!(error instanceof DeviceError)) {
      console.error(error);
    }
    say(describeError(error), true);
  } finally {
    setBusy(false);
  }
}

/**
 * Marks the page as busy or not. Buttons keep the focus, so they are not disabled but ignored by `run`.
 * @param {boolean} state
 */
function setBusy(state) {
  busy = state;
  find("main", HTMLElement).setAttribute("aria-busy", String(state));
  progress.hidden = !state;
  hint.textContent = "";
  progress.removeAttribute("value");
  for (const button of document.querySelectorAll("[data-operation]")) {
    button.setAttribute("aria-disabled", String(state));
  }
}

/**
 * Lets the browser draw and handle input; unlike a timer, this is not slowed down in a hidden page.
 * @returns {Promise<void>}
 */
export function breathe() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(null);
  });
}
