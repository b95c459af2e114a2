/** Inference with a bundle on onnxruntime: frames and questions -> features -> scores; the layer is an input. */
import { DeviceError, describe } from "./errors.js";
import { QuestionEncoder } from "./tokenizer.js";
import { InferenceSession, Tensor, env } from "./vendor/ort.mjs";
import { FEATURE_DIM, WeightsRejected, countMessageBytes, readNumbers } from "./wire.js";

const MAX_THREADS = 4; // more gain nothing at this size

env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url) };
// Threads need shared memory, which browsers give to pages that isolate themselves from other origins.
env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;

/** @typedef {{values: Float32Array, texts: number, frames: number}} Features (K, T, 192) of a clip with K texts */

export class DeviceModel {
  /**
   * Loads the graphs of a bundle.
   * @param {import("./bundle.js").Bundle} bundle
   * @throws {DeviceError} a file cannot be used
   */
  static async create(bundle) {
    try {
      const options = { executionProviders: ["wasm"], logSeverityLevel: /** @type {3} */ (3) };
      const encoder = await InferenceSession.create(bundle.files["encoder.onnx"], options);
      const head = await InferenceSession.create(bundle.files["head.onnx"], options);
      return new DeviceModel(bundle, encoder, head);
    } catch (error) {
      throw new DeviceError(`The model cannot be started (${describe(error)}): export again.`, { cause: error });
    }
  }

  /**
   * @param {import("./bundle.js").Bundle} bundle
   * @param {InferenceSession} encoder
   * @param {InferenceSession} head
   */
  constructor({ settings, layout, versions, cloud, files }, encoder, head) {
    this.task = settings.task;
    this.unit = settings.unit;
    this.name = settings.name;
    this.precision = settings.precision;
    this.frames = settings.frames;
    this.layout = layout;
    this.versions = versions;
    this.cloud = cloud;
    this.messageBytes = countMessageBytes(layout);
    this.threads = env.wasm.numThreads ?? 1;
    /** @type {string[]} */
    this.answers = JSON.parse(new TextDecoder().decode(files["answers.json"]));
    if (this.answers.length !== (this.task === "open_ended" ? layout.outputs : 0)) {
      throw new DeviceError(`The bundle has ${this.answers.length} answers, not ${layout.outputs}`);
    }
    this.encoder = encoder;
    this.head = head;
    this.questions = new QuestionEncoder(files["tokenizer.json"], settings.text.length, settings.text.known);
    const precision = settings.precision === "int8" ? "float16" : "float32";
    const size = layout.outputs * layout.columns;
    /** Layer (L, D + 1) shared by all devices. */
    this.shared = readNumbers(files["shared.bin"], 0, size, precision);
    this.basis = layout.kind === "basis" ? readNumbers(files["basis.bin"], 0, layout.number * size, precision) : null;
  }

  /** Frees the memory of the graphs. */
  async close() {
    await Promise.all([this.encoder.release(), this.head.release()]);
  }

  /**
   * Returns the ids of the question, or for multiple choice of the question with each choice.
   * @param {string} question
   * @param {string[]} choices
   * @throws {DeviceError} the question is empty, or the choices do not match the bundle's task
   */
  tokenize(question, choices) {
    if (![question, ...choices].every((text) => typeof text === "string" && text.isWellFormed())) {
      throw new DeviceError("A question or a choice is not text.");
    }
    if (this.task === "open_ended") {
      if (choices.length || !question.trim()) {
        throw new DeviceError("This model answers open-ended questions: ask one, and give no choices.");
      }
      return [this.questions.encode(question)];
    }
    if (choices.length < 2) {
      throw new DeviceError("This model answers multiple-choice questions: give at least two choices.");
    }
    return this.questions.encodeChoices(question, choices);
  }

  /**
   * Encodes frames (T, S, S, 3) with each of K texts.
   * @param {Uint8Array} frames
   * @param {number[][]} texts
   * @returns {Promise<Features>}
   */
  async encode(frames, texts) {
    const { size } = this.frames;
    const number = frames.length / (3 * size * size);
    const values = new Float32Array(texts.length * number * FEATURE_DIM);
    for (const [i, ids] of texts.entries()) {
      const { features } = await this.encoder.run({
        frames: new Tensor("uint8", frames, [number, size, size, 3]),
        ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      });
      values.set(/** @type {Float32Array} */ (features.data), i * number * FEATURE_DIM);
    }
    return { values, texts: texts.length, frames: number };
  }

  /**
   * Returns a clip's anchor feature (192): its middle frame encoded with the neutral prompt.
   * @param {Uint8Array} frames
   */
  async encodeAnchor(frames) {
    return this.computeUpload(await this.encode(this.takeMiddle(frames), [this.questions.encodeNeutral()]));
  }

  /**
   * Returns the middle frame.
   * @param {Uint8Array} frames
   */
  takeMiddle(frames) {
    const length = 3 * this.frames.size ** 2;
    const middle = Math.floor(frames.length / length / 2);
    return frames.slice(middle * length, (middle + 1) * length);
  }

  /**
   * Computes the upload (192) from features.
   * @param {Features} features
   */
  async computeUpload(features) {
    return this.run("upload", features, this.shared);
  }

  /**
   * Computes the scores of all answers or choices with a last layer.
   * @param {Features} features
   * @param {Float32Array} layer
   */
  async computeScores(features, layer) {
    return this.run("scores", features, layer);
  }

  /**
   * Runs the head for one of its outputs.
   * @param {"scores" | "upload"} output
   * @param {Features} features
   * @param {Float32Array} layer
   */
  async run(output, features, layer) {
    const inputs = {
      features: new Tensor("float32", features.values, [features.texts, features.frames, FEATURE_DIM]),
      layer: new Tensor("float32", layer, [this.layout.outputs, this.layout.columns]),
    };
    return /** @type {Float32Array} */ ((await this.head.run(inputs, [output]))[output].data);
  }

  /**
   * Returns the last layer built from received matrices and the layers in the bundle.
   * @param {import("./wire.js").Matrix[]} matrices
   * @throws {WeightsRejected} a weight of the layer is not finite
   */
  install([first, second]) {
    let layer;
    if (this.layout.kind === "low_rank") {
      layer = Float32Array.from(this.shared, (value, i) => {
        const [output, column] = [Math.floor(i / this.layout.columns), i % this.layout.columns];
        for (let rank = 0; rank < first.rows; rank++) {
          value += first.values[rank * first.columns + output] * second.values[rank * second.columns + column];
        }
        return value;
      });
    } else if (this.basis !== null) {
      const { basis, shared } = this;
      layer = Float32Array.from(shared, (value, i) =>
        first.values.reduce((sum, coefficient, k) => sum + coefficient * basis[k * shared.length + i], value),
      );
    } else {
      layer = first.values;
    }
    if (!layer.every(Number.isFinite)) {
      throw new WeightsRejected("finite", "a weight of the layer is not finite");
    }
    return layer;
  }
}
