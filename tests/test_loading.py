"""Frames loaded from the disk and from the device, compared with plain crops of full frames at numpy's draws."""

import json
import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_double import CudaDouble
from lightning import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from torch.utils.data._utils.pin_memory import pin_memory

from cdc_mmpg.data import sampling
from cdc_mmpg.data.batch import SPLITS, FeatureBatch, SessionBatch, VideoTextBatch
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.training.cli import main
from cdc_mmpg.training.features import FeatureDataModule
from cdc_mmpg.training.reopen import reopen
from conftest import write_clip, write_msvd
from data_modules import benchmark_loading, device_cache
from data_modules import cache as cache_module
from data_modules.cache import FrameCache
from data_modules.device_cache import DeviceCache
from data_modules.msrvtt_qa import MSRVTTQA
from data_modules.msvd_qa import MSVDQA

CPU = torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = {"-aB_0_5": (40, (64, 48)), "c d_1_2": (12, (48, 96)), "e_3_4": (2, (50, 50)), "v_0_1": (5, (48, 64)),
          "t_0_1": (1, (120, 40))}  # frames and size: short, square, portrait and wide clips  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write MSVD-QA with clips of all shapes; cached frames are replaced by noise, so that every crop differs."""
    root = write_msvd(tmp_path_factory.mktemp("shapes") / "msvd")
    for name, (frames, size) in SHAPES.items():
        write_clip(root / "YouTubeClips" / f"{name}.avi", frames, size)
    for number, path in enumerate(sorted(build_module(root).cache.folder.glob("*.npy"))):
        shape = np.load(path).shape
        np.save(path, np.random.default_rng(number).integers(256, size=shape, dtype=np.uint8))
    return root


def build_module(root: Path, **arguments) -> MSVDQA:
    settings = {"num_classes": 5, "image_size": 32, "batch_size": 5, "num_workers": 0, "seed": 3}
    data = MSVDQA(str(root), str(root.parent / "cache"), vocab=str(root / "vocab.txt"), **settings | arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def crop_full_frames(data: MSVDQA, split: str, augment: bool, epoch: int, index: int) -> np.ndarray:
    """Return a sample's frames by cropping full frames to a square that numpy draws."""
    dataset, generator, chosen = data.dataset(split, augment), None, np.array([1, 4, 7])
    if augment:
        generator = np.random.default_rng((data.seed, epoch, index))
        chosen = np.array([0, 3, 6]) + generator.integers(3, size=3)
    frames = data.cache.read(dataset.samples[index].clip, chosen.tolist())
    spare = np.array(frames.shape[1:3]) - 32
    top, left = spare // 2 if generator is None else generator.integers(spare + 1)
    return frames[:, top : top + 32, left : left + 32]


@pytest.mark.parametrize("augment", [False, True])
def test_frames_are_the_same_from_the_disk_and_from_the_device(folder, augment):
    disk, on_device = build_module(folder), build_module(folder, frame_cache="device")
    for split in SPLITS:
        disk_dataset, device_dataset = disk.dataset(split, augment), on_device.dataset(split, augment)
        for epoch in range(3):
            items = [(epoch, index) for index in range(len(disk_dataset))]
            batch, places = disk_dataset.__getitems__(items), device_dataset.__getitems__(items)
            expected = np.stack([crop_full_frames(disk, split, augment, *item) for item in items])
            assert np.array_equal(batch.frames, expected)
            assert all(
                np.array_equal(disk_dataset.frames(*item), frames) for item, frames in zip(items, expected, strict=True)
            )
            assert places.frames.shape == (len(disk_dataset), 3, 2), "they do not travel"
            moved = on_device.transfer_batch_to_device(places, CPU, 0)
            assert moved.frames.dtype == torch.uint8
            assert all(torch.equal(a, b) for a, b in zip(batch, moved, strict=True))
            assert np.array_equal(device_dataset.frames(*items[0]), expected[0]), "to look at one"


def test_epochs_are_the_same_with_loader_processes_and_with_frames_on_the_device(folder):
    epochs = []
    for arguments in ({}, {"num_workers": 1}, {"frame_cache": "device"}, {"frame_cache": "device", "num_workers": 2}):
        data = build_module(folder, **arguments)
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        assert [loader.num_workers for loader in loaders] == [int(arguments == {"num_workers": 1})] * 3
        epochs.append([data.transfer_batch_to_device(batch, CPU, 0) for loader in loaders for batch in loader])
    for epoch in epochs[1:]:
        for expected, actual in zip(epochs[0], epoch, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@torch.no_grad()
def test_cached_features_are_the_same_from_the_disk_and_from_the_device(folder, tmp_path):
    features = []
    for frame_cache in ("disk", "device"):
        data = build_module(folder, frame_cache=frame_cache)
        data.cache_dir = tmp_path / frame_cache  # separate, because the features' file names are the same
        torch.manual_seed(0)
        view = FeatureDataModule(data, AllInOne(image_size=32, depth=1, vocab_size=15), OpenEnded(5))
        view.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        dataset = data.dataset("test", augment=False)
        features.append([view.features("test", dataset, "x", frame)["frame_features"] for frame in (None, 1)])
    assert [part.shape for part in features[0]] == [(8, 3, 192), (8, 1, 192)]
    assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))


