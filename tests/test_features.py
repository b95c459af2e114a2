"""Cached features, session uploads and the order of samples, compared with direct computation on a few samples."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file

from cdc_mmpg.data.batch import SPLITS, normalise
from cdc_mmpg.data.control_cases import SESSION_CASES
from cdc_mmpg.data.interface import Sessions
from cdc_mmpg.data.sampling import EpochDataModule, EpochOrder, draw_text
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.media.text import count_wordpieces
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.training.features import FeatureDataModule, FeatureDataset, _interleave_shares, _pad_texts
from cdc_mmpg.training.sessions import NO_ANCHORS_SHARE, SessionDataModule, SessionDataset
from data_modules.msvd_qa import MSVDQA
from data_modules.synthetic import Synthetic


def build_encoder(seed: int = 0) -> AllInOne:
    torch.manual_seed(seed)
    return AllInOne(image_size=32, depth=1, vocab_size=50)


@pytest.fixture(scope="module")
def data(msvd: Path, tmp_path_factory: pytest.TempPathFactory) -> MSVDQA:
    folder = str(tmp_path_factory.mktemp("cache"))
    dataset = MSVDQA(
        str(msvd), folder, 5, image_size=32, batch_size=5, num_workers=0, vocab=str(msvd / "vocab.txt"), seed=3
    )
    dataset.prepare_data()
    dataset.setup("fit")
    return dataset


def build_features(data: MSVDQA, model: AllInOne) -> FeatureDataModule:
    module = FeatureDataModule(data, model, OpenEnded(5))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return module


@torch.no_grad()
def test_cached_features_match_every_sample_in_order(data):
    module, model = build_features(data, build_encoder()), build_encoder().eval()
    module.setup("fit")
    loaders = {"train": module.train_dataloader(), "val": module.val_dataloader(), "test": module.test_dataloader()}
    for split in SPLITS:
        dataset = data.dataset(split, augment=False)
        seen = []
        for batch in loaders[split]:
            direct = module.head.encode(model, dataset.__getitems__([(0, index) for index in batch.indices.tolist()]))
            torch.testing.assert_close(batch.frame_features, direct.frame_features, rtol=1e-4, atol=1e-4)
            assert torch.equal(batch.labels, data.labels(split)[batch.indices])
            assert len(batch.labels) <= 5
            seen += batch.indices.tolist()
        assert sorted(seen) == list(range(len(dataset)))
        assert (seen == sorted(seen)) == (split != "train")
        assert module.origins(split) == data.origins(split)
        assert module.fingerprint(split, True) == data.fingerprint(split, True)
    order = [list(loaders["train"].batch_sampler.sampler) for _ in range(2)]
    assert order[0] == order[1] == list(EpochOrder(12, 3, True))  # by the dataset's seed


@torch.no_grad()
def test_features_are_computed_once_per_encoder_and_again_when_damaged(data, monkeypatch):
    first = build_features(data, build_encoder(1))
    first.setup("fit")
    folder = data.cache_dir / "features"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    computed = []
    monkeypatch.setattr(FeatureDataModule, "_compute", lambda self, name, *_: computed.append(name) or {})
    second = build_features(data, build_encoder(1))
    second.setup("fit")
    first.setup("fit")  # a second setup computes nothing
    assert computed == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    monkeypatch.undo()
    path = next(path for path in before if path.name.startswith("val."))
    intact = {name: value.clone() for name, value in load_file(path).items()}  # the file is memory-mapped
    path.write_bytes(path.read_bytes()[:-9])
    (folder / f".{path.name}.999999.tmp").write_bytes(b"half")
    build_features(data, build_encoder(1)).setup("fit")
    assert torch.equal(load_file(path)["frame_features"], intact["frame_features"])
    other = build_features(data, build_encoder(2))  # other weights, other files
    other.setup("fit")
    assert len(list(folder.glob("val.*"))) > len([path for path in before if path.name.startswith("val.")])


@torch.no_grad()
def test_features_of_one_frame_use_no_other_frame(data):
    module, dataset = build_features(data, build_encoder()), data.dataset("test", augment=False)
    batch = dataset.__getitems__([(0, index) for index in range(len(dataset))])
    for frame in (0, 2):
        features = module.features("anchors", dataset, f"frame {frame}", frame)["frame_features"]
        expected = module.head.encode(build_encoder().eval(), batch._replace(frames=batch.frames[:, [frame]]))
        assert features.shape == (8, 1, 192)
        torch.testing.assert_close(features, expected.frame_features, rtol=1e-4, atol=1e-4)


def test_file_names_differ_by_task_samples_and_frame(data):
    module, names = build_features(data, build_encoder()), set()
    module._read = lambda path: names.add(path.name) or {"frame_features": torch.zeros(1)}
    for fingerprint, frame in (("a", None), ("b", None), ("a", 1), ("a", 0)):
        module.features("val", data.dataset("val", augment=False), fingerprint, frame)
    module.head.task = "multiple_choice"
    module.features("val", data.dataset("val", augment=False), "a", None)
    assert len(names) == 5
    assert all(name.startswith("val.") and name.endswith(".safetensors") for name in names)


def test_features_that_exist_only_on_another_machine_are_an_error(data):
    module = build_features(data, build_encoder())
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: False))  # rank 0 has the file
    with pytest.raises(DataError, match="the machines of a run must share this folder"):
        module.features("val", data.dataset("val", augment=False), "elsewhere", None)


def test_shares_of_processes_are_joined_in_the_samples_order():
    features = torch.arange(7 * 2).view(7, 2)
    shares = [features[rank::3] for rank in range(3)]
    assert torch.equal(_interleave_shares(shares), features)
    captions = [torch.ones(2, 3, 4), torch.ones(1, 1, 4)]  # two samples with three captions, one with one
    joined = _interleave_shares(captions)
    assert joined.shape == (3, 3, 4)
    assert joined.sum((1, 2)).tolist() == [12, 4, 12]
    assert torch.equal(joined[1, 0], torch.ones(4))
    masks = _pad_texts([torch.ones(2, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)])
    assert [part.tolist() for part in masks] == [[[True, False]] * 2, [[True, True]]]


def test_training_draws_one_caption_per_clip_anew_every_epoch():
    is_present = torch.tensor([[True, True, True], [True, False, False]])
    texts = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 192)
    features = {"frame_features": torch.zeros(2, 3, 192), "texts": texts, "there": is_present}
    for seed in (0, 1):
        dataset = FeatureDataset(features, torch.zeros(2), draw=True, seed=seed)
        chosen = []
        for epoch in range(20):
            batch = dataset.__getitems__([(epoch, 1), (epoch, 0)])
            assert batch.indices.tolist() == [1, 0]
            assert batch.texts.shape == (2, 1, 192)
            assert batch.there.tolist() == [[True], [True]]
            assert batch.texts[0, 0, 0] == 3  # the only caption
            assert batch.texts[1, 0, 0] == draw_text(seed, epoch, 0, 3)
            chosen.append(int(batch.texts[1, 0, 0]))
        assert set(chosen) == {0, 1, 2}
    complete = FeatureDataset(features, torch.zeros(2), seed=0).__getitems__([(0, 0)])
    assert complete.texts.shape == (1, 3, 192)
    assert torch.equal(complete.there, is_present[:1])
    plain = FeatureDataset({"frame_features": torch.zeros(2, 3, 192)}, torch.tensor([4, 5]), draw=True)
    assert plain.__getitems__([(0, 1)]).labels.tolist() == [5]


def test_captions_are_drawn_evenly_by_seed_epoch_and_index():
    def draws(seed: int = 0, index: int = 0) -> list[int]:
        return [draw_text(seed, epoch, index, 5) for epoch in range(500)]

    assert draws() == draws()
    assert draws() != draws(seed=1)
    assert draws() != draws(index=1)
    counts = np.bincount(draws(), minlength=5)
    assert counts.min() > 60
    assert len(counts) == 5


class Samples(EpochDataModule):
    """Dataset of 11 samples, which are their own items, in batches of two."""

    def __init__(self) -> None:
        super().__init__(2, 7)
        self.suffix = ""

    def __len__(self) -> int:
        return 11

    def __getitems__(self, items: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return items

    def labels(self, split: str) -> torch.Tensor:
        return torch.zeros(11)

    def fingerprint(self, split: str, frames: bool) -> str:
        assert not frames
        return split + (self.suffix if split == "val" else "")


def test_training_resumes_after_the_batches_already_seen():
    module, fresh = Samples(), Samples()

    def trainer(epoch: int, processed: int, stage: str = "fit") -> SimpleNamespace:
        progress = SimpleNamespace(current=SimpleNamespace(processed=processed))
        return SimpleNamespace(
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
            current_epoch=epoch, num_training_batches=6.0, state=SimpleNamespace(fn=stage), world_size=1, global_rank=0,
        )  # fmt: skip

    module.trainer = trainer(3, 4)
    state = module.state_dict()
    assert (state["epoch"], state["seen_steps"]) == (3, 4)
    module.trainer = trainer(3, 6)  # the epoch is over, the next has not begun
    assert (module.state_dict()["epoch"], module.state_dict()["seen_steps"]) == (4, 0)
    assert set(state["fingerprints"]) == set(SPLITS)
    fresh.trainer = trainer(0, 0, "test")
    fresh.load_state_dict(state)
    assert fresh._seen_steps == 0  # only training resumes
    fresh.trainer = trainer(0, 0)
    fresh.load_state_dict(state)
    order = EpochOrder(11, 7, True)
    order.set_epoch(3)
    loader = fresh.batches(fresh, shuffle=True)
    assert [item for batch in loader for item in batch] == list(order)[8:]
    assert [len(batch) for batch in fresh.batches(fresh, shuffle=False)] == [2] * 5 + [1]
    assert loader.num_workers == 0
    assert fresh.batches(fresh, shuffle=True, num_workers=2).timeout == 30
    fresh.suffix = "!"
    with pytest.raises(ConfigError, match="other data: val differ"):
        fresh.load_state_dict(state)


# Three devices, with four, twenty and one anchors.
POOLS = [[0, 1, 2, 3], list(range(4, 24)), [24]]
SESSIONS = Sessions(
    None, POOLS, {"train": [0, 0, 2, 1], "val": [1, 0], "test": [1, 0, 1, 2]},
    {"train": [0, 2, 24, -1], "val": [-1, -1], "test": [-1] * 4}, [90.0, float("nan"), 180.0], "",
    [[2, 3], list(range(10, 18)), [24]],
)  # fmt: skip


def build_split(split: str, seed: int = 0) -> SessionDataset:
    labels = torch.arange(len(SESSIONS.devices[split]))
    samples = FeatureDataset({"frame_features": torch.zeros(len(labels), 3, 192)}, labels)
    return SessionDataset(samples, torch.eye(25), SESSIONS, split, seed)  # one-hot: a mean shows its anchors


def test_training_samples_upload_the_mean_of_the_other_clips_and_a_tenth_nothing():
    dataset, empty_uploads = build_split("train"), 0
    for epoch in range(300):
        batch = dataset.__getitems__([(epoch, index) for index in range(4)])
        assert batch.uploads.shape == (4, 1, 25)
        for index, others in enumerate(([1, 2, 3], [0, 1, 3], [], POOLS[1])):
            number = int(batch.anchors[index, 0])
            empty_uploads += index != 2 and number == 0
            assert number in ((0, len(others)) if others else (0,))
            expected = torch.zeros(25)
            expected[others] = 1 / max(1, len(others))
            torch.testing.assert_close(batch.uploads[index, 0], expected if number else torch.zeros(25))
    assert NO_ANCHORS_SHARE == 0.1
    assert empty_uploads / 900 == pytest.approx(0.1, abs=0.03)
    unknown = float("nan")
    # 90, 90 and 180 degrees; an unknown cast stays NaN.
    assert batch.casts[:, 0].tolist() == pytest.approx([0, 0, -1, unknown], abs=1e-6, nan_ok=True)
    assert batch.casts[:, 1].tolist() == pytest.approx([1, 1, 0, unknown], abs=1e-6, nan_ok=True)

    def draw_numbers(seed: int) -> list[list[int]]:
        numbers = [
            build_split("train", seed).__getitems__([(epoch, i) for i in (0, 1, 3)]).anchors for epoch in range(60)
        ]
        return torch.cat(numbers, 1).tolist()

    first = draw_numbers(0)
    assert draw_numbers(0) == first != draw_numbers(1)
    zeros = [{epoch for epoch, number in enumerate(row) if number == 0} for row in first]
    assert zeros[0] != zeros[1] != zeros[2]  # every sample draws separately, anew every epoch
    assert all(0 < len(epochs) < 20 for epochs in zeros)


@torch.no_grad()
def test_anchors_are_the_middle_frames_with_the_neutral_prompt(synthetic, tmp_path, monkeypatch):
    data = Synthetic(str(synthetic), str(tmp_path), 17, image_size=64, resize=64, batch_size=7, num_workers=0,
                     vocab=str(synthetic / "vocab.txt"), seed=3)  # fmt: skip
    data.prepare_data()
    torch.manual_seed(0)
    model = AllInOne(image_size=64, depth=1, vocab_size=count_wordpieces(synthetic / "vocab.txt"))
    module = SessionDataModule(data, model, OpenEnded(17), lambda features: model.pool(features.mean(-2)))
    module.trainer = build_features(data, model).trainer
    module.setup("fit")
    sessions, dataset = data.sessions(), data.sessions().anchors
    batch = dataset.__getitems__([(0, index) for index in range(len(dataset))])
    encoded = model.eval()(normalise(batch.frames[:, 1:2]), batch.text_ids, batch.text_mask)
    expected = torch.tanh(model.pooler["dense"](encoded.frame_features[:, 0]))
    anchors, devices = module.history()
    torch.testing.assert_close(anchors, expected, rtol=1e-4, atol=1e-4)
    trained = {sessions.devices["train"].index(device): device for device in set(sessions.devices["train"])}
    assert devices == [sessions.pools[device] for device in sorted(trained.values())]
    assert 0 < len(devices) < len(sessions.pools)  # no test device
    for split, loader in (("train", module.train_dataloader()), ("test", module.test_dataloader())):
        labels = data.labels(split)
        for loaded in loader:
            assert torch.equal(loaded.labels, labels[loaded.indices])
            assert loaded.uploads.shape[1:] == ((1 if split == "train" else len(SESSION_CASES)), 192)
            direct = SessionDataset(module._splits[split].samples, anchors, sessions, split, 3)
            expected_batch = direct.__getitems__([(0, index) for index in loaded.indices.tolist()])
            assert torch.equal(loaded.uploads, expected_batch.uploads)
            assert torch.equal(loaded.samples.frame_features, expected_batch.samples.frame_features)
    monkeypatch.setattr(SessionDataModule, "anchors", None)
    module.setup("test")  # a second setup computes nothing
    monkeypatch.undo()
    monkeypatch.setattr(data, "sessions", lambda: sessions._replace(pools=[[] for _ in sessions.pools]))
    with pytest.raises(DataError, match="no device has an unlabelled clip"):
        SessionDataModule(data, model, OpenEnded(17), lambda features: model.pool(features.mean(-2))).setup("fit")


def test_the_alike_case_is_left_out_where_backgrounds_are_unknown():
    known = SessionDataset(build_split("test").samples, torch.eye(25), SESSIONS, "test", 0, sets=True)
    unknown = SessionDataset(known.samples, torch.eye(25), SESSIONS._replace(alike=None), "test", 0, sets=True)
    both = [dataset.__getitems__([(0, index) for index in range(4)]) for dataset in (known, unknown)]
    assert [batch.uploads.shape[1] for batch in both] == [len(SESSION_CASES), len(SESSION_CASES) - 1]
    assert torch.equal(both[0].uploads[:, :-1], both[1].uploads)
    assert torch.equal(both[0].sets[:, :-1], both[1].sets)


def test_devices_are_tested_with_their_anchors_and_with_those_of_another_device():
    dataset = build_split("test")
    batch = dataset.__getitems__([(0, index) for index in range(4)])
    assert len(dataset) == 4
    assert torch.equal(batch.uploads[0], batch.uploads[2])  # the same device
    assert batch.samples.labels.tolist() == [0, 1, 2, 3]
    names = list(SESSION_CASES)
    members = [[set(upload.nonzero().flatten().tolist()) for upload in sample] for sample in batch.uploads]
    lenders = []
    for sample, device in ((0, 1), (1, 0), (3, 2)):
        for case, count, clips in zip(names, batch.anchors[sample].tolist(), members[sample], strict=True):
            assert len(clips) == count
            if count:
                torch.testing.assert_close(batch.uploads[sample, names.index(case)].max(), torch.tensor(1 / count))
            if case == "alike_n8":
                assert clips == set(SESSIONS.alike[device])
            elif not case.startswith("shuffled"):
                assert clips <= set(POOLS[device])
                assert count == min(int(case.removeprefix("n")), len(POOLS[device]))
        by_case = dict(zip(names, members[sample], strict=True))
        assert by_case["n1"] <= by_case["n4"] <= by_case["n8"] <= by_case["n16"] <= by_case["n23"]
        assert by_case["shuffled_n8"] <= by_case["shuffled_n16"]
        (lender,) = [d for d in range(3) if by_case["shuffled_n16"] <= set(POOLS[d])]
        assert lender != device
        lenders.append(lender)
        clips = members[[0, 1, 3][[1, 0, 2].index(lender)]]
        assert by_case["shuffled_n16"] == clips[names.index("n16")]  # the upload of the other device
    assert sorted(lenders) == [0, 1, 2]  # every device lends once
    other = build_split("test", seed=1)
    assert not torch.equal(other.uploads, dataset.uploads)
    twins = SESSIONS._replace(pools=[list(range(12)), list(range(12, 24)), [24]])  # two devices with equally many clips
    drawn = SessionDataset(dataset.samples, torch.eye(25), twins, "test", 0).uploads[:2, names.index("n4")]
    assert drawn[0, :12].nonzero().tolist() != drawn[1, 12:24].nonzero().tolist()  # draw separately
    assert torch.equal(build_split("test").uploads, dataset.uploads)
    assert not build_split("val").uploads[2].any()  # nothing is drawn for a device without a sample in the split
