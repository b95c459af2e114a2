"""Accuracies with their intervals, and the table that is made of results.json files."""

import json
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg import tables
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.metrics import accuracies, majorities


def of_devices(generator, devices=12, clips=5, questions=3):
    """Names of clips and devices, groups and types of questions about them."""
    names = [(f"clip{d}.{c}", f"device{d}") for d in range(devices) for c in range(clips) for _ in range(questions)]
    groups = ["seen" if int(device[6:]) % 3 else "unseen" for _, device in names]
    types = generator.choice(["color", "count"], len(names)).tolist()
    return [clip for clip, _ in names], [device for _, device in names], groups, types


def test_values_and_counts_are_those_by_hand():
    correct = {"own": [1, 0, 1, 1, 0], "shuffled": np.array([False, False, True, False, False])}
    table = accuracies(
        correct,
        clips=["a", "a", "b", "c", "c"],
        devices=["p", "p", "p", "q", "q"],
        groups=["seen", "seen", "seen", "unseen", "unseen"],
        types=["color", "size", "color", "color", "size"],
    )
    assert list(table) == ["own", "shuffled"]
    assert list(table["own"]) == ["test", "seen", "unseen"]
    assert list(table["own"]["test"]) == ["all", "color", "size"]

    def figures(condition, group):
        return {kind: (cell["value"], cell["questions"]) for kind, cell in table[condition][group].items()}

    assert figures("own", "test") == {"all": (3 / 5, 5), "color": (1.0, 3), "size": (0.0, 2)}
    assert figures("own", "seen") == {"all": (2 / 3, 3), "color": (1.0, 2), "size": (0.0, 1)}
    assert figures("own", "unseen") == {"all": (1 / 2, 2), "color": (1.0, 1), "size": (0.0, 1)}
    assert figures("shuffled", "test") == {"all": (1 / 5, 5), "color": (1 / 3, 3), "size": (0.0, 2)}
    # One device with the clips a (1 of 2) and b (1 of 1): its draws are {a, a}, {a, b}, {b, b}.
    seen = table["own"]["seen"]["all"]
    assert (seen["low"], seen["high"]) == (0.5, 1.0)
    # One device with one clip: always the same.
    unseen = table["own"]["unseen"]["all"]
    assert (unseen["low"], unseen["high"]) == (0.5, 0.5)
    json.dumps(table, allow_nan=False)


def test_without_devices_and_types_there_is_one_cell():
    table = accuracies({"own": [1.0, 0.0, 1.0]}, ["a", "b", "c"], ["a", "b", "c"], [""] * 3, [""] * 3)
    assert list(table["own"]) == ["test"]
    assert list(table["own"]["test"]) == ["all"]
    assert {name: type(value) for name, value in table["own"]["test"]["all"].items()} == {
        "value": float, "standard_error": float, "low": float, "high": float, "questions": int,
    }  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        accuracies({"own": [1.0]}, ["a"], ["a"], [], [""])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_the_interval_of_a_constant_is_the_constant(value):
    clips, devices, groups, types = of_devices(np.random.default_rng(0))
    for kinds in accuracies({"own": np.full(len(clips), value)}, clips, devices, groups, types)["own"].values():
        for cell in kinds.values():
            assert (cell["value"], cell["low"], cell["high"]) == pytest.approx((value,) * 3, abs=1e-12)


def test_the_interval_is_wider_than_a_naive_one_where_the_clips_of_a_device_agree():
    clips, devices, _, _ = of_devices(np.random.default_rng(0), devices=30)
    none = [""] * len(clips)
    correct = {"own": [int(device[6:]) % 2 for device in devices]}
    each = [str(number) for number in range(len(clips))]
    clustered = accuracies(correct, clips, devices, none, none)["own"]["test"]["all"]
    naive = accuracies(correct, each, each, none, none)["own"]["test"]["all"]
    assert clustered["value"] == naive["value"] == 0.5
    ratio = (clustered["high"] - clustered["low"]) / (naive["high"] - naive["low"])
    assert ratio == pytest.approx(15**0.5, rel=0.15)  # 15 questions of a device are as good as one


def test_the_draws_depend_on_the_seed_and_on_no_order():
    generator = np.random.default_rng(0)
    names = of_devices(generator)
    correct = generator.random(len(names[0])) < 0.6
    first = accuracies({"own": correct}, *names)
    assert accuracies({"own": correct}, *names) == first
    assert accuracies({"own": correct}, *names, seed=1) != first
    order = generator.permutation(len(correct))
    shuffled = accuracies({"own": correct[order]}, *([column[i] for i in order] for column in names))
    for group, kinds in first["own"].items():
        for kind, cell in kinds.items():
            assert shuffled["own"][group][kind] == pytest.approx(cell)