def test_a_run_with_the_frames_on_the_device_ends_as_one_from_the_disk(fit, tmp_path, caplog):
    runs = {}
    for frame_cache in ("disk", "device"):
        arguments = f"--data.init_args.frame_cache={frame_cache}", f"--data.init_args.cache_dir={tmp_path / 'cache'}"
        command = fit("fine_tuning", *arguments, out=tmp_path / frame_cache)
        with caplog.at_level("INFO"):
            caplog.clear()
            assert main(command) == 0
        assert ("the frames of 6 clips take " in caplog.text) == (frame_cache == "device")
        runs[frame_cache] = tmp_path / frame_cache / "msvd" / "fine_tuning" / "seed0"
    metrics = [json.loads((run / "results.json").read_text())["metrics"] for run in runs.values()]
    assert metrics[0] == metrics[1]
    weights = [load_checkpoint(run / "best.ckpt")["state_dict"] for run in runs.values()]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    before = (runs["device"] / "results.json").stat()
    assert main(fit("fine_tuning", out=tmp_path / "device")) == 0, "another run"
    assert (runs["device"] / "results.json").stat() == before
    assert type(reopen(runs["device"]).dataset.cache) is FrameCache, "what reads batches by itself needs frames"


def test_domains_that_change_frames_are_refused_with_frames_on_the_device(tmp_path):
    for domains in ("casts", "corruptions"):
        with pytest.raises(ConfigError, match=rf"domains is {domains}, .*FRAME_CACHE=disk"):
            MSVDQA("x", str(tmp_path), 5, domains=domains, frame_cache="device")
    categories = MSRVTTQA("x", str(tmp_path), 5, domains="categories", frame_cache="device")
    assert isinstance(categories.cache, DeviceCache)


