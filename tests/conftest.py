"""Shared fixtures: small encoded clips whose frames encode their number, datasets, deployments, and run arguments."""

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from data_modules.synthetic_clips import DatasetCounts, render_dataset

if TYPE_CHECKING:
    from deployments import FakeCloud

os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are tiny here: a second thread only adds overhead
os.environ["WANDB_MODE"] = "disabled"  # tests of W&B override it

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "who", "is", "the", "a", "man", "doing", "?", "in", "it"]
ANSWERS = ["red", "green", "blue", "man", "dog"]
CLIPS = {"train": ["-aB_0_5", "c d_1_2", "e_3_4"], "val": ["v_0_1"], "test": ["t_0_1", "u_0_9"]}


def write_clip(
    path: Path,
    frames: int = 12,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    title: str = "",
    **options: str,
) -> Path:
    """Write a clip whose frame k has the gray level 4 + 6 k, so that its number can be read after resizing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p" if codec != "gif" else "rgb8"
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), (4 + 6 * number) % 256, np.uint8)
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt))
            )
        container.mux(stream.encode(None))
    return path


def write_msvd(root: Path, questions_per_clip: int = 4) -> Path:
    """Write a small MSVD-QA: six clips, and five answers, four of which are in the vocabulary."""
    names = [name for clips in CLIPS.values() for name in clips]
    root.mkdir(parents=True, exist_ok=True)
    (root / "youtube_mapping.txt").write_text("".join(f"{name} vid{i}\r\n" for i, name in enumerate(names)), newline="")
    (root / "answer_set.txt").write_text("\n".join(ANSWERS[:4]) + "\n")
    for number, name in enumerate(names):
        write_clip(root / "YouTubeClips" / f"{name}.avi", frames=8 + number)
    identifier = 0
    for split, clips in CLIPS.items():
        rows = []
        for clip in clips:
            for _ in range(questions_per_clip):
                answer = ANSWERS[identifier % len(ANSWERS)]
                question = f"what is the {answer} man doing?"
                rows.append({"answer": answer, "id": identifier, "question": question, "video_id": names.index(clip)})
                identifier += 1
        (root / f"{split}_qa.json").write_text(json.dumps(rows))
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return root


# Files that take longest. They start first, so that no process is left alone with one at the end.
LONG_FILES = tuple(f"test_{name}.py" for name in (
    "house", "launchers", "gpu_check", "browser", "two_processes", "sweep", "plan", "run_folder", "interruptions",
    "cloud", "wandb", "global_batch", "cache", "export", "datasets", "device", "load", "external", "privacy",
))  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of the longest files to the front."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the signal handlers after the test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    saved_handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in saved_handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def msvd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only folder with a small MSVD-QA."""
    return write_msvd(tmp_path_factory.mktemp("msvd"))


@pytest.fixture
def writable_msvd(tmp_path: Path) -> Path:
    """Writable folder with a small MSVD-QA."""
    return write_msvd(tmp_path / "msvd")


# Size of the small synthetic dataset.
TINY = DatasetCounts(seen=4, unseen=2, val=2, labelled=2, history=4, test_seen=1, test=2, captioned=60, questions=3)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only folder with a small synthetic dataset."""
    root = tmp_path_factory.mktemp("synthetic") / "clips"
    render_dataset(root, TINY)
    return root


@pytest.fixture(scope="session")
def real() -> Path:
    """Folder with real samples; skips the test if CDC_MMPG_REAL is not set."""
    if not (folder := os.environ.get("CDC_MMPG_REAL")):
        pytest.skip("CDC_MMPG_REAL does not name a folder with real samples")
    return Path(folder)


@pytest.fixture(scope="session")
def phase_one(msvd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a reasoner, as phase one saves them."""
    import torch

    from cdc_mmpg.models.adr import ADR

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("phase_one") / "adr.safetensors"
    ADR().save(path)
    return path


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only deployments of tiny encoders: session/, sample/, choice/; the first pytest process writes them."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "deployed"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            from deployments import write_deployment

            write_deployment(root / "session")
            write_deployment(root / "sample", "cdc_mmpg")
            write_deployment(root / "choice", task="multiple_choice", kind="basis")
            (root / "done").touch()
    return root


@pytest.fixture
def fake(deployed: Path) -> Iterator["FakeCloud"]:
    """Cloud in this process, whose replies a test can replace."""
    from deployments import FakeCloud

    server = FakeCloud(deployed / "session" / "cloud")
    yield server
    server.close()


Command = Callable[..., list[str]]


@pytest.fixture
def fit(msvd: Path, phase_one: Path, tmp_path: Path) -> Command:
    """Function that returns the arguments of a tiny run, e.g. of `fit("linear", "--trainer.max_epochs=3")`."""

    def arguments(method: str, *options: str, root: Path = msvd, out: Path = tmp_path) -> list[str]:
        return [
            "fit",
            f"--config=experiments/methods/{method}.yaml",
            "--config=experiments/datasets/msvd.yaml",
            f"--trainer.default_root_dir={out / 'msvd' / method / 'seed0'}",
            f"--data.init_args.root={root}",
            f"--data.init_args.cache_dir={out / 'msvd' / 'data'}",
            f"--data.init_args.vocab={root / 'vocab.txt'}",
            "--data.init_args.num_classes=5",
            "--data.init_args.image_size=32",
            "--data.init_args.batch_size=4",
            "--data.init_args.num_workers=0",
            "--model.init_args.encoder.depth=1",
            "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
            *([f"--model.init_args.adr={phase_one}"] if method in ("cdc_mmpg", "cdc_mmpg_frozen") else []),
            *(["--model.init_args.preset=small"] if method.startswith("adr_") else []),
            *options,
        ]

    return arguments


@pytest.fixture(autouse=True)
def _run_in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
