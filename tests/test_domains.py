"""Domains for datasets without devices: the domain of a clip, changed frames, and held-out clips."""

import colorsys
import hashlib
import json
import logging
import pickle
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import communities
from cdc_mmpg.commands import prepare
from cdc_mmpg.data.batch import SPLITS
from cdc_mmpg.data.interface import LabelsDevices
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.media.frames import choose_middle_candidates, crop
from cdc_mmpg.report import tables
from cdc_mmpg.training.cli import main
from communities import (
    build_small,
    write_captions,
    write_msrvtt_choice,
    write_msrvtt_qa,
    write_msrvtt_retrieval,
    write_tgif,
)
from data_modules.domains import (
    CATEGORIES,
    DEFAULT_HELD_OUT,
    DOMAIN_NAMES,
    SEVERITIES,
    Shift,
    add_noise,
    blur,
    choose_held_out,
    darken,
    rotate_hues,
)
from data_modules.msrvtt_choice import MSRVTTChoice
from data_modules.msrvtt_qa import MSRVTTQA
from data_modules.msrvtt_retrieval import MSRVTTRetrieval
from data_modules.msvd_qa import MSVDQA
from data_modules.synthetic import Synthetic
from data_modules.tgif_qa import TGIFFrameQA, is_held_out

CASTS = {"domains": "casts", "held_out": ["camera04", "camera12", "camera20"]}
CORRUPTIONS = {"domains": "corruptions", "held_out": ["hue-4", "noise-2"]}
CLIPS = {"train": range(16), "val": range(6513, 6525), "test": range(7010, 7020)}
KINDS = {"categories": {"domains": "categories"}, "casts": CASTS, "corruptions": CORRUPTIONS}


def shift(kind, *unseen):
    return Shift(kind, frozenset(unseen), {})


