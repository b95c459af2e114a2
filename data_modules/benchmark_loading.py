"""Loading speed in samples per second on the training device: from disk with loading processes, and from the device.

Clips have the size of real ones at 224 pixels and are read and cropped as in training. The arrays are in a temporary
folder, so that they are in the page cache, like a dataset that fits in memory and was read once.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cdc_mmpg.data.batch import Split, Task
from cdc_mmpg.program import protect_output
from data_modules.base import VideoTextDataModule
from data_modules.cache import FrameCache
from data_modules.clip_dataset import QADataset, Sample
from data_modules.device_cache import DeviceCache
from data_modules.frame_index import Entry

QUESTION = (101, 2054, 2003, 1996, 2158, 2725, 1029, 102)  # WordPieces


class Clips(VideoTextDataModule):
    """Samples of clips of which only the cached frames exist."""

    task: ClassVar[Task] = "open_ended"

    def read_split(self, split: Split) -> list[Sample]:
        """Return nothing: `build` gets the samples."""
        return []

    def find_clips(self) -> dict[str, Path]:
        """Return nothing: only frames exist."""
        return {}

    def remedy(self) -> str:
        """Return nothing: no clip can be absent."""
        return ""

    def word(self, split: Split, index: int, label: int | None = None) -> str:
        """Return nothing: no answer is needed."""
        return ""

    def build(self, samples: Sequence[Sample]) -> QADataset:
        """Build the augmented dataset of samples."""
        labels = torch.zeros(len(samples), dtype=torch.long)
        return QADataset(samples, [[QUESTION]] * len(samples), labels, self.cache, augment=True, seed=self.seed)


def write_frames(cache: FrameCache, clips: Sequence[str]) -> None:
    """Write noise as frames of 4:3, in the format of `FrameCache`."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    shape = cache.num_frames * cache.candidates, cache.side, round(cache.side * 4 / 3), 3
    with (cache.folder / "index.jsonl").open("w", encoding="utf-8") as index:
        for number, clip in enumerate(clips):
            digest = hashlib.sha256(clip.encode()).hexdigest()
            frames = np.random.default_rng(number).integers(256, size=shape, dtype=np.uint8)
            np.save(cache.folder / f"{clip}.{digest[:12]}.{len(frames)}.npy", frames)
            index.write(json.dumps({"name": clip, **Entry(0, 0, len(frames), digest)._asdict()}) + "\n")


def measure(
    folder: Path,
    clips: Sequence[str],
    options: argparse.Namespace,
    frame_cache: Literal["disk", "device"],
    processes: int,
    pinned: bool,
) -> float:
    """Measure samples per second in a second epoch: the first one opens all arrays and starts the processes."""
    data = Clips(
        str(folder), str(folder), 2, image_size=options.image_size, batch_size=options.batch_size,
        num_workers=processes, frame_cache=frame_cache,
    )  # fmt: skip
    if not data.cache.folder.exists():
        write_frames(data.cache, clips)
    data.cache.load()
    if isinstance(data.cache, DeviceCache):
        data.cache.clips = clips
    size = options.batch_size * options.steps * max(1, processes)
    samples = [Sample(clips[number % len(clips)], "") for number in range(size)]
    loader = data.batches(data.build(samples), shuffle=True, num_workers=data.num_workers)
    loader.pin_memory = pinned
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for batch in loader:
            data.transfer_batch_to_device(batch, device, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return size / seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; only figures of the same run are comparable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256, help="questions per batch")
    parser.add_argument("--steps", type=int, default=8, help="batches per process")
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side of a frame")
    parser.add_argument("--clips", type=int, default=64, help="different clips")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="loading processes; default: 0, 1, 2, 4, ... up to our processors"
    )
    options = parser.parse_args(arguments)
    protect_output()

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "CPU"
    table = Table(title=f"{name}: batch {options.batch_size}, 3 frames at {options.image_size}")
    for column in ("frames from", "processes", "transfer", "samples/s", "ms a sample"):
        table.add_column(column, justify="left" if column in ("frames from", "transfer") else "right")
    with tempfile.TemporaryDirectory() as folder:
        clips = [f"clip{number}" for number in range(options.clips)]
        most = Clips(folder, folder, 2).count_loading_processes()
        several = options.processes or [0, *(2**power for power in range(most.bit_length()))]
        rows: list[tuple[Literal["disk", "device"], int]] = [*(("disk", number) for number in several), ("device", 0)]
        for frame_cache, processes in rows:
            for pinned in (True, False) if cuda else (False,):
                rate = measure(Path(folder), clips, options, frame_cache, processes, pinned)
                transfer = ("pinned" if pinned else "pageable") if cuda else "none"
                table.add_row(frame_cache, str(processes), transfer, f"{rate:,.0f}", f"{1000 / rate:.3f}")
    Console(width=100).print(table)
    return 0
