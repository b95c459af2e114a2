/** `await device.answer(file, question)`: sessions, layer requests, and what happens without a cloud. */
import { loadBundle } from "./bundle.js";
import { Connection, LayerUnavailable, RequestStopped, parseAddress } from "./connection.js";
import { DeviceError, describe } from "./errors.js";
import { decodeFrames } from "./media.js";
import { DeviceModel } from "./model.js";
import { MAX_SESSION_CLIPS, StoredSession, encodeCountedUpload } from "./session.js";
import { WeightsRejected, areEqual, decodeLayer } from "./wire.js";

const FAILURE_PAUSE_MS = [1_000, 300_000]; // first and longest pause after failed requests; doubled after each failure
const MAX_LAYER_MS = 30_000; // limit of a request for a session's layer that no answer waits for any more
const DEFAULT_DEADLINE_SECONDS = 2;
const MAX_DEADLINE_SECONDS = 86_400;
const MAX_SHOWN_CHARACTERS = 300;
const RANKED_ANSWERS = 5;

/** @typedef {import("./session.js").Layer} Layer */
/** @typedef {import("./session.js").Receipt} Receipt */

/**
 * @typedef {object} Answer
 * @property {string} text
 * @property {[string, number][]} ranked the best answers with their probabilities
 * @property {"adapted" | "kept" | "shared"} origin generated now, loaded from this browser, or shared by all devices
 * @property {number} anchors number of clips that the layer was generated from
 * @property {string} unadapted answer of the shared layer
 * @property {number} bytesUp bodies of the requests that were answered during this call
 * @property {number} bytesDown bodies of the replies that arrived during this call
 * @property {Record<string, number>} milliseconds by stage
 * @property {string} trouble why there is no newer layer; "" if nothing failed
 * @property {string[]} unknownWords words of the question and the choices that are read as [UNK]
 * @property {ImageData} frame the middle frame, as the model sees it
 */

/**
 * @typedef {object} Options
 * @property {string | null} [key] access key of the cloud, if it requires one
 * @property {boolean} [state] whether the session is kept in this browser
 * @property {number} [deadline] seconds that an answer waits for a layer
 * @property {(done: number, total: number, file: string) => void} [onProgress] of loading, in bytes
 */

/**
 * A device with a bundle: answers questions about clips, with a last layer from the cloud if one is available.
 *
 * It behaves as `cdc_mmpg.device.Device`, whose documentation holds. Calls are run one after another. Failures of the
 * cloud, the network and the storage never prevent an answer; a file that is no video does.
 */
export class Device {
  /**
   * Loads a bundle, and the session that this browser kept.
   * @param {string} bundle URL of the bundle's folder
   * @param {string | null} [cloud] URL of the service's root; null requests no layers
   * @param {Options} [options]
   * @throws {DeviceError} the bundle cannot be used
   */
  static async open(bundle, cloud = null, { key = null, state = false, deadline, onProgress } = {}) {
    const device = new Device(await DeviceModel.create(await loadBundle(bundle, onProgress)), deadline);
    device.cloud = cloud;
    device.key = key;
    if (state) {
      device.stored = new StoredSession(device.model);
      const { anchors, layer } = await device.stored.load();
      device.features = device.model.unit === "session" ? anchors : [];
      device.layer = (device.model.unit === "session" && layer) || device.layer;
      device.clipsSeen = Math.max(device.features.length, device.layer.anchors);
      device.clipsAtRequest = device.layer.anchors;
    }
    return device;
  }