def write_colored_clip(path: Path, number: int) -> None:
    """Write a clip with one saturated color above another, so that every corruption changes it."""
    pixels = np.empty((32, 48, 3), np.uint8)
    for rows, hue in ((slice(0, 16), number % 9 / 9), (slice(16, 32), (number % 9 + 4) / 9)):
        pixels[rows] = [round(200 * channel) + 20 for channel in colorsys.hsv_to_rgb(hue % 1, 1, 1)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv444p"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv444p")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a folder for each MSRVTT task, with captions and colored clips; tests must not change it."""
    root = tmp_path_factory.mktemp("domains")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communities, "CLIPS", CLIPS)  # more than elsewhere: every split has clips of each group
        roots = {"qa": write_captions(write_msrvtt_qa(root / "qa")), "choice": write_msrvtt_choice(root / "choice"),
                 "retrieval": write_msrvtt_retrieval(root / "retrieval")}  # fmt: skip
    for number in [number for numbers in CLIPS.values() for number in numbers]:
        write_colored_clip(root / "qa" / "videos" / f"video{number}.mp4", number)
        for task in ("choice", "retrieval"):
            shutil.copy(root / "qa" / "videos" / f"video{number}.mp4", root / task / "videos")
    return roots


TASKS = {"qa": (MSRVTTQA, {"num_classes": 5}), "choice": (MSRVTTChoice, {}), "retrieval": (MSRVTTRetrieval, {})}


def build(folders, task="qa", **arguments):
    dataset, settings = TASKS[task]
    return build_small(dataset, folders[task], **settings, image_size=64, **arguments)


def set_up(folders, task="qa", **arguments):
    data = build(folders, task, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def numbers_of(samples):
    return sorted({int(sample.clip.removeprefix("video")) for sample in samples})


# Domain of a clip


def test_domain_names_never_change():
    assert len(CATEGORIES) == 20
    assert [CATEGORIES[number] for number in (0, 6, 17, 19)] == ["music", "tv shows", "cooking", "advertisement"]
    assert (DOMAIN_NAMES["casts"][0], DOMAIN_NAMES["casts"][-1], len(DOMAIN_NAMES["casts"])) == (
        "camera00",
        "camera23",
        24,
    )
    assert DOMAIN_NAMES["corruptions"][:3] == ("clean", "hue-1", "hue-2")
    assert len(DOMAIN_NAMES["corruptions"]) == 21
    assert DEFAULT_HELD_OUT == {
        "categories": ("gaming", "movie/comedy", "science/technology", "cooking"),
        "casts": ("camera02", "camera07", "camera12", "camera17", "camera22"),
        "corruptions": ("hue-5", "blur-5", "noise-5", "low-light-5"),
    }
    for kind, names in DEFAULT_HELD_OUT.items():
        assert choose_held_out(kind, None) == list(names)


def test_the_domain_of_a_clip_never_changes():
    assert [shift("casts").domain(f"video{n}") for n in (0, 6513, 7010)] == ["camera21", "camera18", "camera04"]
    assert [shift("corruptions").domain(f"video{n}") for n in (0, 6513, 7010)] == ["low-light-1", "blur-4", "hue-4"]


@pytest.mark.parametrize("kind", ["casts", "corruptions"])
def test_clips_are_spread_evenly_over_domains_in_every_split(kind):
    clips = [f"tumblr_{number}" for number in range(60_000)]
    for split_clips in (clips, [clip for clip in clips if is_held_out(clip)]):  # a tenth, by the same hash of the name
        counts = Counter(map(shift(kind).domain, split_clips))
        assert counts.keys() == set(DOMAIN_NAMES[kind])
        expected = len(split_clips) / len(DOMAIN_NAMES[kind])
        assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_casts_are_evenly_spaced_and_known():
    assert list(shift("casts").casts().values()) == [15.0 * number for number in range(24)]
    known = shift("corruptions").casts()
    assert list(known) == list(DOMAIN_NAMES["corruptions"])
    assert [known[f"hue-{place}"] for place in range(1, 6)] == [30, 60, 90, 120, 150]
    assert {known[name] for name in known if not name.startswith("hue")} == {0.0}
    assert np.isnan(list(shift("categories").casts().values())).all()


# Changed frames


@pytest.fixture(scope="module")
def picture():
    """Return smooth colors with some detail, (2, 80, 108, 3)."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2, 20, 27, 3)).repeat(4, 1).repeat(4, 2)
    return (coarse * 0.8 + generator.integers(0, 50, (2, 80, 108, 3))).astype(np.uint8)


def test_hue_rotation_by_0_or_360_degrees_changes_nothing():
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    assert np.array_equal(rotate_hues(frames, 0), frames)
    assert np.array_equal(rotate_hues(frames, 360), frames)
    assert rotate_hues(frames, 75).dtype == np.uint8


@pytest.mark.parametrize("degrees", [15, 60, 120, 180, 300, 345])
def test_hue_rotation_agrees_with_colorsys(degrees):
    pure = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]]
    special = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [91, 90, 90]]
    others = np.random.default_rng(1).integers(0, 256, (54, 3)).tolist()
    frames = np.array([*pure, *special, *others], np.uint8).reshape(1, 8, 8, 3)
    expected = []
    for colour in frames.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        expected.append(colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value))
    rotated = rotate_hues(frames, degrees).reshape(-1, 3)
    assert np.abs(rotated - 255 * np.array(expected)).max() <= 0.51
    if degrees == 120:
        assert rotated[:3].tolist() == [[0, 255, 0], [0, 0, 255], [255, 0, 0]]


@pytest.mark.parametrize("corruption", SEVERITIES)
def test_changes_grow_with_severity_and_the_clean_domain_has_none(corruption, picture):
    clips = {shift("corruptions").domain(clip): clip for clip in (f"clip{number}" for number in range(400))}
    changes = [
        np.abs(shift("corruptions").apply(clips[name], picture).astype(float) - picture).mean()
        for name in ("clean", *(f"{corruption}-{severity}" for severity in range(1, 6)))
    ]
    assert changes[0] == 0 < changes[1]
    assert changes == sorted(changes)
    assert len(set(changes)) == 6


