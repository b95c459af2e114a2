"""The embedded dataset: what it holds, that it is the same on every machine, and what a session draws."""

import hashlib
import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer

from cdc_mmpg.data.batch import SPLITS
from cdc_mmpg.data.control_cases import SESSION_CASES
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.training.captions import CaptionDataModule
from cdc_mmpg.training.cli import main
from cdc_mmpg.training.features import FeatureDataset
from cdc_mmpg.training.sessions import SessionDataModule, SessionDataset
from conftest import TINY
from data_modules import synthetic_clips
from data_modules.base import find_alike
from data_modules.msvd_qa import MSVDQA
from data_modules.synthetic import Synthetic
from data_modules.synthetic_clips import (
    ANSWER_WORDS,
    HUES,
    QUESTION_SHARES,
    Camera,
    DatasetCounts,
    annotations,
    describe_scene,
    draw_questions,
    draw_scene,
    name_hue,
    plan,
    render,
)
from processes import finish, kill, recording, start, steps, until


@pytest.fixture(scope="module")
def everything() -> dict[str, list[dict[str, object]]]:
    """All annotation files of the full dataset."""
    texts = annotations(0, plan(DatasetCounts()), DatasetCounts().questions)
    return {name: json.loads(text) if name.endswith(".json") else text for name, text in texts.items()}


def test_the_full_dataset_has_the_counts_of_its_data_sheet(everything):
    questions = {name: len(rows) for name, rows in everything.items() if name.endswith("_qa.json")}
    assert questions == {
        "train_qa.json": 2304, "val_qa.json": 720, "test_qa.json": 3168, "test_seen_qa.json": 1728,
        "test_unseen_qa.json": 1440, "history_qa.json": 3456, "pretraining_qa.json": 18048,
    }  # fmt: skip
    assert len(everything["captions.json"]["sentences"]) == 6016
    roles = Counter(row["role"] for row in everything["devices.json"].values())
    assert roles == {"train": 768, "history": 96 * 16 + 72 * 24, "test": 576 + 480, "val": 240, "pretraining": 6016}
    assert len(everything["devices.json"]) == len(everything["youtube_mapping.txt"].splitlines()) == 11344
    for name, count in (("train_qa.json", 768), ("val_qa.json", 240), ("test_qa.json", 1056)):
        assert len({row["video_id"] for row in everything[name]}) == count
    assert {row["answer"] for row in everything["train_qa.json"]} == set(ANSWER_WORDS)
    share = Counter(row["type"] for row in everything["train_qa.json"])
    for kind, wanted in QUESTION_SHARES.items():
        assert abs(share[kind] / 2304 - wanted) < 0.06, (kind, share)


