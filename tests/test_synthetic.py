"""The synthetic dataset: content, reproducibility, sessions, captions, and held-out devices."""

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
    describe_scene,
    draw_questions,
    draw_scene,
    make_annotations,
    name_hue,
    plan_clips,
    render,
)
from processes import build_recorder_arguments, count_steps, finish, kill, start, wait_until


@pytest.fixture(scope="module")
def annotations() -> dict[str, list[dict[str, object]]]:
    """Content of all annotation files of the full dataset, by file name."""
    texts = make_annotations(0, plan_clips(DatasetCounts()), DatasetCounts().questions)
    return {name: json.loads(text) if name.endswith(".json") else text for name, text in texts.items()}


@pytest.mark.slow
def test_the_full_dataset_has_the_counts_of_its_data_sheet(annotations):
    questions = {name: len(rows) for name, rows in annotations.items() if name.endswith("_qa.json")}
    assert questions == {
        "train_qa.json": 2304, "val_qa.json": 720, "test_qa.json": 3168, "test_seen_qa.json": 1728,
        "test_unseen_qa.json": 1440, "history_qa.json": 3456, "pretraining_qa.json": 18048,
    }  # fmt: skip
    assert len(annotations["captions.json"]["sentences"]) == 6016
    roles = Counter(row["role"] for row in annotations["devices.json"].values())
    assert roles == {"train": 768, "history": 96 * 16 + 72 * 24, "test": 576 + 480, "val": 240, "pretraining": 6016}
    assert len(annotations["devices.json"]) == len(annotations["youtube_mapping.txt"].splitlines()) == 11344
    for name, count in (("train_qa.json", 768), ("val_qa.json", 240), ("test_qa.json", 1056)):
        assert len({row["video_id"] for row in annotations[name]}) == count
    assert {row["answer"] for row in annotations["train_qa.json"]} == set(ANSWER_WORDS)
    type_counts = Counter(row["type"] for row in annotations["train_qa.json"])
    for kind, expected_share in QUESTION_SHARES.items():
        assert abs(type_counts[kind] / 2304 - expected_share) < 0.06, (kind, type_counts)