def test_each_corruption_changes_frames_as_described(picture):
    grey = np.full((1, 40, 60, 3), 128, np.uint8)
    noise = add_noise(grey, 20, "a").astype(float) - 128
    assert abs(noise.std() - 20) < 1
    assert abs(noise.mean()) < 1
    assert np.array_equal(add_noise(grey, 20, "a"), add_noise(grey, 20, "a"))
    assert not np.array_equal(add_noise(grey, 20, "a"), add_noise(grey, 20, "b"))
    assert {add_noise(np.uint8([[[[value] * 3]]]), 500, "x").dtype for value in (0, 255)} == {np.dtype(np.uint8)}
    assert np.array_equal(blur(grey, 6), grey)  # up to the border
    assert blur(picture, 30).std() < picture.std() / 2
    twice = picture.repeat(2, 1).repeat(2, 2)
    half = blur(twice, 15)[:, ::2, ::2].astype(float)
    assert np.abs(half - blur(picture, 15)).mean() < 2  # equally strong at another size
    assert np.array_equal(darken(grey, 0.25), np.full_like(grey, 32))


def test_each_corruption_by_its_formula():
    assert dict(SEVERITIES) == {
        "hue": (30, 60, 90, 120, 150), "blur": (2, 3, 4, 6, 9), "noise": (10, 20, 30, 45, 60),
        "low-light": (0.6, 0.45, 0.3, 0.2, 0.1),
    }  # fmt: skip
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), dtype=np.uint8)
    deviation = 40 * 9 / 268  # specified for a shorter side of 268
    weights = []
    for size in (9, 14):
        rows = np.exp(-0.5 * ((np.arange(size)[:, None] - np.arange(size)) / deviation) ** 2)
        weights.append(rows / rows.sum(1)[:, None])  # the kernel is cut off at the border
    expected = np.einsum("ab,tbcx,dc->tadx", weights[0], frames, weights[1])
    assert np.abs(blur(frames, 40) - expected).max() <= 0.51
    assert np.abs(darken(frames, 0.3) - 0.3 * frames).max() <= 0.51
    number = int.from_bytes(hashlib.sha256(b"some clip").digest()[:8], "big")
    noise = np.random.default_rng(number).standard_normal(frames.shape, dtype=np.float32)
    noisy = add_noise(frames, 60, "some clip")
    assert np.abs(noisy - np.clip(frames + 60 * noise, 0, 255)).max() <= 0.51
    assert {noisy.min(), noisy.max()} == {0, 255}


def test_each_domain_has_its_effect_in_the_frames_digest():
    corruptions, effects = shift("corruptions", *DEFAULT_HELD_OUT["corruptions"]), {}
    for number in range(400):
        clip = f"clip{number}"
        effects[corruptions.domain(clip)] = corruptions.describe_effect(clip).replace(clip, "NAME")
        assert corruptions.is_unseen(clip) == (corruptions.domain(clip) in DEFAULT_HELD_OUT["corruptions"])
    assert (effects["clean"], effects["hue-1"], effects["blur-5"]) == ("", " hue 30", " blur 9")
    assert (effects["noise-2"], effects["low-light-4"]) == (" noise 20 NAME", " low-light 0.2")
    cameras = {shift("casts").domain(clip): shift("casts").describe_effect(clip) for clip in map(str, range(400))}
    assert (cameras["camera00"], cameras["camera01"], cameras["camera23"]) == ("", " hue 15", " hue 345")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["camera01", "camera99", "red"], "names 'camera99', 'red', not in the domains of casts: camera00, camera01,"),
        ([], "names none of the domains of casts: some must be left"),
        (list(DOMAIN_NAMES["casts"]), "names all of the domains of casts.*null takes camera02, camera07"),
    ],
)
def test_held_out_domains_must_be_some_of_the_existing_ones(names, message):
    with pytest.raises(ConfigError, match=message):
        choose_held_out("casts", names)
    assert choose_held_out("casts", ["camera03", "camera01"]) == ["camera01", "camera03"]  # in the domains' order


