/**
 * Messages between device and cloud: a fixed header, a body of raw numbers, and on layers a signature.
 * The format is described in ../README.md; the Python code is cdc_mmpg.wire.
 */
import { DeviceError } from "./errors.js";

export const LAYER_PATH = "v1/layer"; // relative to the root of the service
export const FEATURE_DIM = 192;
export const DIGEST_BYTES = 16;
export const HEADER_BYTES = 68;
export const SIGNATURE_BYTES = 64;
export const UPLOAD_BYTES = HEADER_BYTES + 4 * FEATURE_DIM;
export const LAYER_KINDS = ["float32", "float16", "int8", "low_rank", "basis"];

const MAGIC = [0x43, 0x44, 0x43, 0x4d]; // "CDCM"
const MESSAGE_VERSION = 1;
const UPLOAD = 0;
const LAYER = 1;
const ENCODER_OFFSET = 8;
const GENERATOR_OFFSET = 24;
const NONCE_OFFSET = 40;
const SHAPE_OFFSET = 56;
const SAME_EXPORT = "use device and cloud bundles of the same export";

/** @typedef {Uint8Array<ArrayBuffer>} Bytes */
/** @typedef {{kind: string, outputs: number, columns: number, number: number}} Layout of a transmitted layer */
/** @typedef {{encoder: Bytes, generator: Bytes}} Versions digests of weights, 16 bytes each */
/** @typedef {{rows: number, columns: number, values: Float32Array}} Matrix */

/** A layer that the device refuses; it keeps the one in use. */
export class WeightsRejected extends DeviceError {
  /**
   * @param {string} reason name of the invalid part
   * @param {string} detail actual and expected value
   */
  constructor(reason, detail) {
    super(`${reason}: ${detail}`);
    this.reason = reason;
  }
}

/**
 * Returns the shapes [rows, columns] of the matrices in a payload.
 * @param {Layout} layout
 * @returns {[number, number][]}
 */
export function listShapes(layout) {
  if (layout.kind === "low_rank") {
    return [[layout.number, layout.outputs], [layout.number, layout.columns]];
  }
  return layout.kind === "basis" ? [[1, layout.number]] : [[layout.outputs, layout.columns]];
}

/**
 * Returns the number of bytes of a layer message.
 * @param {Layout} layout
 */
export function countMessageBytes(layout) {
  const bytes = { float32: 4, float16: 2 }[layout.kind] ?? 1;
  const scale = bytes === 1 ? 2 : 0; // an int8 matrix has a float16 scale per row
  const payload = listShapes(layout).reduce((sum, [rows, columns]) => sum + rows * (columns * bytes + scale), 0);
  return HEADER_BYTES + SIGNATURE_BYTES + payload;
}

/**
 * Returns the first 16 bytes of the SHA-256 of bytes.
 * @param {Bytes} content
 */
export async function computeDigest(content) {
  return (await hash(content)).slice(0, DIGEST_BYTES);
}

/**
 * Returns the SHA-256 of bytes.
 * @param {Bytes} content
 */
export async function hash(content) {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", content));
}

/**
 * Joins bytes.
 * @param {...Bytes} parts
 */
export function concatenate(...parts) {
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    joined.set(part, offset);
    offset += part.length;
  }
  return joined;
}

/**
 * Returns whether two arrays hold the same numbers.
 * @template {Uint8Array | Float32Array} T
 * @param {T} left
 * @param {T} right
 */
export function areEqual(left, right) {
  return left.length === right.length && left.every((value, i) => value === right[i]);
}

/**
 * Returns the hexadecimal form of bytes.
 * @param {Bytes} content
 */
export function toHex(content) {
  return Array.from(content, (value) => value.toString(16).padStart(2, "0")).join("");
}

/**
 * Parses hexadecimal digits.
 * @param {string} text
 */