def test_the_full_datasets_text_is_the_same_on_every_machine(everything):
    text = json.dumps(everything, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d3b1897606a3f17a"


# The world in which pixels do not tell


@pytest.fixture(scope="module")
def memory() -> list[synthetic_clips.Scene]:
    """Scenes of many clips in the world "memory"."""
    return [draw_scene(0, f"clip{i}", "memory") for i in range(1500)]


def test_only_a_pole_tells_the_cast_in_the_world_of_memory(memory):
    hues: dict[str, list[float]] = {}
    for scene in memory:
        hues.setdefault("background", []).append(scene.hue)
        for thing in scene.things:
            hues.setdefault(thing.shape, []).append(thing.hue)

    def concentration(kind: str) -> tuple[float, float]:
        mean = np.exp(1j * np.radians(hues[kind])).mean()
        return abs(mean), math.degrees(np.angle(mean)) % 360

    length, mean = concentration("pole")
    assert length == pytest.approx(math.exp(-(math.radians(20) ** 2) / 2), abs=0.02)  # N(120, 20), wrapped
    assert mean == pytest.approx(120, abs=3)
    for kind in ("background", "disk", "ring", "bar"):
        assert concentration(kind)[0] < 0.08, kind
    sky = [draw_scene(0, f"clip{i}") for i in range(1500)]
    bare = [
        [
            scene._replace(hue=0.0, things=[thing._replace(hue=0.0, color="") for thing in scene.things])
            for scene in world
        ]
        for world in (memory, sky)
    ]
    assert bare[0] == bare[1]  # all else is as in the other world


def test_nobody_asks_for_the_color_that_everyone_knows(memory):
    asked = Counter()
    for i, scene in enumerate(memory):
        rows = draw_questions(0, f"clip{i}", scene, 3, "memory")
        assert len(set(rows)) == 3
        colors = {thing.shape: thing.color for thing in scene.things}
        for kind, question, answer in rows:
            asked[kind] += 1
            if kind == "color":
                shape = question.removeprefix("what color is the ").rstrip("?")
                assert answer == colors[shape]
                assert shape != "pole"
    assert asked["color"] / sum(asked.values()) == pytest.approx(
        0.32, abs=0.02
    )  # of a clip with poles alone nobody asks


def test_worlds_share_captioned_clips_and_no_name(tmp_path):
    tiny = DatasetCounts(seen=2, unseen=1, val=1, captioned=3)
    worlds = [("sky", 0), ("sky", 1), ("memory", 0)]
    names = [[clip.name for clip in plan(tiny, seed, world)] for world, seed in worlds]
    assert len({name for each in names for name in each}) == sum(map(len, names))
    assert [sum(name.startswith("web") for name in each) for each in names] == [3, 0, 0]
    for world, seed in worlds[1:]:
        texts = annotations(seed, plan(tiny, seed, world), 3, world)
        assert not texts.keys() & {"captions.json", "pretraining_qa.json", "vocab.txt"}
        groups = {row["device"][:4] for row in json.loads(texts["devices.json"]).values()}
        assert groups == {"seen", "unse", "val0"}
        assert json.loads(texts["test_seen_qa.json"])
    least = DatasetCounts(seen=1, unseen=1, val=1, labelled=1, history=1, test_seen=1, test=1)
    arguments = [str(tmp_path / "world"), "--world", "memory", "--seed", "3"]
    synthetic_clips.make(tmp_path / "world", least, 3, "memory")
    record = json.loads((tmp_path / "world" / "digests.json").read_text())
    assert (record["world"], record["seed"]) == ("memory", 3)
    assert synthetic_clips.main(arguments) == 3  # another size
    with pytest.raises(DataError, match="'world': 'memory'"):
        synthetic_clips.make(tmp_path / "world", least, 3)


def test_every_word_has_a_piece_of_its_own(everything):
    pieces = set(everything["vocab.txt"].split())
    texts = [row["caption"] for row in everything["captions.json"]["sentences"]]
    texts += [row["question"] for name in ("train_qa.json", "test_qa.json") for row in everything[name]]
    assert {word for text in texts for word in text.replace("?", " ?").split()} <= pieces
    assert everything["vocab.txt"].split()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_labels_say_what_is_there_and_captions_what_it_looks_like():
    for clip in (f"web{i:05}" for i in range(0, 200, 2)):
        scene = draw_scene(0, clip)
        colors = {thing.shape: thing.color for thing in scene.things}
        for kind, question, answer in draw_questions(0, clip, scene, 3):
            if kind == "color":
                assert answer == colors[question.removeprefix("what color is the ").rstrip("?")]
            if kind == "count":
                assert answer == ("one", "two")[len(colors) - 1]
        thing = scene.things[0]
        assert f"{thing.size} {thing.color} {thing.shape}" in describe_scene(scene, 0.0)  # without a cast, as it is
        assert f"{thing.size} {name_hue(thing.hue + 180, HUES)} {thing.shape}" in describe_scene(scene, 180.0)
        assert name_hue(thing.hue + 180) != thing.color


@pytest.mark.parametrize("cast", [0.0, 90.0, -120.0])
def test_a_cast_rotates_the_hues_of_objects_and_background_alike(cast):
    scene = draw_scene(0, "web00000")
    frames = render(0, "web00000", scene, Camera(cast, 1, 1, 0, 0, 1, 1))
    rgb = frames[0].reshape(-1, 3) / 255.0
    hue = np.degrees(np.arctan2(math.sqrt(3) * (rgb[:, 1] - rgb[:, 2]), 2 * rgb[:, 0] - rgb[:, 1] - rgb[:, 2]))
    difference = (np.median((hue - scene.hue - cast + 180) % 360 - 180) + 180) % 360 - 180
    assert abs(difference) < 10


def test_the_clips_are_made_again_bit_by_bit(synthetic, tmp_path):
    """Also after an interruption: what is there stays, what is missing or half-written is made."""
    again = tmp_path / "again"
    folder = again / "YouTubeClips"
    folder.mkdir(parents=True)
    clips = sorted((synthetic / "YouTubeClips").glob("*.mp4"))
    shutil.copy(clips[0], folder)
    when = (folder / clips[0].name).stat().st_mtime_ns
    (folder / f".{clips[1].stem}.123.tmp").write_bytes(b"half")
    synthetic_clips.make(again, TINY)
    assert (again / "digests.json").read_bytes() == (synthetic / "digests.json").read_bytes()
    assert (folder / clips[0].name).stat().st_mtime_ns == when
    assert not list(folder.glob(".*"))
    synthetic_clips.make(again, TINY)  # checks
    with pytest.raises(DataError, match="asked for"):
        synthetic_clips.make(again, TINY._replace(seen=9))
    with (again / "train_qa.json").open("a") as file:
        file.write(" ")
    (folder / clips[2].name).write_bytes(b"other")
    with pytest.raises(DataError, match=r"YouTubeClips, train_qa.json changed"):
        synthetic_clips.make(again, TINY)


def module(root: Path, folder: Path, **arguments: object) -> Synthetic:
    return Synthetic(str(root), str(folder), 17, image_size=64, resize=64, batch_size=4, num_workers=0,
        vocab=str(root / "vocab.txt"), **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(synthetic, tmp_path_factory) -> Synthetic:
    found = module(synthetic, tmp_path_factory.mktemp("data"))
    found.prepare_data()
    found.setup("fit")
    return found


def test_msvds_loader_reads_it(synthetic, data, tmp_path):
    plain = MSVDQA(str(synthetic), str(tmp_path), 17, image_size=64, resize=64, num_workers=0,
                   vocab=str(synthetic / "vocab.txt"))  # fmt: skip
    for split in SPLITS:
        assert plain.read_split(split) == data.read_split(split)


def test_the_frames_are_those_that_were_drawn(synthetic, data):
    sample = data.dataset("test", augment=False).samples[0]
    camera = synthetic_clips.draw_camera(0, str(data.devices[sample.clip]["device"]))
    drawn = render(0, sample.clip, draw_scene(0, sample.clip), camera)[[1, 3, 5]]
    seen = data.example("test", 0).frames
    assert seen.shape == (3, 64, 64, 3)
    assert np.abs(seen.astype(float) - drawn).mean() < 3  # the codec's


def test_groups_and_devices_are_what_the_names_say(data):
    for split, groups in (("train", {"seen"}), ("val", {"unseen"}), ("test", {"seen", "unseen"})):
        origins = data.origins(split)
        assert {origin.group for origin in origins} == groups
        assert all(origin.clip.startswith(origin.device) for origin in origins)
        assert {origin.type for origin in origins} <= set(QUESTION_SHARES)


def test_anchors_are_other_unlabelled_clips_of_the_same_device(data):
    sessions = data.sessions()
    clips = [sample.clip for sample in sessions.anchors.samples]
    assert not {origin.clip for split in ("val", "test") for origin in data.origins(split)} & set(clips)
    for split in SPLITS:
        for origin, device, own in zip(data.origins(split), sessions.devices[split], sessions.own[split], strict=True):
            assert {clips[anchor].rpartition("_")[0] for anchor in sessions.pools[device]} == {origin.device}
            assert (clips[own] == origin.clip) if own >= 0 else (split != "train")
            assert sessions.casts[device] == data.devices[origin.clip]["cast"]
    (batch,) = [sessions.anchors.__getitems__([(0, 0), (0, 1)])]
    assert batch.text_ids.tolist() == [[2, *[4] * 8, 3]] * 2  # [CLS], eight [MASK], [SEP]


def session_dataset(data: Synthetic, split: str) -> SessionDataset:
    sessions = data.sessions()
    number = len(sessions.anchors)
    anchors = torch.eye(number)  # so that a mean tells who is in it
    labels = data.labels(split)
    samples = FeatureDataset({"frame_features": torch.zeros(len(labels), 3, 192)}, labels)
    return SessionDataset(samples, anchors, sessions, split, seed=0)


def test_a_training_sample_is_told_all_other_clips_of_its_device_or_nothing(data):
    dataset, sessions = session_dataset(data, "train"), data.sessions()
    drawn = set()
    for epoch in range(12):
        batch = dataset.__getitems__([(epoch, index) for index in range(len(dataset))])
        again = dataset.__getitems__([(epoch, 0)])
        assert torch.equal(again.uploads[0], batch.uploads[0])
        for index, (upload, number) in enumerate(zip(batch.uploads[:, 0], batch.anchors[:, 0].tolist(), strict=True)):
            members = set(upload.nonzero().flatten().tolist())
            others = set(sessions.pools[sessions.devices["train"][index]]) - {sessions.own["train"][index]}
            assert members == (others if number else set())
            assert number in (0, len(others))
            if number:
                torch.testing.assert_close(upload.max(), torch.tensor(1 / number))
            drawn.add(number > 0)
    assert drawn == {True, False}


def test_a_device_uploads_the_same_for_all_its_questions(data):
    dataset, sessions = session_dataset(data, "test"), data.sessions()
    batch = dataset.__getitems__([(0, index) for index in range(len(dataset))])
    for index, device in enumerate(sessions.devices["test"]):
        first = sessions.devices["test"].index(device)
        assert torch.equal(batch.uploads[index], batch.uploads[first])
        pool = set(sessions.pools[device])
        for place, (name, case) in enumerate(SESSION_CASES.items()):
            members = set(batch.uploads[index, place].nonzero().flatten().tolist())
            assert len(members) == batch.anchors[index, place] == min(case.anchors, len(pool)), name
            assert not case.alike or members == set(sessions.alike[device])
            assert not members or (members <= pool) != case.shuffled
        cast = math.radians(sessions.casts[device])
        assert batch.casts[index].tolist() == pytest.approx([math.cos(cast), math.sin(cast)], abs=1e-6)


def test_nothing_is_fitted_on_devices_that_do_not_train(synthetic, tmp_path):
    """What training may know of anchors is those of the devices that train: the axes, too, are found in them alone."""
    data = module(synthetic, tmp_path)
    model = AllInOne(num_frames=3, image_size=64, depth=1, vocab_size=100)
    view = SessionDataModule(data, model, OpenEnded(17), lambda features: model.pool(features.mean(-2)))
    method = CDCMMPGSession(model, OpenEnded(17), axes=2)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(method, view)
    anchors, pools = view.history()
    clips = [sample.clip for sample in data.sessions().anchors.samples]
    named = [{str(data.devices[clips[anchor]]["device"]) for anchor in pool} for pool in pools]
    assert all(len(names) == 1 for names in named)
    assert {name for names in named for name in names} == {origin.device for origin in data.origins("train")}
    others = {origin.device for split in ("val", "test") for origin in data.origins(split) if origin.group == "unseen"}
    assert others
    assert not others & {name for names in named for name in names}
    known = {anchor for pool in pools for anchor in pool}
    assert len(known) < len(anchors)
    assert not {clips[anchor] for anchor in known} & {
        origin.clip for split in ("val", "test") for origin in data.origins(split)
    }
    again = DeviceAxes(2)
    elsewhere = anchors.clone()
    elsewhere[[anchor for anchor in range(len(anchors)) if anchor not in known]] = float("nan")
    again.fit(elsewhere, pools)
    assert torch.equal(method.axes.axes, again.axes)


def test_captions_are_held_out_by_clip(data):
    captions = data.captions()
    train, val = ({sample.clip for sample in part.captions.samples} for part in (captions.train, captions.val))
    assert not train & val
    assert captions.clips == len(train) == len(captions.train)
    batch = captions.train.__getitems__([(1, 0), (1, 5)])
    assert batch.frames.shape == (2, 3, 64, 64, 3)
    assert len(batch.text_ids) == len(batch.caption_ids) == 2
    for part, moves in ((captions.train, True), (captions.val, False)):
        asked = [part.__getitems__([(epoch, 0)]).text_ids.tolist() for epoch in range(4)]
        assert (asked[0] != asked[1]) == moves
        assert asked[0] == asked[3]


def test_a_dataset_without_devices_or_captions_says_so(msvd, tmp_path):
    plain = MSVDQA(str(msvd), str(tmp_path), 5, vocab=str(msvd / "vocab.txt"))
    with pytest.raises(ConfigError, match="devices"):
        plain.sessions()
    with pytest.raises(ConfigError, match="captions"):
        plain.captions()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("devices.json", '{"a": {"device": "x"}}', "devices.json: 'a'"),
        ("devices.json", "[1]", "not {device"),
        ("captions.json", "{}", "sentences"),
        ("captions.json", '{"sentences": []}', "empty list"),
        ("captions.json", "{", "line 1"),
    ],
)
def test_damaged_files_are_refused_by_name(synthetic, data, tmp_path, name, text, message):
    root = tmp_path / "damaged"
    shutil.copytree(synthetic, root)
    (root / name).write_text(text)
    damaged = module(root, tmp_path / "cache")
    damaged.cache = data.cache
    if name == "devices.json":
        with pytest.raises(DataError, match=message):
            damaged.list_further_clips()
        return
    damaged.setup("fit")
    with pytest.raises(DataError, match=message):
        damaged.captions()