@pytest.mark.parametrize("kind", ["casts", "corruptions"])
def test_frames_are_changed_when_they_are_read(kind, folders):
    plain, data = set_up(folders), set_up(folders, **KINDS[kind])
    differing = 0
    for split in SPLITS:
        plain_places = {sample.clip: place for place, sample in enumerate(plain.dataset(split, augment=False).samples)}
        dataset = data.dataset(split, augment=False)
        for place, sample in enumerate(dataset.samples):
            stored = data.cache.read(sample.clip, choose_middle_candidates(3))
            expected = crop(data.shift.apply(sample.clip, stored), 64)
            assert np.array_equal(dataset.frames(0, place), expected)
            assert np.array_equal(data.example(split, place).frames, expected)
            before = plain.dataset(split, augment=False).frames(0, plain_places[sample.clip]).numpy()
            effect = data.shift.describe_effect(sample.clip)
            assert np.array_equal(before, expected) == (not effect), (sample.clip, effect)
            differing += bool(effect)
    assert differing > 20
    augmented = data.dataset("train", augment=True)
    index, clip = next((i, s.clip) for i, s in enumerate(augmented.samples) if data.shift.describe_effect(s.clip))
    assert np.array_equal(augmented.frames(3, index), augmented.frames(3, index))
    assert not np.array_equal(
        augmented.frames(3, index), plain.dataset("train", augment=True).frames(3, index)
    ), clip  # fmt: skip
    unpickled = pickle.loads(pickle.dumps(augmented))  # as loader processes receive it
    assert np.array_equal(augmented.frames(3, index), unpickled.frames(3, index))
    loaded = list(set_up(folders, **KINDS[kind], num_workers=1).test_dataloader())
    expected = list(data.test_dataloader())
    assert all(torch.equal(actual.frames, wanted.frames) for actual, wanted in zip(loaded, expected, strict=True))


def test_all_domains_share_cached_frames_but_not_frame_digests(folders):
    plain = set_up(folders)

    def read_file_times():
        return {path.name: path.stat().st_mtime_ns for path in plain.cache.folder.iterdir()}

    before = read_file_times()
    modules = {None: plain} | {kind: set_up(folders, **arguments) for kind, arguments in KINDS.items()}
    assert read_file_times() == before
    assert len({data.cache.folder for data in modules.values()}) == 1
    digests = {kind: data.fingerprint("test", frames=True) for kind, data in modules.items()}
    assert digests["categories"] == digests[None]  # unchanged frames of the same clips
    assert len(set(digests.values())) == 3
    assert len({data.fingerprint("test", frames=False) for data in modules.values()}) == 1
    for split in ("train", "val"):
        assert len({data.fingerprint(split, frames=False) for data in modules.values()}) == 4
    other = set_up(folders, domains="casts", held_out=["camera20"])
    assert other.fingerprint("train", frames=False) != modules["casts"].fingerprint("train", frames=False)
    assert other.fingerprint("test", frames=True) == digests["casts"]
    anchors = {kind: data.sessions().fingerprint for kind, data in modules.items() if kind}
    assert other.sessions().fingerprint == anchors["casts"]
    assert len(set(anchors.values())) == 3  # although the clips are the same