  /**
   * @param {DeviceModel} model
   * @param {number} [deadline] seconds
   */
  constructor(model, deadline = DEFAULT_DEADLINE_SECONDS) {
    if (!(deadline > 0 && deadline <= MAX_DEADLINE_SECONDS)) {
      throw new DeviceError(`A deadline of ${deadline} seconds: it must be above 0 and at most ${MAX_DEADLINE_SECONDS}.`);
    }
    this.model = model;
    this.deadline = deadline;
    /** @type {StoredSession | null} */
    this.stored = null;
    this.connection = new Connection();
    /** @type {Layer} */
    this.shared = { matrix: model.shared, anchors: 0, origin: "shared" };
    this.layer = this.shared;
    /** @type {Float32Array[]} */
    this.features = []; // anchors of the session
    this.clipsSeen = 0;
    this.clipsAtRequest = 0; // number of clips when the layer was requested
    this.session = 0; // a layer that arrives late must not go to the next session
    /** @type {Promise<void> | null} */
    this.pending = null; // a request that is under way
    this.pause = FAILURE_PAUSE_MS[0];
    this.nextAttempt = 0;
    this.trouble = "";
    /** @type {Promise<unknown>} */
    this.queue = Promise.resolve();
  }

  /** Number of clips in the session. */
  get anchors() {
    return this.features.length;
  }

  get origin() {
    return this.layer.origin;
  }

  /** Why the session is not stored in this browser; "" if it is. */
  get storageTrouble() {
    return this.stored?.trouble ?? "";
  }

  get cloud() {
    return this.connection.url;
  }

  set cloud(url) {
    this.connection.url = url === null ? null : parseAddress(url);
    this.stopRequest();
  }

  get key() {
    return this.connection.key;
  }

  set key(key) {
    if (key !== null && !/^[!-~]+$/.test(key)) {
      throw new DeviceError("The key is empty, or has a blank or a letter that is not ASCII: copy it again.");
    }
    this.connection.key = key;
    this.stopRequest();
  }

  /** Bytes in the bodies of all requests that were answered. */
  get bytesUp() {
    return this.connection.bytesUp;
  }

  /** Bytes in the bodies of all replies. */
  get bytesDown() {
    return this.connection.bytesDown;
  }

  /**
   * Answers a question about a clip, or chooses one of several answers.
   * @param {Blob} file
   * @param {string} question
   * @param {string[]} [choices]
   * @returns {Promise<Answer>}
   * @throws {DeviceError} the clip cannot be decoded, or the question cannot be asked
   */
  answer(file, question, choices = []) {
    return this.enqueue(async () => {
      const clock = new StageClock();
      const end = performance.now() + 1000 * this.deadline;
      const { model, connection } = this;
      const texts = model.tokenize(question, choices);
      const [up, down] = [connection.bytesUp, connection.bytesDown];
      const frames = await clock.time("decode", () => decodeFrames(file, model.frames));
      const features = await clock.time("encode", () => model.encode(frames, texts));
      let layer;
      if (model.unit === "session") {
        await clock.time("anchor", async () => this.addAnchor(await model.encodeAnchor(frames)));
        await this.adapt(end, clock);
        layer = this.layer;
      } else {
        layer = await this.fetchSampleLayer(await model.computeUpload(features), end, clock);
      }
      const scores = await clock.time("answer", () => model.computeScores(features, layer.matrix));
      const plain = await model.computeScores(features, model.shared);
      const words = model.answers.length ? model.answers : choices;
      const ranked = rank(scores, words);
      return {
        text: ranked[0][0],
        ranked: ranked.slice(0, RANKED_ANSWERS),
        origin: layer.origin,
        anchors: layer.anchors,
        unadapted: rank(plain, words)[0][0],
        bytesUp: connection.bytesUp - up,
        bytesDown: connection.bytesDown - down,
        milliseconds: { ...clock.milliseconds },
        trouble: this.trouble,
        unknownWords: model.questions.findUnknownWords([question, ...choices]),
        frame: this.drawFrame(frames),
      };
    });
  }

  /**
   * Adds a clip to the session without a question; returns its middle frame.
   * @param {Blob} file
   * @returns {Promise<ImageData>}
   * @throws {DeviceError} the clip cannot be decoded
   */
  observe(file) {
    return this.enqueue(async () => {
      const frames = await decodeFrames(file, this.model.frames);
      if (this.model.unit === "session") {
        await this.addAnchor(await this.model.encodeAnchor(frames));
      }
      return this.drawFrame(frames);
    });
  }

