/** Failure whose message is a sentence for the user of the page. */
export class DeviceError extends Error {}

/**
 * Returns the message of anything that was thrown.
 * @param {unknown} error
 */
export function describe(error) {
  return error instanceof Error ? error.message : String(error);
}