# Held-out clips


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_devices_are_questions_that_left_training(kind, folders):
    """Only questions of unseen domains whose answers are in the vocabulary; multiple choice and retrieval have none."""
    data, plain = set_up(folders, **KINDS[kind]), set_up(folders)
    assert isinstance(data, LabelsDevices)
    questions, origins = data.device_labels()
    names = [sample.clip for sample in plain.dataset("train", augment=False).samples]
    left = [clip for clip in names if data.shift.domain(clip) in data.held_out]
    words = data.answers()
    assert [words[label] for label in questions.labels.tolist()] == [origin.answer for origin in origins]
    assert origins
    assert {origin.clip for origin in origins} <= set(left)
    assert not {origin.clip for origin in origins} & {sample.clip for sample in data.samples("test")}
    assert {(origin.device, origin.group) for origin in origins} <= {(name, "unseen") for name in data.held_out}
    assert not any(isinstance(set_up(folders, task), LabelsDevices) for task in TASKS if task != "qa")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_unseen_domains_leave_training_and_validation_and_stay_in_the_test(kind, task, folders):
    data, plain = set_up(folders, task, **KINDS[kind]), set_up(folders, task)
    for split in SPLITS:
        before = plain.dataset(split, augment=False).samples
        after = data.dataset(split, augment=False).samples
        if split == "test":
            assert after == before
        else:
            kept = {sample.clip for sample in before if data.shift.domain(sample.clip) not in data.held_out}
            assert {sample.clip for sample in after} == kept < {sample.clip for sample in before}
            if task != "choice":  # where the wrong candidates differ
                assert after == [sample for sample in before if sample.clip in kept]
        for origin in data.origins(split):
            assert origin.device == data.shift.domain(origin.clip)
            assert origin.group == ("unseen" if origin.device in data.held_out else "seen")
    assert {origin.group for origin in data.origins("train") + data.origins("val")} == {"seen"}
    assert {origin.group for origin in data.origins("test")} == {"seen", "unseen"}
    assert {origin.group for origin in plain.origins("test")} == {""}


def test_categories_come_from_the_dataset(folders):
    data = set_up(folders, domains="categories")
    assert data.held_out == ["gaming", "movie/comedy", "science/technology", "cooking"]
    assert data.read_categories() == {
        f"video{number}": CATEGORIES[number % 4] for clips in CLIPS.values() for number in clips
    }
    assert numbers_of(data.dataset("train", False).samples) == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]
    assert numbers_of(data.dataset("val", False).samples) == [6513, 6515, 6516, 6517, 6519, 6520, 6521, 6523, 6524]
    assert {o.clip for o in data.origins("test") if o.group == "unseen"} == {"video7010", "video7014", "video7018"}


def test_wrong_candidates_are_of_seen_domains(folders):
    for sample in build(folders, "choice", domains="categories", held_out=["music"]).samples("train"):
        wrong = [int(text.split()[-1]) for place, text in enumerate(sample.options) if place != sample.right]
        assert not any(number % 4 == 0 for number in wrong)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_holds_the_training_clips_of_its_domain_and_no_other(kind, task, folders):
    data = set_up(folders, task, **KINDS[kind])
    sessions = data.sessions()
    clips = [sample.clip for sample in sessions.anchors.samples]
    assert len(clips) == len(set(clips)) == 16
    names = DOMAIN_NAMES[kind]
    assert len(sessions.pools) == len(sessions.casts) == len(names)
    training = {f"video{number}" for number in CLIPS["train"]}
    for name, pool in zip(names, sessions.pools, strict=True):
        assert {clips[anchor] for anchor in pool} == {clip for clip in training if data.shift.domain(clip) == name}
    assert any(pool for name, pool in zip(names, sessions.pools, strict=True) if name in data.held_out)
    assert not all(sessions.pools)
    for split in SPLITS:
        for origin, device, own_anchor in zip(
            data.origins(split), sessions.devices[split], sessions.own_anchors[split], strict=True
        ):
            assert names[device] == origin.device
            assert own_anchor == (clips.index(origin.clip) if split == "train" else -1)
    batch = sessions.anchors.__getitems__([(0, 0), (0, 1)])
    neutral = [2, *[4] * 8, 3]  # [CLS], eight [MASK], [SEP]
    assert batch.text_ids.tolist() == [neutral] * 2 if task == "qa" else [[neutral]] * 2
    for place, clip in enumerate(clips):
        expected = crop(data.shift.apply(clip, data.cache.read(clip, choose_middle_candidates(3))), 64)
        assert np.array_equal(sessions.anchors.frames(0, place), expected)