def test_frames_that_do_not_fit_are_refused_with_both_numbers(folder, monkeypatch):
    data = build_module(folder, frame_cache="device")
    batch = data.dataset("test", augment=False).__getitems__([(0, 0)])
    needed = sum(np.load(path).nbytes for path in data.cache.folder.glob("*.npy"))
    monkeypatch.setattr(device_cache, "measure_free_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=r"6 clips take \d+\.\d kB, \d+\.\d kB are free on cpu: .*FRAME_CACHE=disk"):
        data.transfer_batch_to_device(batch, CPU, 0)
    monkeypatch.setattr(device_cache, "measure_free_memory", lambda: needed)
    assert data.transfer_batch_to_device(batch, CPU, 0).frames.shape == (1, 3, 32, 32, 3)


def test_an_array_is_opened_once_and_holds_no_descriptor(folder, monkeypatch):
    data, opened = build_module(folder), Counter()
    load = np.load
    monkeypatch.setattr(cache_module.np, "load", lambda path, **how: opened.update([path]) or load(path, **how))
    cache_module._map_array.cache_clear()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        arrays = [data.cache.array(clip) for clip in sorted(data.cache.ready)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(opened.values()) == {1}
    assert len(opened) == 6
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 0
    assert str(data.cache.folder) in Path("/proc/self/maps").read_text()
    del arrays
    cache_module._map_array.cache_clear()
    assert str(data.cache.folder) not in Path("/proc/self/maps").read_text(), "what is let go is unmapped"


@pytest.mark.parametrize("place", ["double", pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_a_gpu_gathers_frames_without_synchronizing_the_host(place, folder, monkeypatch):
    disk, on_device, device = build_module(folder), build_module(folder, frame_cache="device"), torch.device("cuda", 0)
    items = [[(epoch, index) for index in range(12)] for epoch in range(3)]
    batches = [on_device.dataset("train", augment=True).__getitems__(batch_items) for batch_items in items]
    with CudaDouble() if place == "double" else nullcontext() as card:
        if card:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000, 2_000_000))
        on_device.transfer_batch_to_device(batches[0], device, 0)  # moves all frames to the device
        pinned = [pin_memory(batch) for batch in batches]  # as a data loader does
        waits = len(card.syncs) if card else torch.cuda.set_sync_debug_mode("error")
        try:
            moved = [on_device.transfer_batch_to_device(batch, device, 0) for batch in pinned]
        finally:
            if not card:
                torch.cuda.set_sync_debug_mode("default")
        assert waits == (len(card.syncs) if card else None)
        assert {part.device for batch in moved for part in batch} == {device}
        frames = [batch.frames.cpu() for batch in moved]
    expected = [disk.dataset("train", augment=True).__getitems__(batch_items).frames for batch_items in items]
    assert all(torch.equal(one, other) for one, other in zip(frames, expected, strict=True))


@pytest.mark.parametrize(
    ("processors", "devices", "environment", "expected"),
    [
        (64, 1, LightningEnvironment, 16), (64, 8, LightningEnvironment, 8), (6, 4, LightningEnvironment, 1),
        (2, 4, LightningEnvironment, 1), (7, 8, SLURMEnvironment, 7), (5, 1, None, 5),
    ],
)  # fmt: skip
def test_loader_processes_default_to_the_ranks_share_of_processors(
    processors, devices, environment, expected, folder, monkeypatch
):
    monkeypatch.setattr(sampling, "count_processors", lambda: processors)
    data = build_module(folder, num_workers=None)
    data.trainer = SimpleNamespace(
        num_devices=devices, world_size=1, global_rank=0,
        strategy=SimpleNamespace(**{"cluster_environment": environment.__new__(environment)} if environment else {}),
    )  # fmt: skip
    assert data.train_dataloader().num_workers == expected
    assert data.batches(data.dataset("val", False), shuffle=False).num_workers == 0


def test_all_parts_of_a_batch_are_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    one, features = torch.zeros(1), FeatureBatch(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    for batch, parts in (
        (VideoTextBatch(one, one, one, one, one), 5), (features, 3), (SessionBatch(features, one, one, one), 6)
    ):  # fmt: skip
        pinned.clear()
        assert type(pin_memory(batch)) is type(batch)
        assert len(pinned) == parts


def test_the_loading_benchmark_reports_every_way_of_loading(capsys):
    sizes = ["--batch-size=2", "--steps=2", "--image-size=16", "--clips=3"]
    assert benchmark_loading.main([*sizes, "--processes", "0", "1"]) == 0
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line[:2]] for line in lines] == [["disk", "0"], ["disk", "1"], ["device", "0"]]
    for *_, rate, milliseconds in lines:
        assert float(rate.replace(",", "")) * float(milliseconds) == pytest.approx(1000, rel=0.1)
