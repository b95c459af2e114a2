/** The frames of a clip for the encoder: every clip is decoded from its start, as in `cdc_mmpg.media.video`. */
import { DeviceError } from "./errors.js";
import { chooseCandidates, cropMiddle, resize, rotate } from "./pixels.js";
import { ALL_FORMATS, BlobSource, EncodedPacketSink, Input, VideoSampleSink } from "./vendor/mediabunny.mjs";

export const MAX_CLIP_BYTES = 512 * 2 ** 20;
const MAX_PIXELS = 8192 * 8192; // of a frame
const MAX_PASSES = 3; // of decoding
const MAX_RATIO = 4; // of a frame's sides; the rest is cut off on both sides
/** Of the formats whose planes are read: luma samples per chroma sample across and down, and bits per sample. */
const FORMATS = {
  I420: [2, 2, 8], I422: [2, 1, 8], I444: [1, 1, 8], NV12: [2, 2, 8],
  I420P10: [2, 2, 10], I422P10: [2, 1, 10], I444P10: [1, 1, 10],
  I420P12: [2, 2, 12], I422P12: [2, 1, 12], I444P12: [1, 1, 12],
};

/** @typedef {{number: number, candidates: number, size: number, side: number}} FrameSettings of a bundle */
/** @typedef {import("./vendor/mediabunny.mjs").VideoSample} VideoSample */
/** @typedef {import("./vendor/mediabunny.mjs").InputVideoTrack} VideoTrack */

/**
 * Decodes the frames of a clip that the encoder sees, (T, S, S, 3) uint8 RGB.
 * @param {Blob} file
 * @param {FrameSettings} settings
 * @throws {DeviceError} the file is no video, or this browser cannot decode it
 */
export async function decodeFrames(file, settings) {
  const name = file instanceof File ? file.name : "The clip";
  if (file.size === 0) {
    throw new DeviceError(`${name} is an empty file.`);
  }
  if (file.size > MAX_CLIP_BYTES) {
    throw new DeviceError(`${name} has ${Math.round(file.size / 2 ** 20)} MiB, more than 512: cut a shorter clip.`);
  }
  const input = new Input({ source: new BlobSource(file), formats: ALL_FORMATS });
  try {
    return await decode(input, name, settings);
  } catch (error) {
    if (error instanceof DeviceError) {
      throw error;
    }
    console.info(error);
    throw new DeviceError(`${name} is damaged, or of a kind that this browser cannot decode.`, { cause: error });
  } finally {
    input.dispose();
  }
}

/**
 * Decodes the frames of an opened file.
 * @param {Input} input
 * @param {string} name
 * @param {FrameSettings} settings
 */
async function decode(input, name, settings) {
  if (!(await input.canRead())) {
    throw new DeviceError(`${name} is not a video that browsers open: use MP4, MOV, WebM or Matroska (not AVI or GIF).`);
  }
  const track = await input.getPrimaryVideoTrack();
  if (track === null) {
    throw new DeviceError(`${name} has no video in it.`);
  }
  if (!(await track.canDecode())) {
    const codec = (await track.getCodec()) ?? "an unknown codec";
    throw new DeviceError(`${name} is encoded with ${codec}, which this browser cannot decode: use H.264, VP9 or AV1.`);
  }
  if ((await track.getCodedWidth()) * (await track.getCodedHeight()) > MAX_PIXELS) {
    throw new DeviceError(`${name} has frames of more than ${MAX_PIXELS} pixels.`);
  }
  let expected = await countPackets(track);
  for (let pass = 0; pass < MAX_PASSES; pass++) { // a second one if some packets are not frames
    const chosen = chooseCandidates(expected, settings.number, settings.candidates);
    const middle = Array.from({ length: settings.number }, (_, segment) => {
      return chosen[segment * settings.candidates + Math.floor(settings.candidates / 2)];
    });
    const { count, squares } = await decodeSquares(track, new Set(middle), settings);
    if (count === 0) {
      throw new DeviceError(`${name}: none of its frames can be decoded.`);
    }
    if (count === 1 && (await input.getPrimaryAudioTrack()) !== null) {
      throw new DeviceError(`${name} has no video in it, only sound and one still picture.`);
    }
    if (count === expected) {
      const length = 3 * settings.size ** 2;
      const frames = new Uint8Array(settings.number * length);
      middle.forEach((index, i) => frames.set(/** @type {Uint8Array} */ (squares.get(index)), i * length));
      return frames;
    }
    expected = count;
  }
  throw new DeviceError(`${name}: each decoding gives another number of frames.`);
}

/**
 * Counts the packets that no edit list hides; they are usually frames.
 * @param {VideoTrack} track
 */
