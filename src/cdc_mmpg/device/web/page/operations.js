/** Operations of the page, one at a time, and the message bar that tells about them. */
import { find } from "./elements.js";
import { DeviceError } from "../errors.js";

const WAIT_SHOWN_MS = 2500; // time after which a hint gives way to the operation's message

const progress = find("operation-progress", HTMLProgressElement);
let busy = false;
let doing = ""; // message of the operation that runs

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
  const text = error instanceof Error ? error.message : String(error);
  return error instanceof DeviceError ? text : `Unexpected failure: ${text}`;
}

/** Asks the user to wait for the operation that runs, and shows its message again a little later. */
export function sayWait() {
  const message = find("message", HTMLElement);
  const [before, hint] = [message.textContent ?? "", `Wait until this has ended: ${doing}`];
  if (before !== hint) {
    say(hint);
    setTimeout(() => message.textContent === hint && say(before), WAIT_SHOWN_MS);
  }
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
  doing = text;
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