@pytest.mark.slow
def test_annotations_of_the_full_dataset_are_identical_on_every_machine(annotations):
    text = json.dumps(annotations, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "d3b1897606a3f17a"


# The "memory" world, in which single images do not reveal the cast


@pytest.fixture(scope="module")
def memory_scenes() -> list[synthetic_clips.Scene]:
    """Scenes of many clips of the "memory" world."""
    return [draw_scene(0, f"clip{i}", "memory") for i in range(1500)]


def test_only_poles_reveal_the_cast_in_the_memory_world(memory_scenes):
    hues: dict[str, list[float]] = {}
    for scene in memory_scenes:
        hues.setdefault("background", []).append(scene.hue)
        for thing in scene.things:
            hues.setdefault(thing.shape, []).append(thing.hue)

    def measure_concentration(kind: str) -> tuple[float, float]:
        mean = np.exp(1j * np.radians(hues[kind])).mean()
        return abs(mean), math.degrees(np.angle(mean)) % 360

    concentration, mean = measure_concentration("pole")
    assert concentration == pytest.approx(math.exp(-(math.radians(20) ** 2) / 2), abs=0.02)  # N(120, 20), wrapped
    assert mean == pytest.approx(120, abs=3)
    for kind in ("background", "disk", "ring", "bar"):
        assert measure_concentration(kind)[0] < 0.08, kind
    sky_scenes = [draw_scene(0, f"clip{i}") for i in range(1500)]
    colorless = [
        [
            scene._replace(hue=0.0, things=[thing._replace(hue=0.0, color="") for thing in scene.things])
            for scene in world
        ]
        for world in (memory_scenes, sky_scenes)
    ]
    assert colorless[0] == colorless[1]  # the worlds differ in colors only


def test_a_room_changes_only_the_backgrounds_of_its_device():
    rooms = []
    for device in range(300):
        names = [f"seen{device:03}-rooms0_{i:02}" for i in range(4)]
        pairs = [(draw_scene(0, name, "rooms"), draw_scene(0, name)) for name in names]
        assert all(room._replace(hue=0.0) == sky._replace(hue=0.0) for room, sky in pairs)
        shifts = {round(room.hue - sky.hue, 6) for room, sky in pairs}
        assert len(shifts) == 1  # all clips of a device show the same room
        rooms += shifts
    assert np.std(rooms) == pytest.approx(20, abs=2)
    assert np.mean(rooms) == pytest.approx(0, abs=3)


def test_no_question_asks_for_the_color_of_a_pole(memory_scenes):
    question_counts = Counter()
    for i, scene in enumerate(memory_scenes):
        rows = draw_questions(0, f"clip{i}", scene, 3, "memory")
        assert len(set(rows)) == 3
        colors = {thing.shape: thing.color for thing in scene.things}
        for kind, question, answer in rows:
            question_counts[kind] += 1
            if kind == "color":
                shape = question.removeprefix("what color is the ").rstrip("?")
                assert answer == colors[shape]
                assert shape != "pole"
    assert question_counts["color"] / sum(question_counts.values()) == pytest.approx(
        0.32, abs=0.02
    )  # clips with nothing but poles have no color questions


def test_worlds_share_captioned_clips_but_no_clip_names(tmp_path):
    tiny = DatasetCounts(seen=2, unseen=1, val=1, captioned=3)
    worlds = [("sky", 0), ("sky", 1), ("memory", 0), ("rooms", 0)]
    names = [[clip.name for clip in plan_clips(tiny, seed, world)] for world, seed in worlds]
    assert len({name for world_names in names for name in world_names}) == sum(map(len, names))
    assert [sum(name.startswith("web") for name in world_names) for world_names in names] == [3, 0, 0, 0]
    for world, seed in worlds[1:]:
        texts = make_annotations(seed, plan_clips(tiny, seed, world), 3, world)
        assert not texts.keys() & {"captions.json", "pretraining_qa.json", "vocab.txt"}
        groups = {row["device"][:4] for row in json.loads(texts["devices.json"]).values()}
        assert groups == {"seen", "unse", "val0"}
        assert json.loads(texts["test_seen_qa.json"])
    minimal = DatasetCounts(seen=1, unseen=1, val=1, labelled=1, history=1, test_seen=1, test=1)
    arguments = [str(tmp_path / "world"), "--world", "memory", "--seed", "3"]
    synthetic_clips.render_dataset(tmp_path / "world", minimal, 3, "memory")
    record = json.loads((tmp_path / "world" / "digests.json").read_text())
    assert (record["world"], record["seed"]) == ("memory", 3)
    assert synthetic_clips.main(arguments) == 3  # another size is refused
    with pytest.raises(DataError, match=r"other settings \(world: memory there, sky requested\): delete"):
        synthetic_clips.render_dataset(tmp_path / "world", minimal, 3)


def test_every_word_is_in_the_vocabulary(annotations):
    pieces = set(annotations["vocab.txt"].split())
    texts = [row["caption"] for row in annotations["captions.json"]["sentences"]]
    texts += [row["question"] for name in ("train_qa.json", "test_qa.json") for row in annotations[name]]
    assert {word for text in texts for word in text.replace("?", " ?").split()} <= pieces
    assert annotations["vocab.txt"].split()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_labels_give_the_true_color_and_captions_the_color_under_the_cast():
    for clip in (f"web{i:05}" for i in range(0, 200, 2)):
        scene = draw_scene(0, clip)
        colors = {thing.shape: thing.color for thing in scene.things}
        for kind, question, answer in draw_questions(0, clip, scene, 3):
            if kind == "color":
                assert answer == colors[question.removeprefix("what color is the ").rstrip("?")]
            if kind == "count":
                assert answer == ("one", "two")[len(colors) - 1]
        thing = scene.things[0]
        assert f"{thing.size} {thing.color} {thing.shape}" in describe_scene(
            scene, 0.0
        )  # the true color without a cast
        assert f"{thing.size} {name_hue(thing.hue + 180, HUES)} {thing.shape}" in describe_scene(scene, 180.0)
        assert name_hue(thing.hue + 180) != thing.color


@pytest.mark.parametrize("cast", [0.0, 90.0, -120.0])
def test_cast_rotates_the_hues_of_the_image(cast):
    scene = draw_scene(0, "web00000")
    frames = render(0, "web00000", scene, Camera(cast, 1, 1, 0, 0, 1, 1))
    rgb = frames[0].reshape(-1, 3) / 255.0
    hue = np.degrees(np.arctan2(math.sqrt(3) * (rgb[:, 1] - rgb[:, 2]), 2 * rgb[:, 0] - rgb[:, 1] - rgb[:, 2]))
    difference = (np.median((hue - scene.hue - cast + 180) % 360 - 180) + 180) % 360 - 180
    assert abs(difference) < 10


def test_clips_are_reproduced_exactly(synthetic, tmp_path):
    """After an interruption, complete clips are kept, and missing or partial ones are rendered."""
    second = tmp_path / "again"
    folder = second / "YouTubeClips"
    folder.mkdir(parents=True)
    clips = sorted((synthetic / "YouTubeClips").glob("*.mp4"))
    shutil.copy(clips[0], folder)
    modified_ns = (folder / clips[0].name).stat().st_mtime_ns
    (folder / f".{clips[1].stem}.123.tmp").write_bytes(b"half")
    synthetic_clips.render_dataset(second, TINY)
    assert (second / "digests.json").read_bytes() == (synthetic / "digests.json").read_bytes()
    assert (folder / clips[0].name).stat().st_mtime_ns == modified_ns
    assert not list(folder.glob(".*"))
    synthetic_clips.render_dataset(second, TINY)  # checks the existing files
    with pytest.raises(DataError, match=rf"\(seen: {TINY.seen} there, 9 requested\)"):
        synthetic_clips.render_dataset(second, TINY._replace(seen=9))
    with (second / "train_qa.json").open("a") as file:
        file.write(" ")
    (folder / clips[2].name).write_bytes(b"other")
    with pytest.raises(DataError, match=r"YouTubeClips, train_qa.json changed"):
        synthetic_clips.render_dataset(second, TINY)
    (second / "digests.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be compared .*'files'.*: delete the folder and render it again"):
        synthetic_clips.render_dataset(second, TINY)


def build_data(root: Path, folder: Path, **arguments: object) -> Synthetic:
    return Synthetic(str(root), str(folder), 17, image_size=64, resize=64, batch_size=4, num_workers=0,
        vocab=str(root / "vocab.txt"), **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(synthetic, tmp_path_factory) -> Synthetic:
    data_module = build_data(synthetic, tmp_path_factory.mktemp("data"))
    data_module.prepare_data()
    data_module.setup("fit")
    return data_module


def test_the_msvd_loader_reads_the_dataset(synthetic, data, tmp_path):
    plain = MSVDQA(str(synthetic), str(tmp_path), 17, image_size=64, resize=64, num_workers=0,
                   vocab=str(synthetic / "vocab.txt"))  # fmt: skip
    for split in SPLITS:
        assert plain.read_split(split) == data.read_split(split)


def test_every_test_question_has_an_id_of_its_own(data):
    assert list(data.locate_test_questions().values()) == list(range(len(data.samples("test"))))
    assert all(sample.id for sample in data.samples("test"))


def test_decoded_frames_equal_the_rendered_ones(synthetic, data):
    sample = data.dataset("test", augment=False).samples[0]
    camera = synthetic_clips.draw_camera(0, str(data.devices[sample.clip]["device"]))
    rendered = render(0, sample.clip, draw_scene(0, sample.clip), camera)[[1, 3, 5]]
    decoded = data.example("test", 0).frames
    assert decoded.shape == (3, 64, 64, 3)
    assert np.abs(decoded.astype(float) - rendered).mean() < 3  # compression error


def test_groups_and_devices_match_the_clip_names(data):
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
        for origin, device, own_anchor in zip(
            data.origins(split), sessions.devices[split], sessions.own_anchors[split], strict=True
        ):
            assert {clips[anchor].rpartition("_")[0] for anchor in sessions.pools[device]} == {origin.device}
            assert (clips[own_anchor] == origin.clip) if own_anchor >= 0 else (split != "train")
            assert sessions.casts[device] == data.devices[origin.clip]["cast"]
    (batch,) = [sessions.anchors.__getitems__([(0, 0), (0, 1)])]
    assert batch.text_ids.tolist() == [[2, *[4] * 8, 3]] * 2  # [CLS], eight [MASK], [SEP]


def build_session_dataset(data: Synthetic, split: str) -> SessionDataset:
    sessions = data.sessions()
    number = len(sessions.anchors)
    anchors = torch.eye(number)  # the nonzero coordinates of a mean are its members
    labels = data.labels(split)
    samples = FeatureDataset({"frame_features": torch.zeros(len(labels), 3, 192)}, labels)
    return SessionDataset(samples, anchors, sessions, split, seed=0)


def test_training_upload_is_the_mean_of_the_other_clips_of_the_device_or_zero(data):
    dataset, sessions = build_session_dataset(data, "train"), data.sessions()
    has_upload = set()
    for epoch in range(12):
        batch = dataset.__getitems__([(epoch, index) for index in range(len(dataset))])
        redrawn = dataset.__getitems__([(epoch, 0)])
        assert torch.equal(redrawn.uploads[0], batch.uploads[0])
        for index, (upload, number) in enumerate(zip(batch.uploads[:, 0], batch.anchors[:, 0].tolist(), strict=True)):
            members = set(upload.nonzero().flatten().tolist())
            others = set(sessions.pools[sessions.devices["train"][index]]) - {sessions.own_anchors["train"][index]}
            assert members == (others if number else set())
            assert number in (0, len(others))
            if number:
                torch.testing.assert_close(upload.max(), torch.tensor(1 / number))
            has_upload.add(number > 0)
    assert has_upload == {True, False}


def test_all_questions_of_a_device_share_its_upload(data):
    dataset, sessions = build_session_dataset(data, "test"), data.sessions()
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


def test_device_axes_are_fitted_on_training_devices_only(synthetic, tmp_path):
    """Anchors of other devices have no effect: replacing them by NaN gives the same axes."""
    data = build_data(synthetic, tmp_path)
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
    pool_devices = [{str(data.devices[clips[anchor]]["device"]) for anchor in pool} for pool in pools]
    assert all(len(names) == 1 for names in pool_devices)
    assert {name for names in pool_devices for name in names} == {origin.device for origin in data.origins("train")}
    unseen_devices = {
        origin.device for split in ("val", "test") for origin in data.origins(split) if origin.group == "unseen"
    }
    assert unseen_devices
    assert not unseen_devices & {name for names in pool_devices for name in names}
    used_anchors = {anchor for pool in pools for anchor in pool}
    assert len(used_anchors) < len(anchors)
    assert not {clips[anchor] for anchor in used_anchors} & {
        origin.clip for split in ("val", "test") for origin in data.origins(split)
    }
    refitted = DeviceAxes(2)
    masked_anchors = anchors.clone()
    masked_anchors[[anchor for anchor in range(len(anchors)) if anchor not in used_anchors]] = float("nan")
    refitted.fit(masked_anchors, pools)
    assert torch.equal(method.axes.axes, refitted.axes)


def test_captions_are_held_out_by_clip(data):
    captions = data.captions()
    train, val = ({sample.clip for sample in part.captions.samples} for part in (captions.train, captions.val))
    assert not train & val
    assert captions.clips == len(train) == len(captions.train)
    batch = captions.train.__getitems__([(1, 0), (1, 5)])
    assert batch.frames.shape == (2, 3, 64, 64, 3)
    assert len(batch.text_ids) == len(batch.caption_ids) == 2
    for part, is_redrawn in ((captions.train, True), (captions.val, False)):
        questions = [part.__getitems__([(epoch, 0)]).text_ids.tolist() for epoch in range(4)]
        assert (questions[0] != questions[1]) == is_redrawn
        assert questions[0] == questions[3]


def test_datasets_without_devices_or_captions_are_refused(msvd, tmp_path):
    plain = MSVDQA(str(msvd), str(tmp_path), 5, vocab=str(msvd / "vocab.txt"))
    with pytest.raises(ConfigError, match="devices"):
        plain.sessions()
    with pytest.raises(ConfigError, match="captions"):
        plain.captions()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("devices.json", '{"a": {"device": "x"}}', "devices.json: 'a' (.|\n)*delete .* and render it again: cdc-mmpg"),
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
    damaged = build_data(root, tmp_path / "cache")
    damaged.cache = data.cache
    if name == "devices.json":
        with pytest.raises(DataError, match=message):
            damaged.list_further_clips()
        return
    damaged.setup("fit")
    with pytest.raises(DataError, match=message):
        damaged.captions()


def test_resize_smaller_than_the_crop_is_refused(synthetic, tmp_path):
    with pytest.raises(ConfigError, match="resize is 32"):
        Synthetic(str(synthetic), str(tmp_path), 17, image_size=64, resize=32)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "batch_size"), [("encoder_pretraining", 8), ("cdc_mmpg_session", 3)])
