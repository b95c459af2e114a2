/**
 * Keeps the page and its bundle for use without a network. The network comes first, so a new export is seen at once.
 *
 * Files of the demo are not kept: they may be many.
 */
const CACHE = "cdc-mmpg";
const NOT_KEPT = ["/v1/", "/demo/"];

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// The page names what it has loaded before this worker existed.
self.addEventListener("message", (event) => event.waitUntil(Promise.allSettled(event.data.map(keepMissing))));

self.addEventListener("fetch", (event) => {
  if (isKept(event.request)) {
    event.respondWith(fetchAndKeep(event.request));
  }
});

/**
 * Returns whether replies to a request are kept.
 * @param {Request} request
 */
function isKept({ method, url, cache }) {
  const { origin, pathname } = new URL(url);
  const isPage = origin === self.location.origin && !NOT_KEPT.some((part) => pathname.includes(part));
  return method === "GET" && cache !== "no-store" && isPage;
}

/**
 * Fetches a file and keeps it; without a network, returns the kept one.
 * @param {Request} request
 */
async function fetchAndKeep(request) {
  const cache = await caches.open(CACHE);
  try {
    const reply = await fetch(request);
    if (reply.status === 200) {
      await cache.put(request, reply.clone()).catch(() => {}); // the storage may be full
    }
    return reply;
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: request.mode === "navigate" });
    if (kept === undefined) {
      throw error;
    }
    return kept;
  }
}

/**
 * Keeps a file of the page unless it is kept already.
 * @param {string} url
 */
async function keepMissing(url) {
  const request = new Request(url);
  if (isKept(request) && !(await caches.match(request))) {
    await fetchAndKeep(request);
  }
}
