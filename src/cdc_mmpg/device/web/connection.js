/** Requests for layers: one upload is retried until its deadline. */
import { DeviceError, describe } from "./errors.js";
import { LAYER_PATH, concatenate } from "./wire.js";

const BACKOFF_MS = 50; // before the first retry, doubled for each further one

/** No layer: the cloud was not reached in time, or refused the upload. */
export class LayerUnavailable extends DeviceError {}

/** A request that this device stopped, because of another session, cloud or key. */
export class RequestStopped extends LayerUnavailable {}

/**
 * Sends uploads to a cloud, and counts the bytes of bodies in both directions.
 */
export class Connection {
  constructor() {
    /** @type {string | null} URL of the service's root; null sends nothing */
    this.url = null;
    /** @type {string | null} */
    this.key = null;
    this.stopping = new AbortController();
    this.bytesUp = 0;
    this.bytesDown = 0;
  }

  /** Stops the request that is under way. */
  stop() {
    this.stopping.abort();
    this.stopping = new AbortController();
  }

  /**
   * Returns the reply to an upload, at most one part longer than `limit`.
   * @param {import("./wire.js").Bytes} upload
   * @param {number} limit bytes
   * @param {number} end deadline on the clock of `performance.now`
   * @param {(stage: string, milliseconds: number) => void} addTime
   * @param {(trouble: string) => void} onTrouble called before each retry
   * @throws {LayerUnavailable} no reply in time, a refusal, or `stop` was called
   */
  async request(upload, limit, end, addTime, onTrouble) {
    const { signal } = this.stopping;
    let [wait, problem] = [BACKOFF_MS, "the deadline passed before the request was sent"];
    while (end > performance.now() && !signal.aborted) {
      let pause = wait * (0.5 + Math.random());
      const { status, headers, content, failure } = await this.post(upload, limit, end, signal, addTime);
      if (signal.aborted) {
        break;
      }
      if (status === 200) {
        return content;
      }
      if (status === 0) {
        problem = failure;
      } else {
        problem = `${status} ${readDetail(content)}`.trim();
        if (status !== 408 && status !== 429 && status < 500) {
          throw new LayerUnavailable(`the cloud refused: ${problem}`);
        }
        pause = Math.max(pause, 1000 * (Number(headers.get("retry-after")) || 0));
      }
      onTrouble(`the cloud has not answered yet (${problem})`);
      wait *= 2;
      await sleep(Math.max(0, Math.min(pause, end - performance.now())), signal);
    }
    throw signal.aborted
      ? new RequestStopped("the request was stopped")
      : new LayerUnavailable(`no layer before the deadline (${problem})`);
  }

  /**
   * Posts an upload once; status 0 means that no complete reply came.
   * @param {import("./wire.js").Bytes} upload
   * @param {number} limit
   * @param {number} end
   * @param {AbortSignal} stopped
   * @param {(stage: string, milliseconds: number) => void} addTime
   */
  async post(upload, limit, end, stopped, addTime) {
    const start = performance.now();
    const timeout = AbortSignal.timeout(Math.max(1, Math.ceil(end - start)));
    try {
      /** @type {Record<string, string>} */
      const authorization = this.key === null ? {} : { Authorization: `Bearer ${this.key}` };
      const reply = await fetch(new URL(LAYER_PATH, this.url ?? undefined), {
        method: "POST",
        body: upload,
        headers: { "Content-Type": "application/octet-stream", ...authorization },
        credentials: "omit",
        cache: "no-store",
        redirect: "manual",
        signal: AbortSignal.any([stopped, timeout]),
      });
      if (reply.type === "opaqueredirect") {
        throw new LayerUnavailable("the cloud redirects to another address, which is not followed: check its address");
      }
      this.bytesUp += upload.length;
      const opened = performance.now();
      const generating = sumServerTiming(reply.headers.get("server-timing") ?? "");
      const content = await this.readBody(reply, limit);
      if (reply.status === 200) {
        addTime("upload", opened - start - generating);
        addTime("generate", generating);
        addTime("download", performance.now() - opened);
      }
      return { status: reply.status, headers: reply.headers, content, failure: "" };
    } catch (error) {
      if (error instanceof LayerUnavailable) {
        throw error;
      }
      return { status: 0, headers: new Headers(), content: new Uint8Array(), failure: describe(error) };
    }
  }

  /**
   * Reads a body up to a limit.
   * @param {Response} reply
   * @param {number} limit
   */
  async readBody(reply, limit) {
    const parts = [];
    let length = 0;
    for await (const part of readParts(reply)) {
      parts.push(part);
      length += part.length;
      this.bytesDown += part.length;
      if (length > limit) {
        break;
      }
    }
    return concatenate(...parts);
  }
}

/**
 * Yields the parts of a body as they arrive; streams themselves are not iterable in all browsers.
 * @param {Response} reply
 */
export async function* readParts(reply) {
  const reader = reply.body?.getReader();
  try {
    for (let part = await reader?.read(); part && !part.done; part = await reader?.read()) {
      yield part.value;
    }
  } finally {
    await reader?.cancel();
  }
}

/**
 * Waits for a time, or until a signal.
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 */
function sleep(milliseconds, signal) {
  return new Promise((/** @type {(ended: unknown) => void} */ resolve) => {
    setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", resolve, { once: true });
  });
}

/**
 * Returns the reason in a refusal of the service; "" if the body is another server's.
 * @param {import("./wire.js").Bytes} content
 */
function readDetail(content) {
  try {
    return String(JSON.parse(new TextDecoder().decode(content)).detail ?? "");
  } catch {
    return "";
  }
}

/**
 * Returns the address of a service's root.
 * @param {string} url relative to the page, or absolute
 * @throws {DeviceError} the address cannot be used; the message does not repeat it, as it may contain a password
 */
export function parseAddress(url) {
  let parsed;
  try {
    parsed = new URL(url, globalThis.location?.href);
  } catch {
    throw new DeviceError("The cloud's address is not valid: use https://<host>[:<port>].");
  }
  if (!["http:", "https:"].includes(parsed.protocol) || parsed.username || parsed.password) {
    throw new DeviceError("The cloud's address must begin with https:// or http://, without a user or password.");
  }
  if (!parsed.pathname.endsWith("/")) {
    parsed.pathname += "/";
  }
  parsed.search = parsed.hash = "";
  return parsed.href;
}

/**
 * Returns the sum of the durations in a Server-Timing header, in milliseconds.
 * @param {string} header
 */
function sumServerTiming(header) {
  return [...header.matchAll(/dur=([0-9.]{1,18})/g)].reduce((sum, [, value]) => sum + (Number(value) || 0), 0);
}