def test_interrupted_run_ends_with_the_same_weights(method, batch_size, synthetic, tmp_path):
    """Warm-up, the switch to questions, and session draws depend only on seed, epoch and index."""

    def build_arguments(out: Path, pause: float) -> list[str]:
        return [
            "fit", f"--config=experiments/methods/{method}.yaml", "--config=experiments/datasets/synthetic.yaml",
            f"--trainer.default_root_dir={out / method / 'seed0'}", f"--data.init_args.root={synthetic}",
            f"--data.init_args.cache_dir={tmp_path / 'data'}", f"--data.init_args.vocab={synthetic / 'vocab.txt'}",
            f"--data.init_args.batch_size={batch_size}", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=3",
            "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
            *(["--model.init_args.caption_epochs=1"] if method == "encoder_pretraining" else []),
            *build_recorder_arguments(out / "last.pt", pause),
        ]  # fmt: skip

    for name in ("uninterrupted", "stopped"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "log", main, build_arguments(tmp_path / "uninterrupted", 0.0))
    assert finish(process) == 0, (tmp_path / "log").read_text()
    final_weights = tmp_path / "stopped" / "last.pt"
    process = start(tmp_path / "log", main, build_arguments(tmp_path / "stopped", 0.1))
    wait_until(lambda: count_steps(final_weights) >= 5, process)  # in the second epoch, or late in the first
    kill(process, signal.SIGTERM)
    assert finish(process) == 143, (tmp_path / "log").read_text()
    process = start(tmp_path / "log", main, build_arguments(tmp_path / "stopped", 0.1))
    assert finish(process) == 0, (tmp_path / "log").read_text()
    expected = torch.load(tmp_path / "uninterrupted" / "last.pt")
    for name, value in torch.load(final_weights).items():
        assert torch.equal(value, expected[name]), name


