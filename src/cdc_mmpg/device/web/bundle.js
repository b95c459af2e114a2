/** Device bundles of `make export`, fetched and verified: every file has its SHA-256 in bundle.json. */
import { readParts } from "./connection.js";
import { DeviceError, describe } from "./errors.js";
import { LAYER_KINDS, concatenate, fromHex, hash, toHex } from "./wire.js";

const BUNDLE_FORMAT = 3;
const FILES = ["encoder.onnx", "head.onnx", "shared.bin", "tokenizer.json", "answers.json"];

/**
 * @typedef {object} Settings content of bundle.json
 * @property {number} format
 * @property {string} name dataset and method
 * @property {"open_ended" | "multiple_choice"} task
 * @property {"session" | "sample"} unit
 * @property {[string, number, number, number]} layout kind, outputs, columns, number
 * @property {string} encoder
 * @property {string} generator
 * @property {string} public_key
 * @property {{number: number, candidates: number, size: number, side: number}} frames
 * @property {{length: number, known: number}} text
 * @property {"float32" | "int8"} precision
 * @property {Record<string, string>} files digests by name
 */

/**
 * @typedef {object} Bundle
 * @property {Settings} settings
 * @property {import("./wire.js").Layout} layout
 * @property {import("./wire.js").Versions} versions
 * @property {CryptoKey} cloud public key that verifies layers
 * @property {Record<string, import("./wire.js").Bytes>} files
 */

/**
 * Fetches a bundle and verifies it.
 * @param {string} url folder of the bundle
 * @param {(done: number, total: number, file: string) => void} [onProgress] called with bytes
 * @returns {Promise<Bundle>}
 * @throws {DeviceError} the bundle is missing, damaged, or of another format; or the browser is too old
 */
export async function loadBundle(url, onProgress = () => {}) {
  if (!globalThis.crypto?.subtle) {
    throw new DeviceError(
      "This page was opened over http, where browsers offer no signatures and no camera. Use https (start the " +
        "service with CERTIFICATE=), or localhost.",
    );
  }
  const folder = new URL(url.endsWith("/") ? url : `${url}/`, globalThis.location?.href);
  const settings = await readSettings(folder);
  const names = Object.keys(settings.files);
  const replies = await Promise.all(names.map((name) => request(new URL(name, folder))));
  const total = replies.reduce((sum, reply) => sum + Number(reply.headers.get("content-length") ?? 0), 0);
  let done = 0;
  /** @type {Record<string, import("./wire.js").Bytes>} */
  const files = {};
  await Promise.all(
    names.map(async (name, i) => {
      files[name] = await readBody(replies[i], (bytes) => onProgress((done += bytes), total, name));
      if (toHex(await hash(files[name])) !== settings.files[name]) {
        throw new DeviceError(`${name} was changed since the export, or is of another export: load the page again.`);
      }
    }),
  );
  return parseBundle(settings, files);
}

/**
 * Parses the settings of a bundle.
 * @param {Settings} settings
 * @param {Record<string, import("./wire.js").Bytes>} files
 * @returns {Promise<Bundle>}
 * @throws {DeviceError} the browser is too old
 */
export async function parseBundle(settings, files) {
  const [kind, outputs, columns, number] = settings.layout;
  const versions = { encoder: fromHex(settings.encoder), generator: fromHex(settings.generator) };
  try {
    const cloud = await crypto.subtle.importKey("raw", fromHex(settings.public_key), "Ed25519", false, ["verify"]);
    return { settings, layout: { kind, outputs, columns, number }, versions, cloud, files };
  } catch (error) {
    throw new DeviceError("This browser cannot verify Ed25519 signatures: use a newer one.", { cause: error });
  }
}

/**
 * Reads and checks bundle.json.
 * @param {URL} folder
 * @returns {Promise<Settings>}
 */
async function readSettings(folder) {
  const reply = await request(new URL("bundle.json", folder));
  let settings;
  try {
    settings = await reply.json();
  } catch {
    throw new DeviceError(`${folder} holds no bundle: run make export.`);
  }
  if (settings.format !== BUNDLE_FORMAT) {
    throw new DeviceError(
      `The bundle has format ${settings.format}, this page reads format ${BUNDLE_FORMAT}: export again.`,
    );
  }
  const { digest, ...rest } = settings;
  if (toHex(await hash(new TextEncoder().encode(encodeCanonically(rest)))) !== digest) {
    throw new DeviceError("bundle.json was changed since the export: export again.");
  }
  const expected = [...FILES, ...(rest.layout[0] === "basis" ? ["basis.bin"] : [])];
  if (!LAYER_KINDS.includes(rest.layout[0]) || expected.some((name) => !(name in rest.files))) {
    throw new DeviceError("bundle.json was not written by this version of make export: export again.");
  }
  return rest;
}

/**
 * Encodes JSON as the digest of bundle.json was computed: sorted keys, no blanks, ASCII only.
 * @param {unknown} value
 * @returns {string}
 */
function encodeCanonically(value) {
  if (Array.isArray(value)) {
    return `[${value.map(encodeCanonically).join(",")}]`;
  }
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value).sort(([left], [right]) => (left < right ? -1 : 1));
    return `{${entries.map(([name, part]) => `${encodeCanonically(name)}:${encodeCanonically(part)}`).join(",")}}`;
  }
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/**
 * Fetches a file of the bundle.
 * @param {URL} url
 */
async function request(url) {
  let reply;
  try {
    reply = await fetch(url);
  } catch (error) {
    throw new DeviceError(`The bundle cannot be loaded (${describe(error)}): is the service running?`);
  }
  if (!reply.ok) {
    throw new DeviceError(`${url.pathname} cannot be loaded (status ${reply.status}): run make export.`);
  }
  return reply;
}

/**
 * Reads the body of a reply.
 * @param {Response} reply
 * @param {(bytes: number) => void} onBytes called for each part
 */
async function readBody(reply, onBytes) {
  const parts = [];
  for await (const part of readParts(reply)) {
    parts.push(part);
    onBytes(part.length);
  }
  return concatenate(...parts);
}