def test_held_out_domains_are_counted_and_reported(folders, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    data = set_up(folders, domains="categories")
    summary = data.summary()
    assert [summary[split]["held_out"] for split in SPLITS] == [16, 12, 0]
    assert [summary[split]["held_out_clips"] for split in SPLITS] == [4, 3, 0]
    assert [summary[split]["questions"] for split in SPLITS] == [48, 36, 40]
    assert {row["left_out"] for row in summary.values()} == {0}
    unseen = "of unseen domains (categories gaming, movie/comedy, science/technology, cooking)"
    note = f"without 16 questions about 4 clips {unseen}"
    assert data.notes == {"train": note, "val": f"without 12 questions about 3 clips {unseen}"}
    assert f"split train: {note}" in caplog.text
    report = build(folders, domains="categories").check()
    assert report["notes"] == data.notes
    assert [row["held_out"] for row in report["splits"].values()] == [
        {"questions": 16, "clips": 4}, {"questions": 12, "clips": 3}, {"questions": 0, "clips": 0}
    ]  # fmt: skip
    assert [row["questions"] for row in report["splits"].values()] == [64, 48, 40]  # as annotated, like the published
    assert "held_out" not in build(folders).check()["splits"]["train"]
    assert "held_out" not in set_up(folders).summary()["train"]
    retrieval = set_up(folders, "retrieval", domains="categories")
    note = note.replace("16 questions", "24 captions")
    assert retrieval.notes["train"] == f"protocol full, by MSRVTT_train.full.csv; {note}"


def test_absent_clips_are_left_out_and_not_held_out(folders, tmp_path):
    root = tmp_path / "qa"
    shutil.copytree(folders["qa"], root)
    for number in (1, 2):  # one of a seen and one of an unseen domain
        (root / "videos" / f"video{number}.mp4").unlink()
    data = set_up({"qa": root}, domains="categories", only_present=True)
    assert data.summary()["train"] | {"ceiling": 0, "unknown_answers": 0} == {
        "questions": 44, "clips": 11, "left_out": 4, "held_out": 16, "held_out_clips": 4, "ceiling": 0,
        "unknown_answers": 0,
    }  # fmt: skip
    assert len(data.sessions().anchors) == 14


def test_domains_do_not_change_the_answer_vocabulary(folders):
    plain, data = set_up(folders), set_up(folders, **CASTS)
    assert data.answers() == plain.answers()


def test_validation_clips_chosen_by_a_hash_are_in_no_pool(tmp_path):
    root = write_tgif(tmp_path / "tgif")
    data = build_small(TGIFFrameQA, root, num_classes=5, domains="casts", held_out=["camera00"])
    data.prepare_data()
    data.setup("fit")
    assert data.notes["val"].startswith("a tenth of the training GIFs, held out by a hash of their name; without")
    pools = {sample.clip for sample in data.sessions().anchors.samples}
    assert pools == {sample.clip for sample in data.samples("train")}
    assert not pools & {sample.clip for sample in data.samples("val")}


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains": "cameras"}, "domains is 'cameras', but MSRVTTQA supports casts or corruptions or categories"),
        ({"held_out": ["camera00"]}, "held_out names domains, but data.init_args.domains is not set"),
        ({"domains": "casts", "held_out": []}, "none of the domains of casts: some must be left"),
        ({"domains": "casts", "held_out": list(DOMAIN_NAMES["casts"])}, "all of the domains of casts"),
        ({"domains": "casts", "held_out": ["camera24"]}, r"'camera24', not in the domains of casts: camera00, .*23$"),
        ({"domains": "categories", "held_out": ["dance"]}, "'dance', not in .* categories: music, .*, advertisement"),
        ({"domains": "corruptions", "held_out": ["hue-6"]}, "'hue-6', not in .*: clean, hue-1, .*, low-light-5"),
    ],
)
def test_impossible_domains_are_refused(arguments, message, folders):
    with pytest.raises(ConfigError, match=message):
        build(folders, **arguments)


def test_datasets_refuse_domains_that_they_do_not_support(msvd, synthetic, tmp_path):
    with pytest.raises(ConfigError, match="'categories', but MSVDQA supports casts or corruptions"):
        build_small(MSVDQA, msvd, num_classes=5, domains="categories")
    with pytest.raises(ConfigError, match="'casts', but Synthetic knows its devices"):
        build_small(Synthetic, synthetic, num_classes=17, domains="casts")
    with pytest.raises(
        ConfigError, match=r"sessions need devices: define domains, ARGS=--data\.init_args\.domains=casts"
    ):
        build_small(MSVDQA, msvd, num_classes=5).sessions()