def test_toy_dataset_is_not_accepted_as_the_full_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(synthetic_clips.DATASET_SIZES, "toy", TINY._replace(seen=2, captioned=8, val=1))
    assert synthetic_clips.main([str(tmp_path / "clips"), "--size", "toy"]) == 0
    assert synthetic_clips.main([str(tmp_path / "clips"), "--size", "toy"]) == 0  # checked
    assert synthetic_clips.main([str(tmp_path / "clips")]) == 3
    assert "delete or rename the folder" in capsys.readouterr().err


def test_captioned_batches_from_the_device_cache_are_identical(data, synthetic):
    batches = []
    for data_module in (data, build_data(synthetic, data.cache_dir, frame_cache="device")):
        view = CaptionDataModule(data_module)
        view.setup("fit")
        loaded = [next(iter(loader)) for loader in (view.train_dataloader(), view.val_dataloader())]
        batches.append([view.transfer_batch_to_device(batch, torch.device("cpu"), 0) for batch in loaded])
    assert batches[0][0].frames.shape == (4, 3, 64, 64, 3)
    for from_files, from_device in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(from_files, from_device, strict=True))


def test_devices_beyond_most_devices_form_a_separate_group(data, synthetic, tmp_path):
    fewer = build_data(synthetic, tmp_path, most_devices=1)
    fewer.prepare_data()
    fewer.setup("fit")
    first = min(item.device for item in data.origins("train"))
    assert {item.device for item in fewer.origins("train")} == {first}
    assert {item.device for item in data.origins("train")} > {first}
    for origin, fewer_origin in zip(data.origins("test"), fewer.origins("test"), strict=True):
        assert fewer_origin == origin._replace(group=fewer_origin.group)
        assert fewer_origin.group == (
            "seen" if fewer_origin.device == first else {"seen": "left out"}.get(origin.group, origin.group)
        )
    assert fewer.sessions().pools == data.sessions().pools  # devices that do not train keep their anchors
    with pytest.raises(ConfigError, match="most_devices"):
        build_data(synthetic, tmp_path, most_devices=0)


