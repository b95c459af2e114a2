"""Privacy probes of uploads: they find planted facts and nothing in noise; the command stores their results."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cdc_mmpg.controls import privacy
from cdc_mmpg.controls.privacy import (
    Target,
    area_under_curve,
    bootstrap_interval,
    draw_uploads,
    fit_probe,
    ignore_uploads,
    probe_all,
    score_outputs,
)
from cdc_mmpg.data.interface import Content
from cdc_mmpg.methods.cdc_mmpg_session import Session
from cdc_mmpg.models.reading import Reading
from cdc_mmpg.training.cli import main as train
from conftest import TINY
from data_modules.synthetic import Synthetic
from data_modules.synthetic_clips import make_annotations, plan_clips

pytestmark = pytest.mark.slow

SHAPES, COLORS = ("bar", "disk"), ("blue", "green", "red")


def draw_world(planted: bool, seed: int = 0) -> tuple[np.ndarray, list[list[int]], list[float], list[Content]]:
    """Return anchors, pools, casts, contents of 24 devices with 24 clips (16 seen); `planted` anchors encode facts."""
    generator = np.random.default_rng(seed)
    anchors, pools, casts, contents = [], [], [], []
    for device in range(24):
        casts.append(float(generator.uniform(-180, 180)))
        pools.append(list(range(24 * device, 24 * device + 24)))
        device_signature = generator.normal(size=40) * 0.3
        for _ in range(24):
            number = int(generator.integers(1, 3))
            shapes = tuple(SHAPES[i] for i in generator.permutation(2)[:number])
            colors = tuple(COLORS[i] for i in generator.integers(3, size=number))
            background = float(generator.uniform(0, 360))
            contents.append(Content(device < 16, shapes, colors, colors, background))
            anchor = generator.normal(size=192) * (0.1 if planted else 1.0)
            if planted:
                angles = np.deg2rad([casts[-1], background])
                anchor[:4] += [*np.cos(angles), *np.sin(angles)]
                anchor[4:6] += [number == 1, number == 2]
                anchor[6:8] += [shape in shapes for shape in SHAPES]
                anchor[8:11] += [color in colors for color in COLORS]
                anchor[20:60] += device_signature
            anchors.append(anchor)
    return np.array(anchors), pools, casts, contents


def index_by_name(probes: list[dict[str, object]]) -> dict[tuple[str, int], dict[str, float]]:
    return {(probe["what"], probe["clips"]): probe for probe in probes}  # type: ignore[misc]


@pytest.fixture(scope="module")
def planted() -> dict[tuple[str, int], dict[str, float]]:
    return index_by_name(probe_all(*draw_world(True), seed=0))


@pytest.fixture(scope="module")
def noise() -> dict[tuple[str, int], dict[str, float]]:
    return index_by_name(probe_all(*draw_world(False), seed=0))


@pytest.mark.slow
def test_probes_find_what_was_planted(planted):
    for fact in ("device", "count", "shape", "true color", "look"):
        assert planted[fact, 1]["accuracy"] > 0.9, fact
        assert planted[fact, 1]["low"] > planted[fact, 1]["majority"]
    assert planted["device", 16]["accuracy"] > 0.9
    assert planted["cast", 1]["degrees"] < 20
    assert planted["background", 1]["degrees"] < 20
    for fact in ("shape present", "look present"):
        curve = [planted[fact, number]["area_under_curve"] for number in privacy.UPLOAD_SIZES]
        assert curve[0] > 0.95
        assert curve == sorted(curve, reverse=True)  # more clips reveal less about each


@pytest.mark.slow
def test_probes_find_nothing_in_noise(noise):
    for (fact, number), probe in noise.items():
        if "degrees" in probe:
            assert abs(probe["degrees"] - 90) < 30, (fact, number)
        elif "present" in fact:
            assert abs(probe["area_under_curve"] - 0.5) < 0.12, (fact, number)
            assert probe["accuracy"] < probe["majority"] + 0.05
        else:
            assert probe["low"] < max(probe["majority"], probe["chance"]) + 0.03, (fact, number)


def test_every_figure_records_its_sample_sizes(planted):
    identity = planted["device", 1]
    assert (identity["from"], identity["chance"], identity["devices"]) == ("one clip", 1 / 16, 16)
    assert (identity["learned_from"], identity["number"]) == (16 * 8, 16 * 16)
    assert planted["device", 16]["number"] == 16  # one upload of each of the sixteen devices
    assert planted["device", 16]["from"] == "mean of 16"
    for number in privacy.UPLOAD_SIZES:
        content = planted["shape present", number]
        assert (content["number"], content["devices"]) == (8 * 24, 8)
        assert content["low"] <= content["accuracy"] <= content["high"]
    assert planted["count", 1]["chance"] == 0.5
    assert ("count", 4) not in planted
    json.dumps(list(planted.values()), allow_nan=False)


def test_an_upload_is_the_mean_of_clips_of_one_device():
    anchors = np.eye(12)
    uploads = draw_uploads(anchors, {0: [0, 1, 2, 3, 4, 5], 1: [6, 7, 8, 9], 2: [10]}, 4, 2, 0)
    assert uploads.devices.tolist() == [0] * 12 + [1] * 8  # the third has too few
    for feature, first, device in zip(uploads.features, uploads.first, uploads.devices, strict=True):
        members = np.flatnonzero(feature)
        assert len(members) == 4
        assert first in members
        assert feature[members].tolist() == [0.25] * 4
        assert {int(member) // 6 for member in members} == {device}
    single = draw_uploads(anchors, {0: [0, 1, 2]}, 1, 3, 0, np.arange(12) == 1)
    assert single.first.tolist() == [1]
    assert np.array_equal(single.features, anchors[1:2])


def test_scores_match_hand_computed_values():
    angle = Target("cast", "angle", np.array([]))
    assert score_outputs(angle, np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([350.0, -90.0])) == pytest.approx(
        [10, 180]
    )
    presence = Target("shape present", "presence", np.array([]))
    assert score_outputs(presence, np.array([[1.0, -1.0]]), np.array([[True, True]])).tolist() == [0.5]
    classes = Target("count", "classes", np.array([]), 3)
    assert ignore_uploads(classes, np.array([2, 2, 0]), 2).argmax(1).tolist() == [2, 2]
    assert ignore_uploads(angle, np.array([350.0, 10.0]), 1)[0] == pytest.approx([np.cos(np.deg2rad(10)), 0], abs=1e-9)
    assert area_under_curve(np.array([[3.0], [2.0], [2.0], [1.0]]), np.array([[1], [1], [0], [0]])) == 0.875
    assert bootstrap_interval(np.array([1.0, 1.0, 0.0, 0.0]), np.array([5, 5, 7, 7]), 0) == (0.0, 1.0)


def test_probes_are_linear_and_shrink_with_the_penalty():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 5))
    for target, values in (
        (Target("count", "classes", np.array([]), 2), (features[:, 0] > 0).astype(np.int64)),
        (Target("shape present", "presence", np.array([])), features[:, :2] > 0),
        (Target("cast", "angle", np.array([])), np.rad2deg(np.arctan2(features[:, 0], features[:, 1]))),
    ):
        loose, tight = (fit_probe(target, features, values, penalty) for penalty in (1e-4, 100.0))
        outputs = loose(features[:2])
        assert np.allclose(loose(features[:2].mean(0, keepdims=True))[0], outputs.mean(0), atol=1e-4)
        spread = [float(np.std(probe(features), axis=0).max()) for probe in (loose, tight)]
        assert spread[1] < 0.1 * spread[0], target.name
        assert score_outputs(target, loose(features), values).mean() > (0.9 if target.kind != "angle" else 1), (
            target.name
        )


@pytest.fixture(scope="module")
def run(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small session run with a reading; return its folder."""
    out = tmp_path_factory.mktemp("privacy") / "synthetic"
    folder = out / "cdc_mmpg_session" / "seed3"
    Reading().save(out.parent / "reading.safetensors")
    command = [
        "fit", "--config=experiments/methods/cdc_mmpg_session.yaml", "--config=experiments/datasets/synthetic.yaml",
        f"--model.init_args.reading={out.parent / 'reading.safetensors'}", "--model.init_args.axes=null",
        f"--trainer.default_root_dir={folder}", f"--data.init_args.root={synthetic}", "--seed_everything=3",
        f"--data.init_args.cache_dir={out / 'data'}", f"--data.init_args.vocab={synthetic / 'vocab.txt'}",
        "--data.init_args.batch_size=16", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert train(command) == 0
    return folder


def test_the_command_writes_results_once_unless_the_run_changed(run, capsys):
    folder = run.parents[1] / "privacy" / "seed3"
    assert privacy.main([str(run)]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert (results["dataset"], results["method"], results["seed"]) == ("synthetic", "privacy", 3)
    assert (results["floats"], results["clips"]) == (192, 8 * 6)
    assert {"made_of", "commit", "versions", "finished", "seconds", "machine"} <= results.keys()
    probes = index_by_name(results["probes"])
    assert {"device", "cast", "count", "background", "shape present"} <= {fact for fact, _ in probes}
    assert {number for _, number in probes} == {1, 4}  # no device has eight clips here
    assert {path.name for path in folder.glob(".*")} <= {".lock"}
    capsys.readouterr()
    assert privacy.main([str(run)]) == 0
    assert "finished on" in capsys.readouterr().out
    content = torch.load(run / "best.ckpt", weights_only=False)
    content["state_dict"]["encoder.pooler.dense.bias"] += 1
    torch.save(content, run / "best.ckpt")
    assert privacy.main([str(run)]) == 0
    assert "written" in capsys.readouterr().out


def test_probes_read_exactly_what_a_device_uploads(run, monkeypatch):
    uploaded, probed = [], []
    upload = Session.upload
    monkeypatch.setattr(
        Session, "upload", lambda self, features: uploaded.append(upload(self, features)) or uploaded[-1]
    )
    monkeypatch.setattr(privacy, "probe_all", lambda anchors, *others: probed.append(anchors) or [])
    monkeypatch.setattr(privacy, "is_done", lambda *_: False)
    assert privacy.main([str(run)]) == 0
    assert np.array_equal(probed[0], uploaded[-1].double().numpy())
    assert ((probed[0] >= 0) & (probed[0] <= 1)).all()  # probabilities of the reading, not a feature


def test_runs_that_cannot_be_probed_are_refused(run, fit, tmp_path, capsys):
    assert privacy.main([str(tmp_path)]) == 4
    assert "not a finished run" in capsys.readouterr().err
    assert train(fit("adr_pretraining")) == 0
    assert privacy.main([str(tmp_path / "msvd" / "adr_pretraining" / "seed0")]) == 2
    assert "answers no questions" in capsys.readouterr().err
    assert train(fit("fine_tuning")) == 0
    assert privacy.main([str(tmp_path / "msvd" / "fine_tuning" / "seed0")]) == 2
    assert "does not know what its clips show" in capsys.readouterr().err
    damaged = tmp_path / "damaged" / "cdc_mmpg_session" / "seed3"
    shutil.copytree(run, damaged)
    (damaged / "best.ckpt").write_bytes(b"cut short")
    assert privacy.main([str(damaged)]) == 4


def test_contents_are_what_the_annotations_say(synthetic, tmp_path):
    data = Synthetic(str(synthetic), str(tmp_path), 17, image_size=64, resize=64, num_workers=0,
                     vocab=str(synthetic / "vocab.txt"))  # fmt: skip
    data.prepare_data()
    data.setup("test")
    contents = data.contents()
    assert [sample.clip for sample in data.sessions().anchors.samples] == list(contents)
    clips = {row: clip.name for row, clip in enumerate(plan_clips(TINY))}
    rows = json.loads(make_annotations(0, plan_clips(TINY), TINY.questions)["train_qa.json"])
    for row in rows:
        content = contents[clips[row["video_id"]]]
        assert content.seen
        if row["type"] == "color":
            shape = row["question"].removeprefix("what color is the ").rstrip("?")
            assert content.colors[content.shapes.index(shape)] == row["answer"]
        if row["type"] == "count":
            assert len(content.shapes) == {"one": 1, "two": 2}[row["answer"]]
    assert any(content.colors != content.seen_colors for content in contents.values())
    (tmp_path / "copy").mkdir()
    data.root = tmp_path / "copy"
    (data.root / "digests.json").write_text("[]")
    with pytest.raises(ValueError, match="the seed of the clips is missing"):
        data.contents()