def test_frames_cannot_be_smaller_than_what_is_cut_out_of_them(synthetic, tmp_path):
    with pytest.raises(ConfigError, match="resize is 32"):
        Synthetic(str(synthetic), str(tmp_path), 17, image_size=64, resize=32)


@pytest.mark.parametrize(("method", "batch_size"), [("encoder_pretraining", 8), ("cdc_mmpg_session", 3)])
def test_stopped_in_the_middle_it_ends_as_if_nothing_had_happened(method, batch_size, synthetic, tmp_path):
    """Warm-up, the turn to questions and the sessions drawn all follow from seed, epoch and index."""

    def command(out: Path, pause: float) -> list[str]:
        return [
            "fit", f"--config=experiments/methods/{method}.yaml", "--config=experiments/datasets/synthetic.yaml",
            f"--trainer.default_root_dir={out / method / 'seed0'}", f"--data.init_args.root={synthetic}",
            f"--data.init_args.cache_dir={tmp_path / 'data'}", f"--data.init_args.vocab={synthetic / 'vocab.txt'}",
            f"--data.init_args.batch_size={batch_size}", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=3",
            "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
            *(["--model.init_args.caption_epochs=1"] if method == "encoder_pretraining" else []),
            *recording(out / "last.pt", pause),
        ]  # fmt: skip

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "log", main, command(tmp_path / "whole", 0.0))
    assert finish(process) == 0, (tmp_path / "log").read_text()
    last = tmp_path / "stopped" / "last.pt"
    process = start(tmp_path / "log", main, command(tmp_path / "stopped", 0.1))
    until(lambda: steps(last) >= 5, process)  # in the second epoch, or late in the first
    kill(process, signal.SIGTERM)
    assert finish(process) == 143, (tmp_path / "log").read_text()
    process = start(tmp_path / "log", main, command(tmp_path / "stopped", 0.1))
    assert finish(process) == 0, (tmp_path / "log").read_text()
    expected = torch.load(tmp_path / "whole" / "last.pt")
    for name, value in torch.load(last).items():
        assert torch.equal(value, expected[name]), name