async function countPackets(track) {
  let count = 0;
  for await (const packet of new EncodedPacketSink(track).packets(undefined, undefined, { metadataOnly: true })) {
    count += packet.timestamp >= 0 ? 1 : 0;
  }
  return Math.max(1, count);
}

/**
 * Decodes a whole track; returns the number of its frames, and the wanted ones as squares by index.
 * @param {VideoTrack} track
 * @param {Set<number>} wanted
 * @param {FrameSettings} settings
 */
async function decodeSquares(track, wanted, settings) {
  /** @type {Map<number, Uint8Array>} */
  const squares = new Map();
  let count = 0;
  const [rotation, colorSpace] = [await track.getRotation(), await track.getColorSpace()];
  for await (const sample of new VideoSampleSink(track).samples()) {
    try {
      if (sample.timestamp < 0) { // hidden by an edit list
        continue;
      }
      if (wanted.has(count)) {
        const image = rotate(resize(await copyPicture(sample, colorSpace), settings.side), rotation);
        squares.set(count, cropMiddle(image, settings.size));
      }
      count++;
    } finally {
      sample.close();
    }
  }
  return { count, squares };
}

/**
 * Copies the planes of a frame, of a very long or wide one only the middle part.
 * @param {VideoSample} sample
 * @param {VideoColorSpaceInit} stated what the file says; browsers assume another matrix than FFmpeg where it is silent
 * @returns {Promise<import("./pixels.js").Picture>}
 */
async function copyPicture(sample, stated) {
  const rect = cutMiddle(sample.visibleRect);
  const format = FORMATS[/** @type {keyof typeof FORMATS} */ (sample.format)];
  if (format === undefined) {
    return copyRgb(sample, rect);
  }
  const [across, down, bits] = format;
  const bytes = new Uint8Array(sample.allocationSize({ rect }));
  const layout = await sample.copyTo(bytes, { rect });
  const size = bits > 8 ? 2 : 1;
  const data = bits > 8 ? new Uint16Array(bytes.buffer) : bytes;
  const isInterleaved = sample.format === "NV12";
  const planes = [0, 1, 2].map((i) => {
    const { offset, stride } = layout[isInterleaved ? Math.min(i, 1) : i];
    return {
      data,
      offset: offset / size + (isInterleaved && i === 2 ? 1 : 0),
      stride: stride / size,
      step: isInterleaved && i > 0 ? 2 : 1,
      width: i > 0 ? Math.ceil(rect.width / across) : rect.width,
      height: i > 0 ? Math.ceil(rect.height / down) : rect.height,
      scale: 2 ** (8 - bits),
    };
  });
  const isFullRange = stated.fullRange ?? sample.colorSpace.fullRange ?? false;
  return { planes, matrix: stated.matrix ?? "smpte170m", isFullRange };
}

/**
 * Copies a frame of another format, such as one in a phone's graphics memory, through the browser's conversion to RGB.
 * @param {VideoSample} sample
 * @param {DOMRectInit & {x: number, y: number, width: number, height: number}} rect
 */
async function copyRgb(sample, rect) {
  const frame = sample.toVideoFrame();
  const canvas = new OffscreenCanvas(rect.width, rect.height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  try {
    const bitmap = await createImageBitmap(frame, { imageOrientation: "none" });
    const across = bitmap.width / sample.visibleRect.width; // a sample aspect ratio stretches the bitmap
    const down = bitmap.height / sample.visibleRect.height;
    const left = (rect.x - sample.visibleRect.left) * across;
    const top = (rect.y - sample.visibleRect.top) * down;
    context.drawImage(bitmap, left, top, rect.width * across, rect.height * down, 0, 0, rect.width, rect.height);
    bitmap.close();
  } finally {
    frame.close();
  }
  const { data } = context.getImageData(0, 0, rect.width, rect.height);
  const planes = [0, 1, 2].map((offset) => {
    const bytes = new Uint8Array(data.buffer);
    return { data: bytes, offset, stride: 4 * rect.width, step: 4, width: rect.width, height: rect.height, scale: 1 };
  });
  return { planes, matrix: "rgb", isFullRange: true };
}

/**
 * Returns the middle part of a rectangle, at most `MAX_RATIO` times as long as it is wide, at even positions.
 * @param {{left: number, top: number, width: number, height: number}} rect
 */
function cutMiddle({ left, top, width, height }) {
  const limit = MAX_RATIO * Math.min(width, height);
  const [newWidth, newHeight] = [Math.min(width, limit), Math.min(height, limit)];
  const even = (/** @type {number} */ spare) => 2 * Math.floor(spare / 4);
  return { x: left + even(width - newWidth), y: top + even(height - newHeight), width: newWidth, height: newHeight };
}