def test_devices_with_a_cast_in_the_held_out_arc_do_not_train(data, synthetic, tmp_path):
    casts = dict(zip((o.device for o in data.origins("test")), data.sessions().devices["test"], strict=True))
    casts = {device: data.sessions().casts[place] % 360 for device, place in casts.items()}
    seen = {origin.device for origin in data.origins("train")}
    arc = next(cast for cast in sorted(casts.values()) if 0 < sum(casts[d] < cast for d in seen) < len(seen)) + 1e-6
    held_out = build_data(synthetic, tmp_path, held_out_arc=arc)
    held_out.prepare_data()
    held_out.setup("fit")
    assert {origin.device for origin in held_out.origins("train")} == {
        device for device in seen if casts[device] >= arc
    }
    for origin in held_out.origins("test"):
        inside = casts[origin.device] < arc
        groups = ("left out", "seen") if origin.device in seen else ("arc", "unseen")
        assert origin.group == groups[0 if inside else 1]
    with pytest.raises(ConfigError, match="held_out_arc"):
        build_data(synthetic, tmp_path, held_out_arc=360.0)


def test_captions_can_omit_the_background(data, synthetic, tmp_path):
    bare = build_data(synthetic, tmp_path, name_backgrounds=False)
    bare.prepare_data()
    bare.setup("fit")
    full_captions, short_captions = (
        [sample.question for sample in data_module.captions().train.captions.samples] for data_module in (data, bare)
    )
    assert [caption.rsplit(" on ", 1)[0] for caption in full_captions] == short_captions
    assert not any(" on " in caption for caption in short_captions)
    assert data.captions().fingerprint != bare.captions().fingerprint


def test_find_alike_returns_the_clips_in_the_smallest_arc_of_hues():
    hues = np.array([350.0, 10, 200, 5, 100, 355, 0, 190])
    assert find_alike(hues, [0, 1, 2, 3, 4, 5, 6, 7], 5) == [0, 5, 6, 3, 1]  # the arc crosses 360 degrees
    assert find_alike(hues, [2, 4, 7], 2) == [7, 2]
    assert find_alike(hues, [4], 2) == [4]
    assert find_alike(hues, [], 2) == []
