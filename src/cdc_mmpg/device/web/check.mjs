/**
 * Runs a bundle in wasm under Node.js, for `cdc_mmpg.deployment.checks`: node check.mjs <bundle> <folder>.
 *
 * The folder has cases.json: {texts: ids by case and choice, layers: index by case}, and frames.bin and layers.bin with
 * their numbers. The features of all cases are written to features.bin, the answers to answers.json.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseBundle } from "./bundle.js";
import { DeviceModel } from "./model.js";
import { env } from "./vendor/ort.mjs";

const [bundle, folder] = process.argv.slice(2);
const read = (/** @type {string | URL} */ path) => new Uint8Array(readFileSync(path));

env.wasm.wasmBinary = read(new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url)).buffer;
const settings = JSON.parse(readFileSync(join(bundle, "bundle.json"), "utf8"));
const files = Object.fromEntries(Object.keys(settings.files).map((name) => [name, read(join(bundle, name))]));
const model = await DeviceModel.create(await parseBundle(settings, files));
const cases = JSON.parse(readFileSync(join(folder, "cases.json"), "utf8"));
const frames = read(join(folder, "frames.bin"));
const layers = new Float32Array(read(join(folder, "layers.bin")).buffer);
const length = frames.length / cases.texts.length;
const answers = [];
const parts = [];
for (const [i, texts] of cases.texts.entries()) {
  const features = await model.encode(frames.slice(i * length, (i + 1) * length), texts);
  const start = cases.layers[i] * model.shared.length;
  const scores = await model.computeScores(features, layers.slice(start, start + model.shared.length));
  answers.push(scores.indexOf(Math.max(...scores)));
  parts.push(Buffer.from(features.values.buffer));
}
writeFileSync(join(folder, "features.bin"), Buffer.concat(parts));
writeFileSync(join(folder, "answers.json"), JSON.stringify(answers));
