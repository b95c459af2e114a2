"""Figures of the README: reproducible PNGs, and errors that name what is missing."""

import json
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest

from cdc_mmpg.errors import DataError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.report.canvas import spread_apart
from cdc_mmpg.report.dataset_figure import choose_devices
from cdc_mmpg.report.figures import main
from cdc_mmpg.report.plots import make_point

CASTS = {"unseen000": 170.0, "unseen001": 5.0, "unseen002": -95.0, "unseen003": 80.0, "unseen004": 20.0}


def write_synthetic(root: Path) -> Path:
    """Write five unseen devices, each with six history clips and two test clips of uniform gray."""
    (root / "YouTubeClips").mkdir(parents=True)
    devices, questions, names = {}, [], []
    for hue, (device, cast) in enumerate(CASTS.items()):
        for number in range(8):
            names.append(f"{device}_{number:02}")
            devices[names[-1]] = {"device": device, "role": "history" if number < 6 else "test", "cast": cast}
            if number >= 6:
                for kind in ("shape", "color")[: number - 5]:
                    row = {"answer": f"{device} {kind}", "id": len(questions), "question": f"what {kind} is it?"}
                    questions.append({**row, "type": kind, "video_id": len(names) - 1})
            write_video(root / "YouTubeClips" / f"{names[-1]}.mp4", 40 * hue)
    devices["seen000_00"] = {"device": "seen000", "role": "train", "cast": 0.0}
    (root / "devices.json").write_text(json.dumps(devices))
    (root / "test_unseen_qa.json").write_text(json.dumps(questions))
    (root / "youtube_mapping.txt").write_text("".join(f"{name} vid{i}\n" for i, name in enumerate(names)))
    return root


def write_video(path: Path, level: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv444p")))
        container.mux(stream.encode(None))


def write_run(folder: Path, values: dict[str, float], seed: int = 0, types: tuple[str, ...] = ("all", "color")) -> Path:
    accuracies = {
        name: {"unseen": {kind: {"value": value, "low": value - 0.02, "high": value + 0.03, "questions": 1440}
                          for kind in types}}
        for name, value in values.items()
    }  # fmt: skip
    path = folder / f"seed{seed}" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"dataset": "synthetic", "accuracy": accuracies}))
    return folder.parent


SESSION_ACCURACIES = {"n16": 0.87, "n0": 0.64, "n1": 0.74, "n4": 0.83, "n8": 0.86, "shuffled_n16": 0.6}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "data")


def test_figures_are_small_reproducible_pngs(synthetic, tmp_path, capsys, monkeypatch):
    import matplotlib
    from PIL import Image

    write_run(tmp_path / "cdc_mmpg_session", SESSION_ACCURACIES)
    for name in ("fine_tuning", "cdc_mmpg", "session_concatenated", "session_oracle"):
        write_run(tmp_path / name, {"main": 0.66, "other": 0.1})
    assert main([str(tmp_path), "--data", str(synthetic)]) == 0
    paths = [tmp_path / "figures" / name for name in ("method.png", "data.png", "anchors.png")]
    assert [line.removeprefix("written: ") for line in capsys.readouterr().out.splitlines()] == [str(p) for p in paths]
    first = [path.read_bytes() for path in paths]
    for content in first:
        picture = Image.open(BytesIO(content))
        assert picture.format == "PNG"
        assert not picture.info  # no date, no version
        assert 900 <= picture.width <= 1100
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert len(content) < 120_000
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)  # as in a user's matplotlibrc
    assert main([str(tmp_path), "--data", str(synthetic)]) == 0
    assert [path.read_bytes() for path in paths] == first


def test_chosen_devices_are_spread_over_hues_and_asked_about_color(synthetic):
    rows = choose_devices(synthetic)
    assert [row.device for row in rows] == ["unseen001", "unseen003", "unseen000", "unseen002"]
    assert [row.answer for row in rows] == [f"{row.device} color" for row in rows]
    assert {row.test[-3:] for row in rows} == {"_07"}
    assert all(row.history == [f"{row.device}_{number:02}" for number in range(6)] for row in rows)


def test_the_dataset_figure_is_skipped_without_a_dataset(tmp_path, capsys):
    write_run(tmp_path / "cdc_mmpg_session", SESSION_ACCURACIES, types=("all",))
    assert main([str(tmp_path), "--data", str(tmp_path)]) == 0
    assert f"skipped: data.png, because {tmp_path} has no devices.json" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["anchors.png", "method.png"]


def test_missing_session_runs_are_an_error_with_the_remedy(tmp_path, capsys):
    write_run(tmp_path / "fine_tuning", {"main": 0.66})
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "skipped: data.png, which needs --data" in printed.out
    assert f"ConfigError: {tmp_path / 'cdc_mmpg_session'}: no finished run" in printed.err
    assert "make train" in printed.err
    assert main([str(tmp_path / "absent")]) == 2
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_unseen_qa.json", None, "test_unseen_qa.json: cannot be read"),
        ("test_unseen_qa.json", "[{]", "make the dataset again"),
        ("test_unseen_qa.json", "[]", "none of 5 unseen devices"),
        ("devices.json", '{"a": {"device": "unseen000"}}', "KeyError: 'cast'"),
        ("youtube_mapping.txt", "a b c\n", "line 1: 'a b c' is not"),
    ],
)
def test_a_damaged_dataset_is_named(name, content, message, synthetic, tmp_path):
    for path in synthetic.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        choose_devices(tmp_path)
    assert message in str(caught.value)


def test_one_seed_shows_its_interval_and_several_their_deviation(tmp_path):
    def compute_bounds(case):
        accuracy = Evidence(tmp_path).cite_accuracy(Side("cdc_mmpg_session", case))
        return make_point(0, accuracy, "")[1:2] + make_point(0, accuracy, "")[3:] if accuracy else None

    write_run(tmp_path / "cdc_mmpg_session", {"n16": 0.8})
    assert compute_bounds(None) == pytest.approx((80, 78, 83))
    write_run(tmp_path / "cdc_mmpg_session", {"n16": 0.9}, seed=1)
    deviation = 50**0.5
    assert compute_bounds("n16") == pytest.approx((85, 85 - deviation, 85 + deviation))
    assert compute_bounds("n4") is None
    write_run(tmp_path / "linear", {}, types=())
    assert not Evidence(tmp_path).cite_accuracy(Side("linear"))


def test_labels_keep_apart_and_stay_near():
    assert spread_apart([1, 10, 20], 5, 0, 100) == [1, 10, 20]
    assert spread_apart([10, 11, 30], 5, 0, 100) == pytest.approx([8, 13, 30])
    assert spread_apart([98, 99, 100], 5, 0, 100) == pytest.approx([90, 95, 100])
    assert spread_apart([], 5, 0, 100) == []
