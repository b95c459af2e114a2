"""Batching of queued uploads: whenever the generator is free, it takes all queued ones, up to `MAX_BATCH_UPLOADS`."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

from cdc_mmpg.cloud.model import ServedModel, generate_layers
from cdc_mmpg.errors import DataError
from cdc_mmpg.wire.messages import Upload

MAX_BATCH_UPLOADS = 32


class GeneratedLayer(NamedTuple):
    """A layer with its times and batch size."""

    content: bytes  # signed message
    generating: float  # seconds of the batch in the generator
    waiting: float  # seconds in the queue
    batch: int  # number of uploads in its batch


class Batcher:
    """Queue of uploads whose layers are generated in batches, in a separate thread.

    Args:
        served: model whose generator is used.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self._waiting: asyncio.Queue[tuple[bytes, Upload, float, asyncio.Future[GeneratedLayer]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "generator")
        self._task = asyncio.create_task(self._run())

    async def generate(self, content: bytes, upload: Upload) -> GeneratedLayer:
        """Return the signed layer for an upload.

        Raises:
            DataError: the requested precision cannot represent the layer.
        """
        layer: asyncio.Future[GeneratedLayer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((content, upload, perf_counter(), layer))
        return await layer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MAX_BATCH_UPLOADS and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [item for item in batch if not item[3].done()]  # drop those whose client disconnected
            if not batch:
                continue
            start = perf_counter()
            try:
                layers = await loop.run_in_executor(
                    self._thread, generate_layers, self.served, [item[:2] for item in batch]
                )
            except Exception as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            seconds = perf_counter() - start
            for (_, _, arrival, future), layer in zip(batch, layers, strict=True):
                if future.done():
                    continue
                if isinstance(layer, DataError):
                    future.set_exception(layer)
                else:
                    future.set_result(GeneratedLayer(layer, seconds, start - arrival, len(batch)))

    async def stop(self) -> None:
        """Stop the task and the thread; call it when no further upload will be queued."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown()