def test_conditions_share_their_draws():
    generator = np.random.default_rng(0)
    names = of_devices(generator)
    correct = generator.random(len(names[0])) < 0.6
    alone = accuracies({"own": correct}, *names)["own"]
    table = accuracies({"own": correct, "other": ~correct, "same": correct}, *names)
    assert table["own"] == table["same"] == alone
    mirrored = table["other"]["test"]["all"]
    assert mirrored["low"] == pytest.approx(1 - alone["test"]["all"]["high"])


def by_loops(correct, clips, devices, groups, draws, seed):
    """The same bootstrap, a draw at a time, a device at a time, a clip at a time."""
    generator = np.random.default_rng(seed)
    tree = {}
    for value, clip, device, group in zip(correct, clips, devices, groups, strict=True):
        tree.setdefault(group, {}).setdefault(device, {}).setdefault(clip, []).append(value)
    means = {group: [] for group in [*tree, "test"]}
    for _ in range(draws):
        everything = []
        for group, members in tree.items():
            drawn = []
            for device in generator.choice(list(members), len(members)):
                own = members[device]
                for clip in generator.choice(list(own), len(own)):
                    drawn += own[clip]
            means[group].append(np.mean(drawn))
            everything += drawn
        means["test"].append(np.mean(everything))
    return {group: np.percentile(values, (2.5, 97.5)) for group, values in means.items()}


@pytest.mark.parametrize("clips_of_a_device", [1, 4])
def test_it_agrees_with_a_bootstrap_by_loops(clips_of_a_device):
    generator = np.random.default_rng(0)
    clips, devices, groups, types = of_devices(generator, devices=21, clips=clips_of_a_device)
    rates = dict(zip(dict.fromkeys(devices), generator.random(21), strict=True))
    correct = np.array([generator.random() < rates[device] for device in devices])
    table = accuracies({"own": correct}, clips, devices, groups, types, draws=4000)["own"]
    for group, interval in by_loops(correct, clips, devices, groups, draws=4000, seed=1).items():
        cell = table[group]["all"]
        assert (cell["low"], cell["high"]) == pytest.approx(interval, abs=0.025)
        assert interval[1] - interval[0] > 0.1


@pytest.mark.parametrize(("devices", "clips", "questions", "conditions"), [(144, 7, 3, 8), (500, 1, 26, 1)])
def test_it_is_quick_and_small(devices, clips, questions, conditions):
    generator = np.random.default_rng(0)
    names = of_devices(generator, devices, clips, questions)
    correct = {str(number): generator.random(len(names[0])) < 0.5 for number in range(conditions)}
    began = time.process_time()
    accuracies(correct, *names)
    assert time.process_time() - began < 4
    tracemalloc.start()
    accuracies(correct, *names, draws=200)  # a chunk is as large with more
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_a_cell_leaves_out_the_draws_without_its_questions():
    clips = [f"clip{number}" for number in range(6)]
    table = accuracies({"own": [1, 0, 0, 0, 0, 0]}, clips, clips, [""] * 6, ["rare", *["often"] * 5])
    rare = table["own"]["test"]["rare"]
    assert (rare["value"], rare["low"], rare["high"], rare["questions"]) == (1.0, 1.0, 1.0, 1)


def test_the_majority_answers():
    answers = ["red", "red", "blue", "blue", "two", "one", "two", "two"]
    types = ["color"] * 4 + ["count"] * 4
    assert majorities(answers, types, ["color", "count", "side"]) == {
        "majority": ["two"] * 3,
        "majority_per_type": ["blue", "two", "two"],  # blue before red, the side's as of all
    }
    assert majorities(["b", "a"], ["", ""], [""]) == {"majority": ["a"], "majority_per_type": ["a"]}


# The table

TYPES = ("color", "shape", "size", "side", "count")
CONDITIONS = {
    "cdc_mmpg": ("own", "shuffled", "bypassed"),
    "cdc_mmpg_session": ("n16", "n8", "n4", "n1", "n0", "shuffled_n8", "shuffled_n16"),
}


def cell(value):
    return {"value": value, "low": value - 0.024, "high": value + 0.023, "questions": 1440}