def test_categories_need_a_file_with_a_category_per_clip(folders, tmp_path, monkeypatch):
    root = tmp_path / "qa"
    shutil.copytree(folders["qa"], root)
    path = root / "MSRVTT_data.json"
    content = path.read_text()
    data = {"qa": root}

    def check(message):
        with pytest.raises(DataError, match=message):
            set_up(data, domains="categories")
        problems = build(data, domains="categories").check()["problems"]
        assert problems
        assert all(not problem.startswith("Traceback") for problem in problems)

    path.write_text(content.replace('"video_id": "video3", "split"', '"video_id": "video33", "split"'))
    check(r"split train: 1 of 16 clips have no category:\n  video3\nfix the file, or use ARGS=.*casts")
    path.write_text(content.replace('"category": 3, "video_id": "video3"', '"category": 20, "video_id": "video3"'))
    check(r"category is not from 0 to 19:\n  video3: 20\nfetch")
    path.unlink()
    check(r"no file has the categories of clips, .*MSRVTT_data\.json .*Or use ARGS=--data\.init_args\.domains=casts")
    write_captions(root, "annotations")
    check(r"no file has the categories of clips, .*MSRVTT_data\.json")
    (root / "MSR_VTT.json").unlink()
    monkeypatch.setattr(communities, "CLIPS", CLIPS)
    write_captions(root, "microsoft")
    assert set_up(data, domains="categories").summary()["train"]["held_out_clips"] == 4


def test_holding_out_a_complete_split_is_refused(folders):
    names = [f"camera{number:02}" for number in (7, 8, 10, 12, 16, 18, 19, 20, 22)]  # of all validation clips
    data = build(folders, domains="casts", held_out=names)
    with pytest.raises(
        DataError, match=r"every clip of split val .* camera22\): hold out other domains, ARGS=.*held_out="
    ):
        data.prepare_data()
    with pytest.raises(DataError, match="0 of the 0 captioned clips of split val"):
        build(folders, "choice", domains="casts", held_out=names).samples("val")


# From the command line


def fit_command(folders, task, method, out, *more):
    root, dataset = folders[task], {"qa": "msrvtt"}.get(task, f"msrvtt_{task}")
    return [
        "fit", f"--config=experiments/methods/{method}.yaml", f"--config=experiments/datasets/{dataset}.yaml",
        f"--trainer.default_root_dir={out / dataset / method / 'seed0'}", f"--data.init_args.root={root}",
        f"--data.init_args.cache_dir={out / 'data'}", f"--data.init_args.vocab={root / 'vocab.txt'}",
        "--data.init_args.image_size=32", "--data.init_args.batch_size=4", "--data.init_args.num_workers=0",
        *(["--data.init_args.num_classes=5"] if task == "qa" else []), "--model.init_args.encoder.depth=1",
        "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", *more,
    ]  # fmt: skip


def test_a_session_method_without_domains_is_refused_with_the_remedy(folders, tmp_path, capsys):
    assert main(fit_command(folders, "qa", "cdc_mmpg_session", tmp_path)) == 2
    remedy = "(ARGS=--data.init_args.domains=casts or corruptions or categories), or use another method"
    assert remedy in capsys.readouterr().err
    domains = ["--data.init_args.domains=casts", "--data.init_args.held_out=[camera04,camera44]"]
    assert main(fit_command(folders, "qa", "cdc_mmpg_session", tmp_path, *domains)) == 2
    assert "'camera44', not in the domains" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "code"), [("categories", 3), ("casts", 0)])
def test_the_oracle_is_refused_when_hue_casts_are_unknown(kind, code, folders, tmp_path, capsys):
    domains = [f"--data.init_args.domains={kind}"]
    assert main(fit_command(folders, "qa", "session_oracle", tmp_path, *domains)) == code
    refusal = "the hue casts of these devices are unknown (domains: categories), and this method needs them"
    assert (refusal in capsys.readouterr().err) == bool(code)
    assert (tmp_path / "msrvtt" / "session_oracle" / "seed0" / "results.json").exists() == (not code)
    assert (tmp_path / "data" / "features").exists() == (not code)  # refused before anything slow


