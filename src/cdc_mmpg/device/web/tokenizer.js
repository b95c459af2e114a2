/** Questions as WordPiece ids, [CLS] first and [SEP] last, cut to a length; the Python code is cdc_mmpg.media.text. */
import { DeviceError } from "./errors.js";
import { Tokenizer } from "./vendor/tokenizers.mjs";

// The words that BERT's pre-tokenizer separates: punctuation one by one, else runs without blanks.
const WORDS = /[\p{P}$+<=>^`|~]|[^\s\p{P}$+<=>^`|~]+/gu;

export class QuestionEncoder {
  /**
   * @param {Uint8Array} content a tokenizer.json
   * @param {number} length maximum number of ids of a text
   * @param {number} known number of known ids; others become [UNK]
   */
  constructor(content, length, known) {
    this.tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(content)), {});
    this.length = length;
    this.known = known;
    this.special = Object.fromEntries(
      ["[CLS]", "[SEP]", "[UNK]"].map((token) => [token, this.tokenizer.token_to_id(token) ?? 0]),
    );
  }

  /**
   * Returns the ids of a text.
   * @param {string} text
   */
  encode(text) {
    return [this.special["[CLS]"], ...this.encodeUncut(text).slice(0, this.length - 2), this.special["[SEP]"]];
  }

  /** Returns the ids of the prompt that serves as every question. */
  encodeNeutral() {
    return this.encode("[MASK] ".repeat(8));
  }

  /**
   * Returns the ids of a question with each of its candidates.
   *
   * If that is too long, the end of the question is cut, down to half of the length; then the end of the candidate. If
   * this makes two different candidates equal, their beginning is cut instead.
   * @param {string} text
   * @param {string[]} candidates
   * @throws {DeviceError} the candidates cannot be told apart
   */
  encodeChoices(text, candidates) {
    const question = this.encodeUncut(text);
    const options = candidates.map((candidate) => this.encodeUncut(candidate));
    const room = this.length - 2 - (question.length ? 1 : 0);
    const longest = Math.max(...options.map((ids) => ids.length));
    const kept = question.slice(0, Math.max(room - longest, Math.floor(room / 2)));
    const different = [...new Map(options.map((ids) => [ids.join(), ids])).values()];
    const windows = findWindows(different, room - kept.length);
    if (windows === null) {
      throw new DeviceError(`The choices are equal in their first ${this.length} word pieces: shorten them.`);
    }
    const cut = new Map(different.map((ids, i) => [ids.join(), windows[i]]));
    const { "[CLS]": cls, "[SEP]": sep } = this.special;
    const start = question.length ? [cls, ...kept, sep] : [cls];
    return options.map((ids) => [...start, ...(cut.get(ids.join()) ?? []), sep]);
  }

  /**
   * Returns the words of texts that are not in the vocabulary, in lower case.
   * @param {string[]} texts
   */
  findUnknownWords(texts) {
    const words = texts.flatMap((text) => text.match(WORDS) ?? []);
    const unknown = words.filter((word) => this.encodeUncut(word).includes(this.special["[UNK]"]));
    return [...new Set(unknown.map((word) => word.toLowerCase()))];
  }

  /**
   * Returns the ids of a text without [CLS] and [SEP].
   * @param {string} text
   */
  encodeUncut(text) {
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: false });
    return ids.map((id) => (id < this.known ? id : this.special["[UNK]"]));
  }
}

/**
 * Finds a window of `room` ids in each of several different texts such that they stay different; null if impossible.
 * @param {number[][]} texts
 * @param {number} room
 * @returns {number[][] | null}
 */
function findWindows(texts, room) {
  const starts = texts.map(() => 0);
  for (let attempt = 0; attempt <= texts.length ** 2; attempt++) {
    const windows = texts.map((text, i) => text.slice(starts[i], starts[i] + room));
    const keys = windows.map((ids) => ids.join());
    const second = keys.findIndex((key, i) => keys.indexOf(key) < i);
    if (second < 0) {
      return windows;
    }
    const pair = [keys.indexOf(keys[second]), second];
    const [left, right] = pair.map((i) => texts[i]);
    const shorter = Math.min(left.length, right.length);
    let common = 0;
    while (common < shorter && left[common] === right[common]) {
      common++;
    }
    pair.forEach((i) => (starts[i] = Math.max(0, common - room + 1)));
  }
  return null;
}