def by_group(value, devices):
    """Accuracies where those on unseen devices are `value`, and by type a point lower each."""
    if not devices:
        return {"test": {"all": cell(value)}}
    kinds = {kind: cell(value - 0.01 * number) for number, kind in enumerate(("all", *TYPES))}
    return {"test": {"all": cell(value + 0.05)}, "seen": {"all": cell(value + 0.1)}, "unseen": kinds}


def write_run(
    root: Path, method: str, seed: int = 0, value: float = 0.5, devices: bool = True, **changes: object
) -> Path:
    """A finished run of a dataset with or without devices; condition number i is 10 i points worse."""
    conditions = CONDITIONS.get(method, ("own",))
    accuracy = {name: by_group(value - 0.1 * number, devices) for number, name in enumerate(conditions)}
    results = {
        "dataset": root.name,
        "method": method,
        "seed": seed,
        "monitor": "val/accuracy",
        "protocol": "official",
        "splits": {},
        "metrics": {"val/accuracy": value + 0.01, "test/accuracy": accuracy[conditions[0]]["test"]["all"]["value"]},
        "best_epoch": 11 + seed,
        "epochs": 40,
        "questions": {"train": 2304, "val": 720, "test": 3168},
        "data": {"test": {"ceiling": 1.0 if devices else 0.908}},
        "encoder": None,
        "parameters": {"device": 11_546_921, "cloud": 19_369_097, "trained": 7},
        "bytes": {"up": 768, "down": 388_388},
        "seconds": {"train": 34.25, "test": 1.5},
        "commit": "0123456789" * 4,
        "accuracy": accuracy,
        "floors": {"majority": by_group(0.1, devices), "majority_per_type": by_group(0.2, devices)},
        **changes,
    }
    folder = root / method / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_runs_on_different_splits_are_not_set_side_by_side(tmp_path):
    root = tmp_path / "msrvtt_retrieval"
    write_run(root, "linear", protocol="full")
    write_run(root, "linear", seed=1, protocol="9k")
    with pytest.raises(ConfigError, match="linear on protocol full; linear on protocol 9k"):
        tables.rows(root)


@pytest.fixture
def synthetic(tmp_path):
    """One seed of every method on a dataset with devices."""
    root = tmp_path / "synthetic"
    for number, method in enumerate(tables.NAMES):
        write_run(root, method, value=0.7 + 0.01 * number)
    return root


def by_label(folder):
    """The rows as dictionaries."""
    header = tables.columns(folder)
    return {row[0]: dict(zip(header, row, strict=True)) for row in tables.rows(folder)}


def test_the_methods_that_answer():
    assert list(tables.NAMES) == [
        "linear", "fine_tuning", "hyper", "hyper_fan_in", "cdc_mmpg", "cdc_mmpg_frozen", "cdc_mmpg_session",
        "cdc_mmpg_session_full", "session_concatenated", "session_oracle",
    ]  # fmt: skip
    assert tables.NAMES["cdc_mmpg"] == "CDC-MMPG"
    assert tables.NAMES["cdc_mmpg_session"] == "Session, n = 16"


def test_rows_and_columns_of_a_dataset_with_devices(synthetic):
    assert tables.columns(synthetic) == [
        "method", "unseen %", "seen %", *TYPES, "val %", "D-Param", "C-Param", "bytes up", "bytes down", "best/epochs",
        "train s", "seeds",
    ]  # fmt: skip
    table = by_label(synthetic)
    assert list(table) == [
        "Majority answer",
        "Majority answer per question type",
        "F-linear",
        "Fine-tuning",
        "F-hyper",
        "F-hyper, hyperfan-in",
        "CDC-MMPG",
        "· another sample's anchor",
        "· ADR bypassed",
        "CDC-MMPG, frozen",
        "Session, n = 1",
        "Session, n = 4",
        "Session, n = 8",
        "Session, n = 16",
        "· no anchors: the static head",
        "· another device's 8 anchors",
        "· another device's 16 anchors",
        "Session, full layer",
        "Concatenated, n = 16",
        "Oracle: the true cast",
    ]
    assert list(table["F-linear"].values()) == [
        "F-linear", "70.0 [67.6, 72.3]", "80.0 [77.6, 82.3]", "69.0", "68.0", "67.0", "66.0", "65.0", "71.0",
        "11,546,921", "19,369,097", "768", "388,388", "12/40", "34.2", "1",
    ]  # fmt: skip
    majority = list(table["Majority answer per question type"].values())
    assert majority[1:3] == ["20.0 [17.6, 22.3]", "30.0 [27.6, 32.3]"]
    assert majority[3:8] == ["19.0", "18.0", "17.0", "16.0", "15.0"]
    assert not any(majority[8:])


