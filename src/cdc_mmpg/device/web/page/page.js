/** The page: opens the device, and connects buttons and settings to what they do. */
import { describeLayout } from "./answer.js";
import { askAbout, beginSession, getDevice, getSession, requireDevice, setDevice } from "./asking.js";
import { closeCamera, useCamera } from "./camera.js";
import { DEADLINE_SECONDS, checkCloud, noteTrouble } from "./cloud.js";
import { clearClips, getSelected, observeClips, showClips } from "./clips.js";
import { loadDemo, playDemo } from "./demo.js";
import { find, setText } from "./elements.js";
import { DeviceError } from "../errors.js";
import { describeError, run, say } from "./operations.js";

const BUNDLES = ["device-int8", "device"];
const CLOUD = "."; // the service that served this page

const [question, choices] = [find("question", HTMLInputElement), find("choices", HTMLTextAreaElement)];
const [useCloud, key] = [find("use-cloud", HTMLInputElement), find("key", HTMLInputElement)];
const settings = find("settings", HTMLDetailsElement);

/**
 * Returns the bundle that the address asks for.
 * @returns {string}
 */
function chooseBundle() {
  const name = new URLSearchParams(location.search).get("bundle");
  return BUNDLES.find((known) => known === name) ?? "device-int8";
}

/**
 * Opens the device, and describes it in the header.
 * @returns {Promise<string>}
 */
async function openDevice() {
  const started = performance.now();
  const progress = find("load-progress", HTMLProgressElement);
  /** @type {(done: number, total: number, name: string) => void} */
  const onProgress = (done, all) => {
    [progress.max, progress.value] = [Math.max(all, 1), done];
    setText("load-text", `${(done / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB`);
  };
  try {
    const { Device } = await import("../device.js");
    setDevice(await Device.open(`${chooseBundle()}/`, null, { state: true, deadline: DEADLINE_SECONDS, onProgress }));
  } catch (error) {
    setText("model-name", "not loaded");
    setText("load-error", describeError(error));
    find("load-error", HTMLElement).hidden = !window.isSecureContext; // the notice above it says why
    throw error;
  }
  const device = requireDevice();
  progress.hidden = true;
  setText("model-name", device.model.name);
  setText("threads", String(device.model.threads));
  setText("layer-kind", describeLayout(device.model));
  find("choices-part", HTMLElement).hidden = device.model.task !== "multiple_choice";
  find("answer-how", HTMLElement).hidden = device.model.unit === "sample"; // it describes sessions
  applySettings();
  showClips();
  return `The model is ready after ${((performance.now() - started) / 1000).toFixed(1)} seconds.`;
}

/** Gives the device the cloud and the key of the settings. */
function applySettings() {
  const device = getDevice();
  if (device) {
    try {
      device.cloud = useCloud.checked ? CLOUD : null;
      device.key = key.value || null;
    } catch (error) {
      say(describeError(error), true);
    }
  }
}

/**
 * Asks the question about the selected clip.
 * @returns {Promise<string>}
 */
async function ask() {
  const open = requireDevice();
  const clip = getSelected();
  if (!clip) {
    throw new DeviceError("Choose a clip first.");
  }
  const [text, { name }] = [question.value.trim(), clip.file];
  if (!text && open.model.task === "open_ended") {
    question.focus();
    throw new DeviceError("Type a question first.");
  }
  const listed = choices.value.split("\n").map((choice) => choice.trim()).filter(Boolean);
  try {
    await askAbout(open, clip.file, name, text, open.model.task === "multiple_choice" ? listed : []);
    [clip.session, clip.failed] = [open.model.unit === "session" ? getSession() : -1, false];
  } catch (error) {
    clip.failed ||= describeError(error).startsWith(name); // else the question or the choices are wrong
    throw error;
  } finally {
    showClips();
  }
  if (matchMedia("(pointer: coarse)").matches) {
    question.blur(); // the screen keyboard would cover the answer
  }
  find("answer", HTMLElement).scrollIntoView({ block: "nearest" });
  return "Answered.";
}

/** Has the page and the bundle kept for use without a network; a browser that refuses this works all the same. */
async function keepForOfflineUse() {
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  await navigator.serviceWorker?.register("service-worker.js").catch(() => {});
  const { active } = (await navigator.serviceWorker?.ready) ?? {};
  active?.postMessage([location.href, ...loaded]);
}

// Events

/** @type {[string, string, () => Promise<string>][]} */
const operations = [
  ["observe", "Adding to the session.", observeClips],
  ["new-session", "Beginning a new session.", beginSession],
  ["demo-play", "Playing the demo session.", playDemo],
];
for (const [id, text, operation] of operations) {
  find(id, HTMLElement).addEventListener("click", () => void run(text, operation));
}
find("camera", HTMLElement).addEventListener("click", () => void useCamera());
find("camera-close", HTMLElement).addEventListener("click", closeCamera);
find("clear-clips", HTMLElement).addEventListener("click", () => {
  clearClips();
  find("files", HTMLElement).focus();
});
find("ask-form", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  const wait = useCloud.checked ? `; the cloud is waited for at most ${DEADLINE_SECONDS} seconds` : "";
  void run(`Answering${wait}.`, ask);
});
find("settings-form", HTMLFormElement).addEventListener("submit", (event) => event.preventDefault());
useCloud.addEventListener("change", () => {
  applySettings();
  void checkCloud();
});
key.addEventListener("change", () => {
  say(key.value ? "The next answers show whether the service accepts this access key." : "No access key is sent.");
  applySettings();
  noteTrouble("");
});
document.addEventListener("reachable", applySettings); // so that the device tries again at once
settings.addEventListener("toggle", () => settings.open && settings.scrollIntoView({ block: "nearest" }));

for (const name of BUNDLES) {
  if (name === chooseBundle()) {
    find(`bundle-${name}`, HTMLElement).setAttribute("aria-current", "true");
  }
}
find("insecure", HTMLElement).hidden = window.isSecureContext;
void checkCloud();
void loadDemo();
void run("Loading the model.", openDevice).then(keepForOfflineUse);
