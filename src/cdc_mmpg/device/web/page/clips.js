/** The list of clips: choosing, selecting, previewing, adding them to the session without a question. */
import { getDevice, getSession, observe, requireDevice } from "./asking.js";
import { countOf, create, find, setText } from "./elements.js";
import { DeviceError } from "../errors.js";
import { breathe, describeError, isBusy, say, showProgress } from "./operations.js";

/** @typedef {{file: File, session: number, failed: boolean}} Clip session: the last one that saw it, or -1 */

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
  if (!isBusy()) {
    say("The list is empty. Choose clips.");
  }
}

/**
 * Adds files that the user chose to the list.
 * @param {Iterable<File>} files
 */
function chooseFiles(files) {
  document.dispatchEvent(new Event("clips")); // the camera closes
  addFiles(files);
}

/**
 * Adds files to the list unless they are in it, and selects the first of them.
 * @param {Iterable<File>} files
 */
export function addFiles(files) {
  const [videos, others] = [/** @type {File[]} */ ([]), /** @type {File[]} */ ([])];
  for (const file of files) {
    (file.type.startsWith("video/") || VIDEO_NAME.test(file.name) ? videos : others).push(file);
  }
  const chosen = videos.map((file) => findClip(file) ?? { file, session: -1, failed: false });
  const added = chosen.filter((clip) => !clips.includes(clip));
  clips.push(...added);
  const first = added[0] ?? chosen[0];
  if (first) {
    select(first);
  }
  const known = chosen.length - added.length;
  const sentences = [
    added.length ? `${countOf(added.length, "clip")} chosen. Ask a question.` : "",
    known ? `Already in the list: ${countOf(known, "clip")}.` : "",
    others.length ? `Not a video: ${others.map(({ name }) => name).join(", ")}.` : "",
  ];
  if (others.length || !isBusy()) {
    say(sentences.filter(Boolean).join(" "), others.length > 0);
  }
}

/**
 * Returns the clip of the list that was made from the same file.
 * @param {File} file
 */
function findClip({ name, size, lastModified }) {
  return clips.find(({ file }) => file.name === name && file.size === size && file.lastModified === lastModified);
}

/**
 * Selects the clip to ask about.
 * @param {Clip | null} clip
 */
function select(clip) {
  selected = clip;
  showPreview();
  showClips();
  document.querySelector("#clip-list label:has(:checked)")?.scrollIntoView({ block: "nearest" });
}

/** Shows the selected clip in the preview; if that shows the camera, says which clip is selected. */
export function showPreview() {
  if (preview.srcObject) {
    const about = selected ? `A question is about ${selected.file.name}.` : "Record a clip to ask about it.";
    setText("preview-note", `Live picture. ${about}`);
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
    const mark = create("span", clip.failed ? "failed" : isInSession(clip) ? "in session" : "");
    mark.className = clip.failed ? "trouble" : "soft";
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
  button.hidden = getDevice()?.model.unit === "sample" || !waiting.length;
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
  let added = 0;
  const waiting = listUnlabelled();
  for (const [i, clip] of waiting.entries()) {
    showProgress(i, waiting.length);
    say(`Adding clip ${i + 1} of ${waiting.length} to the session.`);
    try {
      added += Number(await observe(open, clip.file, clip.file.name));
      [clip.session, clip.failed] = [getSession(), false];
    } catch (error) {
      clip.failed = true;
      const [name, text] = [clip.file.name, describeError(error)];
      failures.push(text.includes(name) ? text : `${name}: ${text}`);
    }
    showClips();
    await breathe();
  }
  const known = waiting.length - failures.length - added;
  const sentences = [
    added ? `${countOf(added, "clip")} added to the session.` : "",
    known ? `Already in the session: ${countOf(known, "clip")}.` : "",
    ...failures,
  ];
  const text = sentences.filter(Boolean).join(" ");
  if (failures.length) {
    throw new DeviceError(text);
  }
  return text || "All clips are in the session.";
}

find("files", HTMLInputElement).addEventListener("change", (event) => {
  const input = /** @type {HTMLInputElement} */ (event.currentTarget);
  chooseFiles(input.files ?? []);
  input.value = ""; // the same file can be chosen again
});
document.addEventListener("session", showClips);
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    if (!(event instanceof DragEvent) || !event.dataTransfer?.types.includes("Files")) {
      return;
    }
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragenter" || type === "dragover");
    if (type === "drop") {
      chooseFiles(event.dataTransfer.files);
    }
  });
}
preview.addEventListener("error", () => {
  if (preview.hasAttribute("src")) {
    preview.hidden = true;
    setText("preview-note", "The browser cannot play this file. The model may still be able to read it.");
  }
});