def test_rows_of_conditions(synthetic):
    table = by_label(synthetic)
    costs = ("val %", "D-Param", "C-Param", "bytes up", "bytes down", "train s")
    own = table["Session, n = 16"]
    for label, unseen in (("n = 16", "76.0"), ("n = 8", "66.0"), ("n = 4", "56.0"), ("n = 1", "46.0")):
        row = table[f"Session, {label}"]
        assert row["unseen %"].split()[0] == unseen
        for name in costs[1:5]:
            assert row[name] == own[name] != ""
        assert (row["val %"], row["train s"]) == (("77.0", "34.2") if row is own else ("", ""))
    for label, unseen, traffic in (
        ("· another sample's anchor", "64.0", ""),
        ("· ADR bypassed", "54.0", ""),
        ("· no anchors: the static head", "36.0", "0"),
        ("· another device's 8 anchors", "26.0", ""),
        ("· another device's 16 anchors", "16.0", ""),
    ):
        row = table[label]
        assert row["unseen %"].split()[0] == unseen
        assert row["color"] == f"{float(unseen) - 1:.1f}"
        assert [row[name] for name in costs] == ["", "", "", traffic, traffic, ""]


def test_a_row_is_there_where_its_run_and_its_condition_are(tmp_path):
    root = tmp_path / "synthetic"
    write_run(root, "linear")
    folder = write_run(root, "cdc_mmpg_session")
    results = json.loads((folder / "results.json").read_text())
    for name in ("n4", "n0"):
        del results["accuracy"][name]
    (folder / "results.json").write_text(json.dumps(results))
    (root / "hyper" / "seed0").mkdir(parents=True)  # not finished
    write_run(root, "adr_pretraining", accuracy={})  # answers nothing
    assert [label for label in by_label(root) if "Majority" not in label] == [
        "F-linear", "Session, n = 1", "Session, n = 8", "Session, n = 16", "· another device's 8 anchors",
        "· another device's 16 anchors",
    ]  # fmt: skip


def test_a_dataset_without_devices_stands_beside_the_paper(tmp_path):
    root = tmp_path / "msvd"
    for method in ("linear", "cdc_mmpg", "cdc_mmpg_frozen"):
        write_run(root, method, devices=False, value=0.35)
    assert tables.columns(root)[:5] == ["method", "test %", "paper %", "val %", "D-Param"]
    table = by_label(root)
    assert (table["CDC-MMPG"]["test %"], table["CDC-MMPG"]["paper %"]) == ("35.0 [32.6, 37.3]", "35.4")
    assert table["F-linear"]["paper %"] == "17.3"
    for label in ("· ADR bypassed", "CDC-MMPG, frozen", "Majority answer"):
        assert table[label]["paper %"] == ""
    assert "no method can exceed 90.8 % (answers outside the vocabulary)" in tables.caption(root)
    assert "95 % interval, clips resampled." in tables.caption(root)
    types = {"test": {"all": cell(0.3), "what": cell(0.2), "who": cell(0.4)}}
    write_run(root, "linear", devices=False, accuracy={"own": types})
    assert tables.columns(root)[:6] == ["method", "test %", "paper %", "what", "who", "val %"]
    assert by_label(root)["F-linear"]["who"] == "40.0"
    assert by_label(root)["CDC-MMPG"]["who"] == ""


def test_several_seeds_give_mean_and_deviation(tmp_path):
    root = tmp_path / "synthetic"
    for seed, value in enumerate((0.2, 0.4)):
        write_run(root, "linear", seed, value)
        write_run(root, "cdc_mmpg_session", seed, value + 0.3)
    row = by_label(root)["F-linear"]
    assert (row["unseen %"], row["seen %"], row["val %"]) == ("30.0 ± 14.1", "40.0 ± 14.1", "31.0 ± 14.1")
    assert (row["color"], row["best/epochs"], row["seeds"]) == ("29.0", "12–13/40", "2")
    assert by_label(root)["Majority answer"]["unseen %"] == "10.0 [7.6, 12.3]"
    assert by_label(root)["Session, n = 8"]["unseen %"] == "50.0 ± 14.1"
    assert "±: standard deviation over seeds." in tables.caption(root)
    assert "In brackets" in tables.caption(root)  # of the floors


