/** The camera: opening it, recording two seconds, closing it. */
import { addFiles, showClips, showPreview } from "./clips.js";
import { find } from "./elements.js";
import { DeviceError } from "../errors.js";
import { describeError, isBusy, run, say, sayWait } from "./operations.js";

const RECORDING_MS = 2000;
const RECORDING_TYPES = ["video/webm;codecs=vp8", "video/webm", "video/mp4"];

const preview = find("preview", HTMLVideoElement);
let stream = /** @type {MediaStream | null} */ (null); // while the camera is open
let opening = false; // while the browser asks the user
let recordings = 0;

/** Opens the camera; if it is open, records a clip. The page is not busy while the browser asks the user. */
export async function useCamera() {
  if (stream) {
    const camera = stream;
    await run("Recording two seconds.", () => recordClip(camera));
  } else if (isBusy()) {
    sayWait();
  } else if (!opening) {
    opening = true;
    await openCamera().catch((error) => say(describeError(error), true));
    opening = false;
  }
}

/** Opens the camera and shows its picture. */
async function openCamera() {
  if (!navigator.mediaDevices || !window.MediaRecorder) {
    throw new DeviceError("This browser gives this page no camera.");
  }
  say("Allow the camera in the browser's prompt.");
  try {
    const video = { facingMode: "environment", width: { ideal: 640 } };
    stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
  } catch (error) {
    const reason = error instanceof Error ? error.name : "";
    throw new DeviceError(
      reason === "NotAllowedError" ? "The camera was not allowed: change this in the browser's settings for this page."
        : reason === "NotFoundError" ? "No camera was found."
          : `The camera could not be opened (${reason}).`,
    );
  }
  stream.getVideoTracks()[0]?.addEventListener("ended", () => closeCamera());
  URL.revokeObjectURL(preview.src);
  preview.removeAttribute("src");
  preview.srcObject = stream;
  preview.hidden = preview.controls = false;
  find("camera-close", HTMLElement).hidden = false;
  find("clip", HTMLElement).classList.remove("empty");
  find("camera", HTMLElement).textContent = "Record two seconds";
  showPreview();
  void preview.play().catch(() => {}); // a preview that does not play can still be recorded
  if (!isBusy()) {
    say("The camera is open. Point it at something and record.");
  }
}

/**
 * Records a clip from the camera, and selects it.
 * @param {MediaStream} camera
 * @returns {Promise<string>}
 */
async function recordClip(camera) {
  const mimeType = RECORDING_TYPES.find((type) => MediaRecorder.isTypeSupported(type)) ?? "";
  const recorder = new MediaRecorder(camera, mimeType ? { mimeType } : {});
  const parts = /** @type {Blob[]} */ ([]);
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const stopped = new Promise((resolve) => recorder.addEventListener("stop", resolve, { once: true }));
  recorder.start();
  setTimeout(() => recorder.state === "recording" && recorder.stop(), RECORDING_MS);
  await stopped;
  if (stream !== camera) {
    return "The camera was closed, and the unfinished clip discarded.";
  }
  const type = (recorder.mimeType || mimeType).split(";")[0] ?? "";
  const blob = new Blob(parts, { type });
  if (!blob.size) {
    throw new DeviceError("The camera recorded nothing.");
  }
  recordings += 1;
  addFiles([new File([blob], `camera-${recordings}.${type === "video/mp4" ? "mp4" : "webm"}`, { type })]);
  return "Recorded. Ask a question about the new clip, or record another one.";
}

/** Closes the camera, and shows the selected clip again. */
export function closeCamera() {
  if (!stream) {
    return;
  }
  stream.getTracks().forEach((track) => track.stop());
  stream = preview.srcObject = null;
  preview.controls = true;
  if (document.activeElement === find("camera-close", HTMLElement)) {
    find("camera", HTMLElement).focus();
  }
  find("camera-close", HTMLElement).hidden = true;
  find("camera", HTMLElement).textContent = "Use the camera";
  showPreview();
  showClips();
}

document.addEventListener("clips", closeCamera);