def test_training_on_domains_reports_seen_and_unseen(folders, tmp_path, capsys):
    domains = ["--data.init_args.domains=casts", "--data.init_args.held_out=[camera04,camera12,camera20]"]
    for method in ("linear", "cdc_mmpg_session"):
        axes = ["--model.init_args.axes=1"] if method == "cdc_mmpg_session" else []  # only two devices have two clips
        assert main(fit_command(folders, "qa", method, tmp_path, *domains, *axes)) == 0
        results = json.loads((tmp_path / "msrvtt" / method / "seed0" / "results.json").read_text())
        cells = next(iter(results["accuracy"].values()))
        assert cells["unseen"]["all"]["questions"] == 12
        assert cells["seen"]["all"]["questions"] == 28
        assert results["domains"] == {"kind": "casts", "held_out": ["camera04", "camera12", "camera20"]}
        assert results["questions"] == {"train": 48, "val": 32, "test": 40}
        assert results["data"]["train"]["held_out"] == 16
    features = tmp_path / "data" / "features"
    assert {path.name.split(".")[0] for path in features.iterdir()} == {"train", "val", "test", "anchors"}
    assert tables.main([str(tmp_path / "msrvtt")]) == 0
    table = (tmp_path / "msrvtt" / "table.md").read_text()
    assert "unseen %" in table
    assert "paper %" not in table
    assert "without 16 questions about 4 clips of unseen domains (casts camera04, camera12, camera20)" in table
    assert "partial copy" not in table
    before = len(list(features.iterdir()))
    assert (
        main(fit_command(folders, "qa", "linear", tmp_path, "--data.init_args.domains=casts")) == 2
    )  # another run's folder
    assert main(fit_command(folders, "qa", "hyper", tmp_path)) == 0
    assert len(list(features.iterdir())) == before + 3  # for unchanged frames
    capsys.readouterr()
    assert tables.main([str(tmp_path / "msrvtt")]) == 2
    refusal = capsys.readouterr().err
    assert "different splits" in refusal
    assert "on protocol official, casts without camera04, camera12, camera20;" in refusal


@pytest.mark.parametrize("domains", [[], ["--data.init_args.domains=categories"]])
def test_published_figures_are_shown_only_for_the_published_splits(domains, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(MSRVTTRetrieval, "PUBLISHED", {})  # the small files pass for the published ones
    assert main(fit_command(folders, "retrieval", "linear", tmp_path, *domains)) == 0
    assert tables.main([str(tmp_path / "msrvtt_retrieval")]) == 0
    table = (tmp_path / "msrvtt_retrieval" / "table.md").read_text()
    assert ("7.7 † / 14.1 †" in table) == (not domains)


def test_make_data_reports_held_out_clips(folders, tmp_path, capsys):
    arguments = fit_command(folders, "qa", "linear", tmp_path, "--data.init_args.domains=categories")[1:]
    assert prepare.main([str(tmp_path), *(a for a in arguments if not a.startswith("--trainer.default"))]) == 0
    assert "train: without 16 questions about 4 clips of unseen domains (categories gaming" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cdc_mmpg_session", "session_concatenated"])
@pytest.mark.parametrize("task", ["choice", "retrieval"])
def test_sessions_train_on_the_other_tasks_too(folders, tmp_path, task, method):
    arguments = ["--data.init_args.domains=casts", "--model.init_args.axes=null"]
    assert main(fit_command(folders, task, method, tmp_path, *arguments)) == 0
    results = json.loads((tmp_path / f"msrvtt_{task}" / method / "seed0" / "results.json").read_text())
    assert {"n16", "n0", "shuffled_n16"} <= results["accuracy"].keys()
    assert {"seen", "unseen"} <= results["accuracy"]["n16"].keys()
