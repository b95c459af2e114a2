/** The list of clips: choosing, selecting, previewing, adding them to the session without a question. */
import { getDevice, getSession, keepClip, requireDevice } from "./asking.js";
import { countOf, create, find, setText } from "./elements.js";
import { DeviceError } from "../errors.js";
import { breathe, describeError, isBusy, say, showProgress } from "./operations.js";

/** @typedef {{file: File, session: number}} Clip session: the last one that it was shown in, or -1 */

const VIDEO_NAME = /\.(mp4|m4v|webm|mov|mkv|avi)$/i;

const preview = find("preview", HTMLVideoElement);
let clips = /** @type {Clip[]} */ ([]);
let selected = /** @type {Clip | null} */ (null);

/** Returns the clip to ask about. */
export function getSelected() {
  return selected;
}

/** Empties the list. */
export function clearClips() {
  clips = [];
  select(null);
}

/**
 * Adds files to the list, and selects the first of them.
 * @param {Iterable<File>} files
 */
export function addFiles(files) {
  const [videos, others] = [/** @type {File[]} */ ([]), /** @type {File[]} */ ([])];
  for (const file of files) {
    (file.type.startsWith("video/") || VIDEO_NAME.test(file.name) ? videos : others).push(file);
  }
  const added = videos.map((file) => ({ file, session: -1 }));
  clips.push(...added);
  if (added[0]) {
    document.dispatchEvent(new Event("clips")); // the camera closes
    select(added[0]);
  }
  if (others.length) {
    say(`Not added, since no video: ${others.map(({ name }) => name).join(", ")}.`, true);
  } else if (added.length && !isBusy()) {
    say(`${countOf(added.length, "clip")} chosen. Ask a question.`);
  }
}

/**
 * Selects the clip to ask about.
 * @param {Clip | null} clip
 */
function select(clip) {
  selected = clip;
  showPreview();
  showClips();
}

/** Shows the selected clip in the preview, unless it shows the camera. */
export function showPreview() {
  if (preview.srcObject) {
    return;
  }
  URL.revokeObjectURL(preview.src);
  setText("preview-note", "");
  preview.hidden = !selected;
  if (selected) {
    preview.src = URL.createObjectURL(selected.file);
  } else {
    preview.removeAttribute("src");
  }
}

/** Shows the list of clips, and what the button under it would do. */
export function showClips() {
  const rows = clips.map((clip) => {
    const radio = document.createElement("input");
    [radio.type, radio.name, radio.checked] = ["radio", "clip", clip === selected];
    radio.addEventListener("change", () => {
      selected = clip;
      showPreview();
      showObserve();
    });
    const name = create("span", clip.file.name);
    [name.className, name.title] = ["file", clip.file.name];
    const mark = create("span", isInSession(clip) ? "in session" : "");
    mark.className = "soft";
    return create("label", "", radio, name, mark);
  });
  const focused = [...document.querySelectorAll("#clip-list input")].indexOf(document.activeElement ?? preview);
  find("clip-list", HTMLElement).replaceChildren(...rows);
  rows[focused]?.querySelector("input")?.focus();
  find("clips", HTMLElement).hidden = !clips.length;
  find("clip", HTMLElement).classList.toggle("empty", !clips.length);
  showObserve();
}

/**
 * Returns whether a clip was shown in the present session.
 * @param {Clip} clip
 */
function isInSession(clip) {
  return clip.session === getSession();
}

/**
 * Returns the clips that would join the session without a question: all others, or the selected one if it is the last.
 * @returns {Clip[]}
 */
function listUnlabelled() {
  const waiting = clips.filter((clip) => !isInSession(clip));
  return waiting.length > 1 ? waiting.filter((clip) => clip !== selected) : waiting;
}

/** Shows how many clips the button adds to the session. */
function showObserve() {
  const [button, waiting] = [find("observe", HTMLButtonElement), listUnlabelled()];
  const others = waiting.some((clip) => clip !== selected);
  button.hidden = getDevice()?.unit === "sample" || !waiting.length;
  button.textContent = others
    ? `Add ${countOf(waiting.length, "other clip")} without a question`
    : "Add to session without a question";
}

/**
 * Adds the unlabelled clips to the session; a clip that fails does not stop the others.
 * @returns {Promise<string>}
 */
export async function observeClips() {
  const open = requireDevice();
  const failures = /** @type {string[]} */ ([]);
  const waiting = listUnlabelled();
  for (const [i, clip] of waiting.entries()) {
    showProgress(i, waiting.length);
    say(`Adding clip ${i + 1} of ${waiting.length} to the session.`);
    try {
      await keepClip(open, clip.file.name, () => open.observe(clip.file));
      clip.session = getSession();
    } catch (error) {
      const [name, text] = [clip.file.name, describeError(error)];
      failures.push(text.includes(name) ? text : `${name}: ${text}`);
    }
    showClips();
    await breathe();
  }
  const count = waiting.length - failures.length;
  const added = count ? [`${countOf(count, "clip")} added to the session.`] : [];
  if (failures.length) {
    throw new DeviceError([...added, ...failures].join(" "));
  }
  return added.join("") || "All clips are in the session.";
}

find("files", HTMLInputElement).addEventListener("change", (event) => {
  const input = /** @type {HTMLInputElement} */ (event.currentTarget);
  addFiles(input.files ?? []);
  input.value = ""; // the same file can be chosen again
});
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    if (!(event instanceof DragEvent) || !event.dataTransfer?.types.includes("Files")) {
      return;
    }
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragenter" || type === "dragover");
    if (type === "drop") {
      addFiles(event.dataTransfer.files);
    }
  });
}
preview.addEventListener("error", () => {
  if (preview.hasAttribute("src")) {
    preview.hidden = true;
    setText("preview-note", "The browser cannot play this file. The model may still be able to read it.");
  }
});
