/**
 * Resizing and cropping of decoded frames as FFmpeg's bilinear scaler does it, whatever the browser's canvas would do.
 *
 * Planes are resized before the conversion to RGB, as in `cdc_mmpg.media.frames.resize`: a decoder's YUV is the same in
 * every browser, its RGB is not.
 */

/**
 * @typedef {object} Plane
 * @property {Uint8Array | Uint16Array} data
 * @property {number} offset of the first sample
 * @property {number} stride samples from a line to the next
 * @property {number} step samples from a column to the next
 * @property {number} width
 * @property {number} height
 * @property {number} scale factor to values from 0 to 255
 */
/** @typedef {{planes: Plane[], matrix: string, isFullRange: boolean}} Picture planes R, G, B or Y, U, V */
/** @typedef {{pixels: Uint8ClampedArray, width: number, height: number}} Image RGB, three bytes a pixel */

/** Samples by which subsampled chroma lies left of the middle of its pixels, as H.264 and most encoders have it. */
const CHROMA_SHIFT = 0.25;

/** Coefficients of red and blue in luma; blue's and red's share of green follow. */
const MATRICES = { bt709: [0.2126, 0.0722], smpte170m: [0.299, 0.114], "bt2020-ncl": [0.2627, 0.0593] };

/**
 * Returns the indices of the frames to keep of `count`: `candidates` evenly spaced ones in each of several segments.
 * @param {number} count at least 1
 * @param {number} segments
 * @param {number} candidates
 */
export function chooseCandidates(count, segments, candidates) {
  const parts = segments * candidates;
  return Array.from({ length: parts }, (_, part) => Math.min(Math.floor(((part + 0.5) * count) / parts), count - 1));
}

/**
 * Resizes a picture such that its shorter side has `side` pixels, and converts it to RGB.
 * @param {Picture} picture
 * @param {number} side
 * @returns {Image}
 */
export function resize(picture, side) {
  const { width, height } = picture.planes[0];
  const scale = side / Math.min(width, height);
  const newWidth = Math.max(side, roundHalfToEven(width * scale));
  const newHeight = Math.max(side, roundHalfToEven(height * scale));
  // As in FFmpeg, two neighbours share their chroma, unless every pixel of the clip has its own or the width is odd.
  const isSubsampled = picture.planes[1].width < width;
  const share = isSubsampled && newWidth % 2 === 0 ? 2 : 1;
  const chromaWidth = Math.ceil(newWidth / share);
  const shift = isSubsampled ? CHROMA_SHIFT : 0;
  const [first, second, third] = picture.planes.map((plane, i) =>
    resizePlane(plane, i > 0 ? chromaWidth : newWidth, newHeight, i > 0 ? shift : 0),
  );
  const pixels = new Uint8ClampedArray(3 * newWidth * newHeight);
  const convert = share > 1 ? makeCoarseConversion(picture) : makeConversion(picture);
  for (let y = 0; y < newHeight; y++) {
    for (let x = 0; x < newWidth; x++) {
      const i = y * newWidth + x;
      const j = y * chromaWidth + Math.floor(x / share);
      pixels.set(convert(first[i], second[j], third[j]), 3 * i);
    }
  }
  return { pixels, width: newWidth, height: newHeight };
}

/**
 * Rounds as Python does.
 * @param {number} value
 */
function roundHalfToEven(value) {
  return value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value);
}

/**
 * Rotates an image clockwise.
 * @param {Image} image
 * @param {number} degrees a multiple of 90
 * @returns {Image}
 */
export function rotate(image, degrees) {
  let rotated = image;
  for (let turn = 0; turn < degrees / 90; turn++) {
    const { pixels, width, height } = rotated;
    const turned = new Uint8ClampedArray(pixels.length);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const from = 3 * (y * width + x);
        turned.set(pixels.subarray(from, from + 3), 3 * (x * height + height - 1 - y));
      }
    }
    rotated = { pixels: turned, width: height, height: width };
  }
  return rotated;
}

/**
 * Returns the square in the middle of an image.
 * @param {Image} image
 * @param {number} size
 */
export function cropMiddle(image, size) {
  const top = Math.floor((image.height - size) / 2);
  const left = Math.floor((image.width - size) / 2);
  const square = new Uint8Array(3 * size * size);
  for (let row = 0; row < size; row++) {
    const start = 3 * ((top + row) * image.width + left);
    square.set(image.pixels.subarray(start, start + 3 * size), 3 * row * size);
  }
  return square;
}