def test_a_toy_is_made_and_never_taken_for_the_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(synthetic_clips.DATASET_SIZES, "toy", TINY._replace(seen=2, captioned=8, val=1))
    assert synthetic_clips.main([str(tmp_path / "clips"), "--size", "toy"]) == 0
    assert synthetic_clips.main([str(tmp_path / "clips"), "--size", "toy"]) == 0  # checked
    assert synthetic_clips.main([str(tmp_path / "clips")]) == 3
    assert "delete or rename the folder" in capsys.readouterr().err


def test_captioned_clips_are_the_same_from_the_device(data, synthetic):
    batches = []
    for own in (data, module(synthetic, data.cache_dir, frame_cache="device")):
        view = CaptionDataModule(own)
        view.setup("fit")
        loaded = [next(iter(loader)) for loader in (view.train_dataloader(), view.val_dataloader())]
        batches.append([view.transfer_batch_to_device(batch, torch.device("cpu"), 0) for batch in loaded])
    assert batches[0][0].frames.shape == (4, 3, 64, 64, 3)
    for one, another in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, another, strict=True))


def test_fewer_devices_train_and_the_others_are_a_group_of_their_own(data, synthetic, tmp_path):
    fewer = module(synthetic, tmp_path, most_devices=1)
    fewer.prepare_data()
    fewer.setup("fit")
    first = min(origin.device for origin in data.origins("train"))
    assert {origin.device for origin in fewer.origins("train")} == {first}
    assert {origin.device for origin in data.origins("train")} > {first}
    for usual, own in zip(data.origins("test"), fewer.origins("test"), strict=True):
        assert own == usual._replace(group=own.group)
        assert own.group == ("seen" if own.device == first else {"seen": "left out"}.get(usual.group, usual.group))
    assert fewer.sessions().pools == data.sessions().pools  # a device that does not train has its clips
    with pytest.raises(ConfigError, match="most_devices"):
        module(synthetic, tmp_path, most_devices=0)