  /**
   * Discards the clips and the layer, because the camera or its location changed.
   * @returns {Promise<void>}
   */
  newSession() {
    this.connection.stop();
    return this.enqueue(async () => {
      this.features = [];
      this.clipsSeen = this.clipsAtRequest = 0;
      this.layer = this.shared;
      this.session++;
      this.stopRequest();
      await this.stored?.clear();
    });
  }

  /** Stops requests, and frees the memory of the model; the device cannot be used afterwards. */
  close() {
    this.connection.stop();
    return this.enqueue(() => this.model.close());
  }

  /**
   * Runs a call after those before it.
   * @template T
   * @param {() => Promise<T>} call
   * @returns {Promise<T>}
   */
  enqueue(call) {
    const result = this.queue.then(call);
    this.queue = result.catch(() => {});
    return result;
  }

  /**
   * Adds the anchor of a clip to the session, unless it is already there.
   * @param {Float32Array} anchor
   */
  async addAnchor(anchor) {
    if (this.features.some((known) => areEqual(known, anchor))) {
      return;
    }
    this.features = [...this.features, Float32Array.from(anchor)].slice(-MAX_SESSION_CLIPS);
    this.clipsSeen++;
    await this.stored?.saveAnchors(this.features);
  }

  /** Whether enough clips were added for a new layer; each doubling halves the variance of the mean. */
  get isLayerDue() {
    const step = Math.min(Math.max(1, this.clipsAtRequest), MAX_SESSION_CLIPS);
    return this.clipsSeen >= this.clipsAtRequest + step;
  }

  /**
   * Requests a new layer for the session if one is due, and waits for it until `end`.
   * @param {number} end
   * @param {StageClock} clock
   */
  async adapt(end, clock) {
    if (this.cloud === null || !this.features.length) {
      return;
    }
    if (this.pending === null) {
      if (!this.isLayerDue || performance.now() < this.nextAttempt) {
        return;
      }
      const latest = Math.max(end, performance.now() + MAX_LAYER_MS);
      const request = this.fetchSessionLayer(latest, clock).finally(() => {
        if (this.pending === request) {
          this.pending = null;
        }
      });
      this.pending = request;
      await waitUntil(end, request);
    }
    if (this.pending !== null && !this.trouble) {
      this.trouble = "the cloud has not answered yet";
    }
  }

  /**
   * Requests a layer for the mean of the session's anchors, and installs it unless the session has ended.
   * @param {number} end
   * @param {StageClock} clock
   */
  async fetchSessionLayer(end, clock) {
    const { features, clipsSeen, session } = this;
    const mean = new Float32Array(features[0].length);
    features.forEach((feature) => feature.forEach((value, i) => (mean[i] += value / features.length)));
    try {
      const { layer, receipt } = await this.fetchLayer(mean, features.length, session, end, clock);
      if (session === this.session) {
        this.clearFailure();
        this.layer = layer;
        this.clipsAtRequest = clipsSeen;
        await clock.time("keep", async () => this.stored?.saveReceipt(receipt));
      }
    } catch (error) {
      if (session === this.session) {
        this.recordFailure(error);
      }
    }
  }

  /**
   * Returns the layer for a sample, or the shared layer if none arrives by `end`.
   * @param {Float32Array} feature
   * @param {number} end
   * @param {StageClock} clock
   * @returns {Promise<Layer>}
   */
  async fetchSampleLayer(feature, end, clock) {
    if (this.cloud === null || performance.now() < this.nextAttempt) {
      return this.shared;
    }
    try {
      const { layer } = await this.fetchLayer(feature, 1, this.session, end, clock);
      this.clearFailure();
      return layer;
    } catch (error) {
      this.recordFailure(error);
      return this.shared;
    }
  }