/**
 * Resizes a plane: a triangle filter, as wide as two pixels of the coarser grid.
 * @param {Plane} plane
 * @param {number} width
 * @param {number} height
 * @param {number} shift samples that the plane lies further left
 */
function resizePlane(plane, width, height, shift) {
  const { data, offset, stride, step, scale } = plane;
  const columns = computeWeights(plane.width, width, shift);
  const rows = computeWeights(plane.height, height, 0);
  const narrow = new Float32Array(plane.height * width);
  for (let y = 0; y < plane.height; y++) {
    const line = offset + y * stride;
    for (let x = 0; x < width; x++) {
      const { start, weights } = columns[x];
      let sum = 0;
      for (let k = 0; k < weights.length; k++) {
        sum += weights[k] * data[line + (start + k) * step];
      }
      narrow[y * width + x] = sum * scale;
    }
  }
  const small = new Float32Array(height * width);
  for (let y = 0; y < height; y++) {
    const { start, weights } = rows[y];
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) {
        sum += weights[k] * narrow[(start + k) * width + x];
      }
      small[y * width + x] = sum;
    }
  }
  return small;
}

/**
 * Returns for each new position the first old one that contributes and the weights from there on.
 * @param {number} oldLength
 * @param {number} newLength
 * @param {number} shift
 */
function computeWeights(oldLength, newLength, shift) {
  const ratio = oldLength / newLength;
  const radius = Math.max(1, ratio);
  return Array.from({ length: newLength }, (_, position) => {
    const centre = (position + 0.5) * ratio - 0.5 + shift;
    const start = Math.max(0, Math.ceil(centre - radius));
    const end = Math.min(oldLength - 1, Math.floor(centre + radius));
    /** @type {number[]} */
    const weights = [];
    for (let old = Math.ceil(centre - radius); old <= Math.floor(centre + radius); old++) {
      const inside = Math.min(Math.max(old, start), end); // the edge is repeated
      weights[inside - start] = (weights[inside - start] ?? 0) + Math.max(0, 1 - Math.abs(old - centre) / radius);
    }
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

/**
 * Returns the shares of the colors in luma.
 * @param {string} matrix
 */
function findCoefficients(matrix) {
  const [red, blue] = MATRICES[/** @type {keyof typeof MATRICES} */ (matrix)] ?? MATRICES.smpte170m;
  return { red, green: 1 - red - blue, blue };
}

/**
 * Returns the conversion of the values in a picture's planes to RGB.
 * @param {Picture} picture
 * @returns {(first: number, second: number, third: number) => [number, number, number]}
 */
function makeConversion({ matrix, isFullRange }) {
  if (matrix === "rgb") {
    return (...values) => values;
  }
  const { red, green, blue } = findCoefficients(matrix);
  const [black, lumaGain, chromaGain] = isFullRange ? [0, 1, 1] : [16, 255 / 219, 255 / 224];
  return (y, u, v) => {
    const luma = (y - black) * lumaGain;
    const cb = 2 * (1 - blue) * (u - 128) * chromaGain;
    const cr = 2 * (1 - red) * (v - 128) * chromaGain;
    return [luma + cr, luma - (blue * cb + red * cr) / green, luma + cb];
  };
}

/**
 * Returns the conversion that FFmpeg uses where two pixels share their chroma: from tables, in whole steps of luma.
 * @param {Picture} picture
 * @returns {(y: number, u: number, v: number) => [number, number, number]}
 */
function makeCoarseConversion({ matrix, isFullRange }) {
  const { red, green, blue } = findCoefficients(matrix);
  const lumaGain = isFullRange ? 1 : 255 / 219;
  const black = isFullRange ? 0 : 326 * lumaGain - 400; // FFmpeg's table begins at luma -326, and at -400
  const chromaGain = (isFullRange ? 1 : 255 / 224) / lumaGain;
  const gains = [2 * (1 - red), (-2 * (1 - blue) * blue) / green, (-2 * (1 - red) * red) / green, 2 * (1 - blue)];
  const [crToRed, cbToGreen, crToGreen, cbToBlue] = gains.map((gain) => gain * chromaGain);
  const count = (/** @type {number} */ chroma, /** @type {number} */ gain) =>
    Math.floor(chroma * gain) - Math.floor(128 * gain);
  const look = (/** @type {number} */ index) => Math.round(lumaGain * index + black);
  return (...values) => {
    const [y, u, v] = values.map(Math.round);
    return [
      look(y + count(v, crToRed)),
      look(y + count(u, cbToGreen) + count(v, crToGreen)),
      look(y + count(u, cbToBlue)),
    ];
  };
}