def test_no_device_trains_whose_cast_is_in_the_arc(data, synthetic, tmp_path):
    casts = dict(zip((o.device for o in data.origins("test")), data.sessions().devices["test"], strict=True))
    casts = {device: data.sessions().casts[place] % 360 for device, place in casts.items()}
    seen = {origin.device for origin in data.origins("train")}
    arc = next(cast for cast in sorted(casts.values()) if 0 < sum(casts[d] < cast for d in seen) < len(seen)) + 1e-6
    held = module(synthetic, tmp_path, held_out_arc=arc)
    held.prepare_data()
    held.setup("fit")
    assert {origin.device for origin in held.origins("train")} == {device for device in seen if casts[device] >= arc}
    for origin in held.origins("test"):
        inside = casts[origin.device] < arc
        groups = ("left out", "seen") if origin.device in seen else ("arc", "unseen")
        assert origin.group == groups[0 if inside else 1]
    with pytest.raises(ConfigError, match="held_out_arc"):
        module(synthetic, tmp_path, held_out_arc=360.0)


def test_captions_can_leave_out_what_is_behind_the_objects(data, synthetic, tmp_path):
    bare = module(synthetic, tmp_path, name_backgrounds=False)
    bare.prepare_data()
    bare.setup("fit")
    usual, own = ([sample.question for sample in each.captions().train.captions.samples] for each in (data, bare))
    assert [caption.rsplit(" on ", 1)[0] for caption in usual] == own
    assert not any(" on " in caption for caption in own)
    assert data.captions().fingerprint != bare.captions().fingerprint


def test_the_clips_of_a_room_are_those_of_the_smallest_arc():
    hues = np.array([350.0, 10, 200, 5, 100, 355, 0, 190])
    assert find_alike(hues, [0, 1, 2, 3, 4, 5, 6, 7], 5) == [0, 5, 6, 3, 1]  # over the end of the circle
    assert find_alike(hues, [2, 4, 7], 2) == [7, 2]
    assert find_alike(hues, [4], 2) == [4]
    assert find_alike(hues, [], 2) == []
