/** The session that the browser keeps across reloads: anchor features and the last valid layer, still signed. */
import { describe } from "./errors.js";
import {
  FEATURE_DIM, WeightsRejected, areEqual, computeDigest, concatenate, decodeLayer, encodeUpload, readNonce, toHex,
} from "./wire.js";

export const MAX_SESSION_CLIPS = 64; // most recent clips in the mean; also the most new clips before a layer is due
const SALT_BYTES = 16;

/** @typedef {import("./wire.js").Bytes} Bytes */
/** @typedef {{matrix: Float32Array, anchors: number, origin: "adapted" | "kept" | "shared"}} Layer */
/** @typedef {{message: Bytes, upload: Bytes, salt: Bytes, anchors: number}} Receipt a layer as it was received */
/** @typedef {{session: string, anchors: Float32Array[], receipt: Receipt | null}} StoredRecord */

/**
 * Encodes an upload whose nonce commits to its number of clips, and returns it with the salt that hides this number.
 *
 * The layer's signature covers the whole upload, so the number stored with a layer cannot be changed.
 * @param {Float32Array} feature
 * @param {number} anchors
 * @param {import("./model.js").DeviceModel} model
 */
export async function encodeCountedUpload(feature, anchors, model) {
  const salt = crypto.getRandomValues(new Uint8Array(SALT_BYTES));
  const nonce = await computeDigest(concatenate(salt, encodeCount(anchors)));
  return { upload: encodeUpload(feature, model.layout, model.versions, nonce), salt };
}

/**
 * Encodes a number of clips.
 * @param {number} count
 */
function encodeCount(count) {
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, count, true);
  return bytes;
}

/**
 * A record in IndexedDB that belongs to one bundle. Failures are kept in `trouble` and never thrown.
 *
 * Tabs write the same record, the last one wins; once one of them begins a new session, the others stop writing.
 */
export class StoredSession {
  /** @param {import("./model.js").DeviceModel} model */
  constructor(model) {
    this.model = model;
    const versions = [model.versions.encoder, model.versions.generator].map((part) => toHex(part).slice(0, 8));
    this.name = [...versions, model.precision].join(".");
    this.session = "";
    this.isCleared = true; // whether the record of the session before was deleted
    this.trouble = "";
    /** @type {Promise<IDBDatabase> | null} */
    this.database = null;
  }

  /**
   * Loads the anchors and the layer, as far as they are valid.
   * @returns {Promise<{anchors: Float32Array[], layer: Layer | null}>}
   */
  async load() {
    const found = await this.attempt(async () => {
      const record = await this.transact("readonly", (store) => store.get(this.name));
      if (record === undefined) {
        return undefined;
      }
      this.session = String(record.session);
      const anchors = record.anchors.filter(isFeature).slice(-MAX_SESSION_CLIPS);
      return { anchors, layer: record.receipt && (await this.verify(record.receipt)) };
    });
    return found ?? { anchors: [], layer: null };
  }

  /**
   * Verifies a stored layer; returns null if it is not valid.
   * @param {Receipt} receipt
   * @returns {Promise<Layer | null>}
   */
  async verify({ message, upload, salt, anchors }) {
    const { model } = this;
    try {
      const matrices = await decodeLayer(message, upload, model.layout, model.versions, model.cloud);
      const committed = await computeDigest(concatenate(salt, encodeCount(anchors)));
      const isValid = areEqual(readNonce(upload), committed) && anchors > 0 && anchors <= MAX_SESSION_CLIPS;
      return isValid ? { matrix: model.install(matrices), anchors, origin: "kept" } : null;
    } catch (error) {
      if (error instanceof WeightsRejected) {
        return null;
      }
      throw error;
    }
  }

  /**
   * Stores the anchors of the session.
   * @param {Float32Array[]} anchors
   */
  async saveAnchors(anchors) {
    await this.attempt(() => this.update({ anchors }));
  }

  /**
   * Stores a layer in place of the previous one.
   * @param {Receipt} receipt
   */
  async saveReceipt(receipt) {
    await this.attempt(() => this.update({ receipt }));
  }

  /** Deletes what is stored and begins a new session; if this fails now, it is done before the next write. */
  async clear() {
    this.isCleared = false;
    await this.attempt(() => this.beginSession());
  }

  /** Replaces the record by one of a new session. */
  async beginSession() {
    const session = toHex(crypto.getRandomValues(new Uint8Array(SALT_BYTES)));
    await this.transact("readwrite", (store) => store.put({ session, anchors: [], receipt: null }, this.name));
    this.session = session;
    this.isCleared = true;
  }

  /**
   * Changes the record in one transaction, unless another tab has begun a new session.
   * @param {Partial<StoredRecord>} change
   */
  async update(change) {
    if (!this.isCleared) {
      await this.beginSession();
    }
    let isOurs = true;
    await this.transact("readwrite", (store) => {
      const reading = store.get(this.name);
      reading.onsuccess = () => {
        const record = reading.result ?? { session: this.session, anchors: [], receipt: null };
        isOurs = record.session === this.session;
        if (isOurs) {
          store.put({ ...record, ...change }, this.name);
        }
      };
      return reading;
    });
    if (!isOurs) {
      throw new Error("another tab has begun a new session");
    }
  }

  /**
   * Runs a transaction and returns the result of its request.
   * @param {IDBTransactionMode} mode
   * @param {(store: IDBObjectStore) => IDBRequest} start
   * @returns {Promise<any>}
   */
  async transact(mode, start) {
    this.database ??= openDatabase();
    const transaction = (await this.database).transaction("sessions", mode);
    const request = start(transaction.objectStore("sessions"));
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
    });
  }

  /**
   * Runs an operation on the storage; a failure is kept in `trouble`.
   * @param {() => Promise<any>} operation
   */
  async attempt(operation) {
    try {
      const result = await operation();
      this.trouble = "";
      return result;
    } catch (error) {
      this.trouble = `The session is not stored in this browser (${describe(error)}).`;
      this.database = null; // it is opened again
      return undefined;
    }
  }
}

/**
 * Returns whether a stored value is an anchor feature.
 * @param {unknown} value
 */
function isFeature(value) {
  return value instanceof Float32Array && value.length === FEATURE_DIM && value.every((part) => Math.abs(part) <= 1);
}

/** Opens the database. */
function openDatabase() {
  return new Promise((/** @type {(database: IDBDatabase) => void} */ resolve, reject) => {
    const opening = indexedDB.open("cdc-mmpg", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("sessions");
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
}