  /**
   * Returns a verified layer for a feature, and the receipt that proves its origin.
   * @param {Float32Array} feature
   * @param {number} anchors
   * @param {number} session
   * @param {number} end
   * @param {StageClock} clock
   * @returns {Promise<{layer: Layer, receipt: Receipt}>}
   */
  async fetchLayer(feature, anchors, session, end, clock) {
    const { model } = this;
    const { upload, salt } = await encodeCountedUpload(feature, anchors, model);
    const report = (/** @type {string} */ trouble) => {
      if (session === this.session) {
        this.trouble = this.makeSafe(trouble);
      }
    };
    const message = await this.connection.request(upload, model.messageBytes, end, clock.add.bind(clock), report);
    const { layout, versions, cloud } = model;
    const matrices = await clock.time("verify", () => decodeLayer(message, upload, layout, versions, cloud));
    const matrix = await clock.time("swap", async () => model.install(matrices));
    return { layer: { matrix, anchors, origin: "adapted" }, receipt: { message, upload, salt, anchors } };
  }

  /**
   * Records why there is no layer, and pauses further requests.
   * @param {unknown} error
   */
  recordFailure(error) {
    if (error instanceof RequestStopped) {
      return;
    }
    const text = describe(error);
    const isLayer = error instanceof WeightsRejected;
    const isKnown = isLayer || error instanceof LayerUnavailable;
    if (!isKnown) {
      console.error(error);
    }
    this.trouble = this.makeSafe(isLayer ? `the layer from the cloud was rejected (${text})` : text);
    this.nextAttempt = performance.now() + this.pause;
    this.pause = Math.min(2 * this.pause, FAILURE_PAUSE_MS[1]);
  }

  /** Stops the request that is under way, and forgets failures. */
  stopRequest() {
    this.connection.stop();
    this.pending = null;
    this.clearFailure();
  }

  /** Clears the recorded failure and the pause. */
  clearFailure() {
    this.trouble = "";
    this.pause = FAILURE_PAUSE_MS[0];
    this.nextAttempt = 0;
  }

  /**
   * Returns a text without the key and without control characters.
   * @param {string} text
   */
  makeSafe(text) {
    const safe = this.key === null ? text : text.replaceAll(this.key, "[secret]");
    return safe.replace(/\p{C}/gu, "?").slice(0, MAX_SHOWN_CHARACTERS);
  }

  /**
   * Returns the middle frame as an image.
   * @param {Uint8Array} frames
   */
  drawFrame(frames) {
    const { size } = this.model.frames;
    const middle = this.model.takeMiddle(frames);
    const image = new ImageData(size, size);
    for (let i = 0; i < size * size; i++) {
      image.data.set([...middle.subarray(3 * i, 3 * i + 3), 255], 4 * i);
    }
    return image;
  }
}

/** Milliseconds by stage; repeated stages add up. */
class StageClock {
  constructor() {
    /** @type {Record<string, number>} */
    this.milliseconds = {};
  }

  /**
   * Adds the duration of a call to a stage.
   * @template T
   * @param {string} stage
   * @param {() => Promise<T>} call
   */
  async time(stage, call) {
    const start = performance.now();
    try {
      return await call();
    } finally {
      this.add(stage, performance.now() - start);
    }
  }

  /**
   * Adds milliseconds to a stage.
   * @param {string} stage
   * @param {number} milliseconds
   */
  add(stage, milliseconds) {
    this.milliseconds[stage] = (this.milliseconds[stage] ?? 0) + milliseconds;
  }
}

/**
 * Returns all words with their probabilities, the best first.
 * @param {Float32Array} scores
 * @param {string[]} words
 */
function rank(scores, words) {
  const best = Math.max(...scores);
  const likely = Array.from(scores, (score) => Math.exp(score - best));
  const sum = likely.reduce((total, value) => total + value, 0);
  const pairs = words.map((word, i) => /** @type {[string, number]} */ ([word, likely[i] / sum]));
  return pairs.sort(([, left], [, right]) => right - left);
}

/**
 * Waits for a promise, at most until a time on the clock of `performance.now`.
 * @param {number} end
 * @param {Promise<void>} promise
 */
async function waitUntil(end, promise) {
  let timer;
  const limit = new Promise((resolve) => (timer = setTimeout(resolve, Math.max(0, end - performance.now()))));
  await Promise.race([promise, limit]);
  clearTimeout(timer);
}
