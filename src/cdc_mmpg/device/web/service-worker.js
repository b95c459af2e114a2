/**
 * Keeps the page and its bundle for use without a network. The network comes first, so a new export is seen at once.
 */
const CACHE = "cdc-mmpg";
// Paths of the page below this worker's folder; nothing else of the same host is kept.
const KEPT = /^(index\.html|icon\.svg|[a-z-]+\.js|(page|vendor|device|device-int8)\/[\w.-]+|demo\/session\.json)?$/;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// The page names what it has loaded before this worker existed.
self.addEventListener("message", (event) => event.waitUntil(Promise.allSettled(event.data.map(keepMissing))));

self.addEventListener("fetch", (event) => {
  if (isKept(event.request)) {
    event.respondWith(answer(event));
  }
});

/**
 * Returns whether replies to a request are kept.
 * @param {Request} request
 */
function isKept({ method, url, cache }) {
  const { scope } = self.registration;
  const path = url.slice(scope.length).replace(/[?#].*$/s, "");
  return method === "GET" && cache !== "no-store" && url.startsWith(scope) && KEPT.test(path);
}

/**
 * Fetches a file and keeps it; without a network, returns the kept one.
 * @param {FetchEvent} event
 */
async function answer(event) {
  const { request } = event;
  try {
    const reply = await fetch(request);
    event.waitUntil(keep(request, reply.clone()));
    return reply;
  } catch (error) {
    const kept = await caches.match(request, { ignoreSearch: request.mode === "navigate" }).catch(() => undefined);
    if (kept === undefined) {
      throw error;
    }
    return kept;
  }
}

/**
 * Keeps a complete reply, if the storage has room.
 * @param {Request} request
 * @param {Response} reply
 */
async function keep(request, reply) {
  if (reply.status === 200) {
    await caches.open(CACHE).then((cache) => cache.put(request, reply)).catch(() => {});
  }
}

/**
 * Keeps a file of the page unless it is kept already.
 * @param {string} url
 */
async function keepMissing(url) {
  const request = new Request(url);
  if (isKept(request) && !(await caches.match(request))) {
    await keep(request, await fetch(request));
  }
}