def test_the_caption(synthetic):
    caption = tables.caption(synthetic)
    assert caption.startswith("synthetic: 3168 test questions, 2304 for training. In brackets: ")
    assert "95 % interval, devices and then their clips resampled. " in caption
    assert "By question type (color, shape, size, side, count): % on unseen devices. " in caption
    assert "Encoder from: random weights. Best epoch by validation accuracy, tested once. " in caption
    assert caption.endswith("Commit 01234567.")
    assert "±" not in caption
    assert "Machine" not in caption
    write_run(synthetic, "linear", machine="8 cores, 16 GB")
    assert "Machine: 8 cores, 16 GB. " in tables.caption(synthetic)


def test_the_caption_says_on_what_the_encoder_was_pretrained(synthetic, monkeypatch):
    encoder = synthetic / "encoder_pretraining" / "seed0" / "encoder.safetensors"
    for method in tables.NAMES:
        write_run(synthetic, method, encoder=str(encoder))
    assert "Encoder from: encoder_pretraining/seed0/encoder.safetensors. Best" in tables.caption(synthetic)
    labels = {"clips": 5760, "captions": 5760, "questions": 17280}
    encoder.parent.mkdir(parents=True)
    content = {"labels": labels, "seconds": {"train": 94.6, "test": 0.0}}
    (encoder.parent / "results.json").write_text(json.dumps(content))
    sentence = "Encoder pretrained in this run on 5,760 captions and 17,280 questions of 5,760 other clips (95 s)."
    assert sentence in tables.caption(synthetic)
    monkeypatch.chdir(synthetic.parent)
    for method in tables.NAMES:
        write_run(synthetic, method, encoder="synthetic/encoder_pretraining/seed0/encoder.safetensors")
    assert sentence in tables.caption(Path("synthetic"))
    assert sentence in tables.caption(synthetic)
    monkeypatch.chdir(synthetic)
    for method in tables.NAMES:
        write_run(synthetic, method)  # without a checkpoint
    assert tables.caption(Path()).startswith("synthetic: ")
    assert "Encoder from: random weights. Best" in tables.caption(Path())
    for method in tables.NAMES:
        write_run(synthetic, method, encoder="../other/encoder_pretraining/seed0/encoder.safetensors")
    assert "Encoder from: ../other/encoder_pretraining/seed0/encoder.safetensors. Best" in tables.caption(synthetic)


def test_it_is_printed_and_written(synthetic, capsys):
    assert tables.main([str(synthetic)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 200
    assert not any("…" in line for line in printed)
    for row in tables.rows(synthetic):
        assert any(all(part in line for part in row) for line in printed), row
    assert printed[-1] == f"written: {synthetic / 'table.md'}"
    text = (synthetic / "table.md").read_text()
    assert text == tables.markdown(synthetic)
    table, caption = text.rstrip().split("\n\n")
    assert caption == tables.caption(synthetic)
    lines = [re.fullmatch(r"\| (.*) \|", line)[1].split(" | ") for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(tables.columns(synthetic))}
    assert lines[1] == ["---", *["---:"] * (len(lines[0]) - 1)]
    assert lines[2:] == tables.rows(synthetic)


def test_three_seeds_fit_two_hundred_columns(synthetic, capsys):
    for method in tables.NAMES:
        for seed in range(3):
            write_run(synthetic, method, seed, 0.7 + 0.1 * seed, seconds={"train": 12345.6})
    assert tables.main([str(synthetic)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 200


def test_a_folder_without_runs_says_what_to_do(tmp_path, capsys):
    assert tables.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "make train" in error
    assert not (tmp_path / "table.md").exists()


def test_a_run_of_an_earlier_version_is_refused_by_name(synthetic, capsys):
    folder = write_run(synthetic, "hyper", seed=1)
    results = json.loads((folder / "results.json").read_text())
    del results["accuracy"]
    (folder / "results.json").write_text(json.dumps(results))
    assert tables.main([str(synthetic)]) == 2
    error = capsys.readouterr().err
    assert f'{folder / "results.json"} has no "accuracy"' in error
    assert f"delete {folder} and train anew" in error


def test_a_table_that_cannot_be_written_is_an_error_with_a_code(synthetic, capsys):
    (synthetic / "table.md").mkdir()
    assert tables.main([str(synthetic)]) == 1
    assert "table.md: cannot be written" in capsys.readouterr().err


def test_finished_runs_are_those_with_results(synthetic):
    assert len(tables.finished_runs(synthetic)) == len(tables.NAMES)
    (run,) = tables.finished_runs(synthetic, "linear")
    assert run["method"] == "linear"
    (synthetic / "linear" / "seed0" / "results.json").write_text("{")
    assert tables.finished_runs(synthetic, "linear") == []