export function fromHex(text) {
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/**
 * Encodes an anchor feature, or the mean of several, as an upload of 836 bytes.
 * @param {Float32Array} feature 192 values from -1 to 1
 * @param {Layout} layout layout of the requested layer
 * @param {Versions} versions versions of the device
 * @param {Bytes} nonce 16 bytes
 */
export function encodeUpload(feature, layout, versions, nonce) {
  if (feature.length !== FEATURE_DIM || !feature.every((value) => Math.abs(value) <= 1)) {
    throw new DeviceError(`The feature of this clip is not ${FEATURE_DIM} numbers from -1 to 1.`);
  }
  const content = new Uint8Array(UPLOAD_BYTES);
  const view = new DataView(content.buffer);
  content.set([...MAGIC, MESSAGE_VERSION, UPLOAD, LAYER_KINDS.indexOf(layout.kind), 0]);
  content.set(versions.encoder, ENCODER_OFFSET);
  content.set(versions.generator, GENERATOR_OFFSET);
  content.set(nonce, NONCE_OFFSET);
  [layout.outputs, layout.columns, layout.number].forEach((value, i) => {
    view.setUint32(SHAPE_OFFSET + 4 * i, value, true);
  });
  feature.forEach((value, i) => view.setFloat32(HEADER_BYTES + 4 * i, value, true));
  return content;
}

/**
 * Returns the nonce of a message.
 * @param {Bytes} message
 */
export function readNonce(message) {
  return message.slice(NONCE_OFFSET, SHAPE_OFFSET);
}

/**
 * Decodes and verifies a layer, and returns its matrices.
 * @param {Bytes} content untrusted bytes
 * @param {Bytes} upload upload that the layer must answer
 * @param {Layout} layout layout that was requested
 * @param {Versions} versions versions of this device
 * @param {CryptoKey} key public key of the cloud
 * @returns {Promise<Matrix[]>}
 * @throws {WeightsRejected} the layer is invalid; with the reason
 */
export async function decodeLayer(content, upload, layout, versions, key) {
  const expected = countMessageBytes(layout);
  if (content.length !== expected) {
    throw new WeightsRejected("length", `received ${content.length} bytes, expected ${expected}`);
  }
  checkHeader(content, layout, versions);
  if (!areEqual(readNonce(content), await computeDigest(upload))) {
    throw new WeightsRejected("nonce", "the layer answers a different upload");
  }
  const start = HEADER_BYTES + SIGNATURE_BYTES;
  const header = content.slice(0, HEADER_BYTES);
  const body = content.slice(start);
  const signed = concatenate(header, await hash(body));
  if (!(await crypto.subtle.verify("Ed25519", key, content.slice(HEADER_BYTES, start), signed))) {
    throw new WeightsRejected("signature", `changed in transit, or signed by another cloud: ${SAME_EXPORT}`);
  }
  return decodeMatrices(body, layout);
}

/**
 * Refuses the header of a layer that was not made for this device.
 * @param {Bytes} content
 * @param {Layout} layout
 * @param {Versions} versions
 */
function checkHeader(content, layout, versions) {
  const view = new DataView(content.buffer, content.byteOffset);
  if (!MAGIC.every((value, i) => content[i] === value)) {
    throw new WeightsRejected("magic", "the message does not start with CDCM");
  }
  if (content[4] !== MESSAGE_VERSION || content[7] !== 0) {
    throw new WeightsRejected("version", `format version ${content[4]}, expected ${MESSAGE_VERSION}`);
  }
  if (content[5] !== LAYER) {
    throw new WeightsRejected("message", `message type ${content[5]}, expected ${LAYER} (layer)`);
  }
  if (!areEqual(content.slice(ENCODER_OFFSET, GENERATOR_OFFSET), versions.encoder)) {
    throw new WeightsRejected("encoder", `the layer is for another encoder: ${SAME_EXPORT}`);
  }
  if (!areEqual(content.slice(GENERATOR_OFFSET, NONCE_OFFSET), versions.generator)) {
    throw new WeightsRejected("generator", `the layer is of another generator: ${SAME_EXPORT}`);
  }
  if (content[6] !== LAYER_KINDS.indexOf(layout.kind)) {
    throw new WeightsRejected("kind", `layer kind ${content[6]}, expected ${layout.kind}`);
  }
  [layout.outputs, layout.columns, layout.number].forEach((value, i) => {
    if (view.getUint32(SHAPE_OFFSET + 4 * i, true) !== value) {
      throw new WeightsRejected("shape", "outputs, columns and number are not those that were requested");
    }
  });
}

/**
 * Decodes a payload of the right length.
 * @param {Bytes} body
 * @param {Layout} layout
 * @returns {Matrix[]}
 */
function decodeMatrices(body, layout) {
  const matrices = [];
  let offset = 0;
  for (const [rows, columns] of listShapes(layout)) {
    const count = rows * columns;
    const precision = layout.kind === "float32" || layout.kind === "float16" ? layout.kind : "int8";
    const scales = precision === "int8" ? readNumbers(body, offset, rows, "float16") : null;
    offset += scales === null ? 0 : 2 * rows;
    const values = readNumbers(body, offset, count, precision);
    offset += count * { float32: 4, float16: 2, int8: 1 }[precision];
    if (scales !== null) {
      values.forEach((value, i) => (values[i] = value * scales[Math.floor(i / columns)]));
    }
    if (!values.every(Number.isFinite)) {
      throw new WeightsRejected("finite", "the payload contains a number that is not finite");
    }
    matrices.push({ rows, columns, values });
  }
  return matrices;
}

/**
 * Reads little-endian numbers as float32.
 * @param {Bytes} content
 * @param {number} offset in bytes
 * @param {number} count
 * @param {"float32" | "float16" | "int8"} precision
 */
export function readNumbers(content, offset, count, precision) {
  const view = new DataView(content.buffer, content.byteOffset);
  const read = {
    float32: (/** @type {number} */ i) => view.getFloat32(offset + 4 * i, true),
    float16: (/** @type {number} */ i) => decodeFloat16(view.getUint16(offset + 2 * i, true)),
    int8: (/** @type {number} */ i) => view.getInt8(offset + i),
  }[precision];
  return Float32Array.from({ length: count }, (_, i) => read(i));
}

/**
 * Returns the value of a float16; `DataView.getFloat16` is too new for many phones.
 * @param {number} bits
 */
function decodeFloat16(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) {
    return sign * fraction * 2 ** -24;
  }
  return exponent === 0x1f ? (fraction ? NaN : sign * Infinity) : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
