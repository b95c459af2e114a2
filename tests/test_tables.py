"""Accuracies with their intervals, and the tables and sentences that are made of runs."""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cdc_mmpg import catalogue
from cdc_mmpg.catalogue import WORLDS
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import accuracies, majorities
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT
from cdc_mmpg.evidence.findings import find_equal_payloads, list_claims, list_findings
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.selection import load_comparable
from cdc_mmpg.report import tables, worlds
from cdc_mmpg.report.caption import write_caption
from cdc_mmpg.report.cells import FOOTNOTE_SIGNS
from cdc_mmpg.report.method_table import build_method_table
from cdc_mmpg.report.missing import find_missing
from cdc_mmpg.report.paper_tables import build_delay_table, build_frames_table, build_paper_table
from cdc_mmpg.report.study_tables import (
    build_payload_table,
    build_privacy_table,
    build_reasoner_table,
    build_spread_table,
    build_variants_table,
)


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
def test_intervals_agree_with_a_bootstrap_by_loops(clips_of_a_device):
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
def test_intervals_take_little_memory(devices, clips, questions, conditions):
    generator = np.random.default_rng(0)
    names = of_devices(generator, devices, clips, questions)
    correct = {str(number): generator.random(len(names[0])) < 0.5 for number in range(conditions)}
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
        rows_of(root)


@pytest.fixture
def synthetic(tmp_path):
    """One seed of every method on a dataset with devices."""
    root = tmp_path / "synthetic"
    for number, method in enumerate(catalogue.NAMES):
        write_run(root, method, value=0.7 + 0.01 * number)
    return root


def columns_of(folder):
    """Return the header of the table of methods."""
    return build_method_table(load_comparable(folder)).header


def rows_of(folder):
    """Return the rows of the table of methods, as texts."""
    return build_method_table(load_comparable(folder)).texts()


def caption_of(folder):
    """Return the caption of the table of methods."""
    return write_caption(load_comparable(folder))


def by_label(folder):
    """The rows as dictionaries."""
    header = columns_of(folder)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows_of(folder)}


def test_the_methods_that_answer():
    assert list(catalogue.NAMES) == [
        "linear", "linear_virtual", "static_mlp", "fine_tuning", "fine_tuning_virtual", "hyper", "hyper_fan_in",
        "cdc_mmpg", "cdc_mmpg_virtual", "cdc_mmpg_frozen", "cdc_mmpg_session", "cdc_mmpg_session_basis",
        "cdc_mmpg_session_full", "cdc_mmpg_session_film", "cdc_mmpg_session_bias", "cdc_mmpg_session_collected",
        "cdc_mmpg_session_jitters",
        "cdc_mmpg_session_feature", "cdc_mmpg_session_plain", "session_concatenated", "mean_anchor",
        "mean_anchor_virtual", "in_context", "in_context_virtual", "corrected_grey_world", "corrected_hue_mode",
        "corrected_true_cast", "session_oracle", "on_device", "prompts",
    ]  # fmt: skip
    assert catalogue.NAMES["cdc_mmpg"] == "CDC-MMPG"
    assert catalogue.NAMES["cdc_mmpg_session"] == "Session, n = 16"


def test_rows_and_columns_of_a_dataset_with_devices(synthetic):
    assert columns_of(synthetic) == [
        "method", "unseen %", "seen %", "vs fine-tuning", *TYPES, "knows", "val %", "D-Param", "C-Param", "up, B",
        "down, B", "epoch", "train s", "seeds",
    ]  # fmt: skip
    table = by_label(synthetic)
    assert list(table) == [
        "Majority answer",
        "Majority answer per type",
        "F-linear",
        "F-linear, virtual devices",
        "Static MLP",
        "Fine-tuning",
        "Fine-tuning, virtual devices",
        "F-hyper",
        "F-hyper, hyperfan-in",
        "CDC-MMPG",
        "· another sample's anchor",
        "· ADR bypassed",
        "CDC-MMPG, virtual devices",
        "CDC-MMPG, frozen",
        "Session, n = 1",
        "Session, n = 4",
        "Session, n = 8",
        "Session, n = 16",
        "· no anchors: the static head",
        "· another device's 8 anchors",
        "· another device's 16 anchors",
        "Session, basis",
        "Session, full layer",
        "Session, FiLM",
        "Session, bias alone",
        "Session, no virtual devices",
        "Session, jittered devices",
        "Session, mean feature",
        "Session, plain mean",
        "Concatenated, n = 16",
        "Mean anchor off",
        "Mean anchor off, virtual",
        "In context, n = 16",
        "In context, virtual devices",
        "By hand: grey world",
        "By hand: hue histogram",
        "By hand: true cast, a ceiling",
        "Oracle: the true cast",
        "On the device: before",
        "On the device: FOA's prompts",
    ]
    assert list(table["F-linear"].values()) == [
        "F-linear", "70.0 [67.6, 72.3]", "80.0 [77.6, 82.3]", "", "69.0", "68.0", "67.0", "66.0", "65.0", "",
        "71.0", "11,546,921", "19,369,097", "768", "388,388", "12/40", "34.2", "1",
    ]  # fmt: skip
    majority = list(table["Majority answer per type"].values())
    assert majority[1:3] == ["20.0 [17.6, 22.3]", "30.0 [27.6, 32.3]"]
    assert majority[4:9] == ["19.0", "18.0", "17.0", "16.0", "15.0"]
    assert not any(majority[9:])


def test_rows_of_conditions(synthetic):
    table = by_label(synthetic)
    costs = ("val %", "D-Param", "C-Param", "up, B", "down, B", "train s")
    own = table["Session, n = 16"]
    for label, unseen in (("n = 16", "80.0"), ("n = 8", "70.0"), ("n = 4", "60.0"), ("n = 1", "50.0")):
        row = table[f"Session, {label}"]
        assert row["unseen %"].split()[0] == unseen
        for name in costs[1:5]:
            assert row[name] == own[name] != ""
        assert (row["val %"], row["train s"]) == (("81.0", "34.2") if row is own else ("", ""))
    for label, unseen, traffic in (
        ("· another sample's anchor", "67.0", ""),
        ("· ADR bypassed", "57.0", ""),
        ("· no anchors: the static head", "40.0", "0"),
        ("· another device's 8 anchors", "30.0", ""),
        ("· another device's 16 anchors", "20.0", ""),
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
    assert columns_of(root)[:5] == ["method", "test %", "paper %", "vs fine-tuning", "val %"]
    table = by_label(root)
    assert (table["CDC-MMPG"]["test %"], table["CDC-MMPG"]["paper %"]) == ("35.0 [32.6, 37.3]", "35.4")
    assert table["F-linear"]["paper %"] == "17.3"
    for label in ("· ADR bypassed", "CDC-MMPG, frozen", "Majority answer"):
        assert table[label]["paper %"] == ""
    assert "no method can exceed 90.8 % (answers outside the vocabulary)" in caption_of(root)
    assert "95 % interval, clips resampled." in caption_of(root)
    types = {"test": {"all": cell(0.3), "what": cell(0.2), "who": cell(0.4)}}
    write_run(root, "linear", devices=False, accuracy={"own": types})
    assert columns_of(root)[:6] == ["method", "test %", "paper %", "vs fine-tuning", "what", "who"]
    assert by_label(root)["F-linear"]["who"] == "40.0"
    assert by_label(root)["CDC-MMPG"]["who"] == ""


def test_several_seeds_give_mean_and_deviation(tmp_path):
    root = tmp_path / "synthetic"
    for seed, value in enumerate((0.2, 0.4)):
        write_run(root, "linear", seed, value)
        write_run(root, "cdc_mmpg_session", seed, value + 0.3)
    row = by_label(root)["F-linear"]
    assert (row["unseen %"], row["seen %"], row["val %"]) == ("30.0 ± 14.1", "40.0 ± 14.1", "31.0 ± 14.1")
    assert (row["color"], row["epoch"], row["seeds"]) == ("29.0", "12–13/40", "2")
    assert by_label(root)["Majority answer"]["unseen %"] == "10.0 [7.6, 12.3]"
    assert by_label(root)["Session, n = 8"]["unseen %"] == "50.0 ± 14.1"
    pairs = (
        "±: standard deviation over pairs of world and pretraining; an interval of several pairs resamples the pairs"
    )
    assert pairs in caption_of(root)
    assert "In brackets" in caption_of(root)  # of the floors


def test_the_caption(synthetic):
    caption = caption_of(synthetic)
    assert caption.startswith("synthetic: 3168 test questions, 2304 for training. In brackets: ")
    assert "95 % interval, devices and then their clips resampled. " in caption
    assert "By question type (color, shape, size, side, count): % on unseen devices. " in caption
    assert "Encoder from: random weights. Best epoch by validation accuracy, tested once. " in caption
    assert caption.endswith("Commit 01234567.")
    assert "±" not in caption
    assert "Machine" not in caption
    write_run(synthetic, "linear", machine="8 cores, 16 GB")
    assert "Machine: 8 cores, 16 GB. " in caption_of(synthetic)
    for step, said in ((32, False), (8, True)):
        write_run(synthetic, "linear", questions_per_step=step, recipe_questions_per_step=32)
        assert ("Questions of a step: 8, where the recipe has 32. " in caption_of(synthetic)) == said


def test_the_caption_says_on_what_the_encoder_was_pretrained(synthetic, monkeypatch):
    encoder = synthetic / "encoder_pretraining" / "seed0" / "encoder.safetensors"
    for method in catalogue.NAMES:
        write_run(synthetic, method, encoder=str(encoder))
    assert "Encoder from: encoder_pretraining/seed0/encoder.safetensors. Best" in caption_of(synthetic)
    labels = {"clips": 5760, "captions": 5760, "questions": 17280}
    encoder.parent.mkdir(parents=True)
    content = {"labels": labels, "seconds": {"train": 94.6, "test": 0.0}}
    (encoder.parent / "results.json").write_text(json.dumps(content))
    sentence = "Encoder pretrained in this run on 5,760 captions and 17,280 questions of 5,760 other clips (95 s)."
    assert sentence in caption_of(synthetic)
    monkeypatch.chdir(synthetic.parent)
    for method in catalogue.NAMES:
        write_run(synthetic, method, encoder="synthetic/encoder_pretraining/seed0/encoder.safetensors")
    assert sentence in caption_of(Path("synthetic"))
    assert sentence in caption_of(synthetic)
    monkeypatch.chdir(synthetic)
    for method in catalogue.NAMES:
        write_run(synthetic, method)  # without a checkpoint
    assert caption_of(Path()).startswith("synthetic: ")
    assert "Encoder from: random weights. Best" in caption_of(Path())
    for method in catalogue.NAMES:
        write_run(synthetic, method, encoder="../other/encoder_pretraining/seed0/encoder.safetensors")
    assert "Encoder from: ../other/encoder_pretraining/seed0/encoder.safetensors. Best" in caption_of(synthetic)


def test_the_table_is_printed_and_written(synthetic, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "210")
    assert tables.main([str(synthetic)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 210
    assert not any("…" in line for line in printed)
    for row in rows_of(synthetic):
        assert any(all(part in line for part in row) for line in printed), row
    assert printed[-1] == f"written: {synthetic / 'table.md'}"
    text = (synthetic / "table.md").read_text()
    assert text == tables.render_method_page(load_comparable(synthetic))
    table, caption, said = text.rstrip().split("\n\n")
    assert caption == caption_of(synthetic)
    assert said in "\n".join(printed)
    lines = [re.fullmatch(r"\| (.*) \|", line)[1].split(" | ") for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(columns_of(synthetic))}
    assert lines[1] == ["---", *["---:"] * (len(lines[0]) - 1)]
    assert lines[2:] == rows_of(synthetic)


def test_worlds_stand_side_by_side(tmp_path, capsys):
    assert worlds.main([str(tmp_path)]) == 0
    assert "no finished run of the embedded dataset" in capsys.readouterr().out
    for number, dataset in enumerate(WORLDS):
        for place, side in enumerate(worlds.SIDES):
            if side.name != "on_device" and (dataset, side.name) != ("synthetic_memory", "cdc_mmpg"):
                write_run(tmp_path / dataset, side.name, value=0.5 + 0.1 * number + 0.01 * place)
    assert worlds.main([str(tmp_path)]) == 0
    assert f"written: {tmp_path / 'worlds.md'}" in capsys.readouterr().out
    header, _, *rows = (tmp_path / "worlds.md").read_text().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell.strip() for cell in header.strip("|").split("|")][:5] == [
        "method", "knows", "down, B", "sky: unseen %", "memory: unseen %",
    ]  # fmt: skip
    by_label = {row[0]: row[1:] for row in cells}
    assert len(by_label) <= 9
    assert by_label["Session, n = 16"][:4] == ["vcd", "388,388", "56.0 [53.6, 58.3]", "66.0 [63.6, 68.3]"]
    assert by_label["By hand: grey world"][0] == "s"
    assert by_label["CDC-MMPG"][3] == ""  # where it has no run
    text = (tmp_path / "worlds.md").read_text()
    assert "Knows: s the kind of shift; v the kind of shift, in training alone (virtual devices); c captions" in text
    assert "One world of each kind and one pretraining" in text
    write_run(tmp_path / "synthetic", "fine_tuning", seed=1)
    assert worlds.main([str(tmp_path)]) == 0
    assert "over 2 pairs of world and pretraining" in (tmp_path / "worlds.md").read_text()


def test_three_seeds_fit_two_hundred_and_ten_columns(synthetic, capsys):
    for method in catalogue.NAMES:
        for seed in range(3):
            write_run(synthetic, method, seed, 0.7 + 0.1 * seed, seconds={"train": 12345.6})
    assert tables.main([str(synthetic)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 210


@pytest.mark.parametrize("width", [80, 120, 210])
def test_a_narrow_terminal_shows_blocks_of_columns(width, synthetic, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for seed in range(3):
        write_run(synthetic, "cdc_mmpg_session", seed, 0.7 + 0.1 * seed)
    assert tables.main([str(synthetic)]) == 0
    printed = capsys.readouterr().out.splitlines()[:-1]
    heads = [line.split() for line in printed if line.startswith(" method ")]
    assert (len(heads) == 1) == (width == 210)
    if width < 210:
        assert max(len(line) for line in printed if not line.startswith("- ")) <= width
    header, *rows = columns_of(synthetic), *rows_of(synthetic)
    assert " ".join(header[1:]).split() == [name for head in heads for name in head[1:]]
    for label, *cells in rows:
        lines = [line.removeprefix(f" {label}") for line in printed if line.startswith(f" {label}  ")]
        assert " ".join(cells).split() == " ".join(lines).split()


def test_a_folder_without_runs_says_what_to_do(tmp_path, capsys):
    assert tables.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "make train" in error
    assert not (tmp_path / "table.md").exists()


def test_a_run_of_an_earlier_version_is_left_out_by_name(synthetic, capsys, caplog):
    folder = write_run(synthetic, "hyper", seed=1)
    results = json.loads((folder / "results.json").read_text())
    del results["accuracy"]
    (folder / "results.json").write_text(json.dumps(results))
    assert tables.main([str(synthetic)]) == 0
    assert f'{folder / "results.json"} has no "accuracy"' in caplog.text
    assert f"delete {folder} and train anew" in caplog.text
    assert by_label(synthetic)["F-hyper"]["seeds"] == "1"


def test_a_table_that_cannot_be_written_is_an_error_with_a_code(synthetic, capsys):
    (synthetic / "table.md").mkdir()
    assert tables.main([str(synthetic)]) == 1
    assert "table.md: cannot be written" in capsys.readouterr().err


# What needs every answer


def questions(unseen: int = 12, seen: int = 6, clips: int = 4) -> list[tuple[str, ...]]:
    """Two questions a clip: clip, device, group, type, question, answer."""
    return [
        (f"{group}{d:03}_{c:02}", f"{group}{d:03}", group, kind, f"what {kind}?", "red" if kind == "color" else "two")
        for group, devices in (("seen", seen), ("unseen", unseen))
        for d in range(devices)
        for c in range(clips)
        for kind in ("color", "count")
    ]


def drawn(share: float, name: str, number: int) -> list[bool]:
    """Whether each question is answered rightly: of each ten in turn, the same share."""
    generator = np.random.default_rng([ord(letter) for letter in name])
    ranks = np.concatenate([generator.permutation(10) for _ in range(0, number, 10)])[:number]
    return (ranks + 0.5 < 10 * share).tolist()


def answered_run(
    root: Path, method: str, seed: int = 0, cases: dict[str, object] | None = None, devices: bool = True,
    asked: list[tuple[str, ...]] | None = None, **changes: object,
) -> Path:  # fmt: skip
    """A finished run with its answers; a case is the share of right ones, or whether each is right, None: not asked."""
    asked = asked or questions()
    if not devices:
        asked = [(clip, clip, "", "", question, answer) for clip, _, _, _, question, answer in asked]
    right = {
        case: drawn(given, f"{method} {seed} {case}", len(asked)) if isinstance(given, float) else list(given)
        for case, given in (cases or {"own": 0.5}).items()
    }
    accuracy = {}
    for case, each in right.items():
        rows = [number for number, value in enumerate(each) if value is not None]
        names = [[asked[number][place] for number in rows] for place in range(4)]
        accuracy |= accuracies({case: [each[number] for number in rows]}, *names, draws=200)
    folder = write_run(root, method, seed, devices=devices, accuracy=accuracy, **changes)
    words = {True: lambda answer: answer, False: lambda _: "wrong", None: lambda _: ""}
    with (folder / "predictions.test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "device", "group", "type", "question", "answer", *right, "right"])
        for number, row in enumerate(asked):
            marks = "".join({True: "r", False: "w", None: "."}[each[number]] for each in right.values())
            writer.writerow([*row, *(words[each[number]](row[-1]) for each in right.values()), marks])
    log = folder / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{epoch},{10 * epoch + 9},{0.3 + 0.1 * epoch},\n,{10 * epoch + 9},,0.5\n" for epoch in range(3)]
    log.write_text("epoch,step,val/accuracy,lr\n" + "".join(lines))
    return folder


def ranked_run(root: Path, method: str, ranks: dict[str, dict[str, list[int]]]) -> Path:
    """A run of retrieval with ranks by case and direction: two captions a clip."""
    first = next(iter(ranks.values()))
    rows = [("VR", f"clip{i}", "") for i in range(len(first["VR"]))]
    rows += [("TR", f"clip{i // 2}", f"caption {i % 2}") for i in range(len(first["TR"]))]
    kinds = {f"{way}@{k}": np.mean(np.array(first[way]) <= k) for way in ("VR", "TR") for k in (1, 5, 10)}
    accuracy = {case: {"test": {kind: cell(float(value)) for kind, value in kinds.items()}} for case in ranks}
    folder = write_run(root, method, devices=False, accuracy=accuracy, floors={}, protocol="full", task="retrieval",
                       median_rank={case: {way: float(np.median(of[way])) for way in of}
                                    for case, of in ranks.items()})  # fmt: skip
    with (folder / "predictions.test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["direction", "clip", "caption", *ranks])
        writer.writerows([*row, *(([*of["VR"], *of["TR"]])[i] for of in ranks.values())] for i, row in enumerate(rows))
    return folder


def test_the_difference_to_fine_tuning_is_paired_over_the_seeds_that_both_have(tmp_path):
    root = tmp_path / "synthetic"
    asked = questions()
    right = {
        (method, seed): drawn(share, f"{method}{seed}", len(asked))
        for method, share, seeds in (("fine_tuning", 0.5, 3), ("cdc_mmpg", 0.7, 2))
        for seed in range(seeds)
    }
    for (method, seed), each in right.items():
        answered_run(root, method, seed, {"own": each})
    evidence = Evidence(root)
    gain = evidence.compare(Side("cdc_mmpg"), Side("fine_tuning"))
    assert gain.seeds == (0, 1)
    differences = [
        np.mean([float(right["cdc_mmpg", seed][i]) - right["fine_tuning", seed][i] for seed in range(2)])
        for i in range(len(asked))
    ]
    clips, devices, groups = ([row[place] for row in asked] for place in range(3))
    unseen = np.array(groups) == "unseen"
    assert gain.value.value == pytest.approx(100 * np.array(differences)[unseen].mean())
    low, high = 100 * by_loops(differences, clips, devices, groups, draws=4000, seed=1)["unseen"]
    assert (gain.low.value, gain.high.value) == pytest.approx((low, high), abs=1.5)
    wide = evidence.cite_accuracy(Side("cdc_mmpg")).facts[0]
    assert wide.how == "mean"
    label, cells = build_method_table(evidence).rows[-1]
    assert label == "CDC-MMPG"
    assert cells[2].text == gain.format().text
    assert re.fullmatch(r"\+\d+\.\d \[[+−]?\d+\.\d, \+\d+\.\d\]", cells[2].text)


def test_questions_in_another_order_are_paired_and_other_questions_are_not(tmp_path):
    root = tmp_path / "synthetic"
    answered_run(root, "fine_tuning", cases={"own": 0.5})
    folder = answered_run(root, "linear", cases={"own": 0.7})
    path = folder / "predictions.test.csv"
    before = Evidence(root).compare(Side("linear"), Side("fine_tuning"))
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]))
    after = Evidence(root).compare(Side("linear"), Side("fine_tuning"))
    assert after.value.value == pytest.approx(before.value.value)
    path.write_text("\n".join([header, *rows]).replace("what color?", "which color?"))
    assert Evidence(root).compare(Side("linear"), Side("fine_tuning")) is None
    path.unlink()
    assert Evidence(root).compare(Side("linear"), Side("fine_tuning")) is None


def test_a_case_that_was_asked_some_questions_is_compared_on_those(tmp_path):
    root = tmp_path / "synthetic"
    asked = questions()
    answered_run(root, "fine_tuning", cases={"own": [True, False] * (len(asked) // 2)})
    some = [True if row[2] == "unseen" else None for row in asked]
    answered_run(root, "on_device", cases={"own": 0.5, "labels_2": some})
    gain = Evidence(root).compare(Side("on_device", "labels_2"), Side("fine_tuning"))
    assert gain.value.value == pytest.approx(50)


def test_recalls_are_paired_and_weigh_both_directions_alike(tmp_path):
    root = tmp_path / "msrvtt_retrieval"
    ranked_run(root, "fine_tuning", {"own": {"VR": [1, 20, 3], "TR": [1, 1, 20, 20, 7, 7]}})
    ranked_run(
        root, "cdc_mmpg", {"own": {"VR": [1, 1, 1], "TR": [1] * 6}, "shuffled": {"VR": [50] * 3, "TR": [50] * 6}}
    )
    evidence = Evidence(root)
    own = np.mean([1 / 3, 2 / 3, 2 / 3, 2 / 6, 2 / 6, 4 / 6])
    gain = evidence.compare(Side("cdc_mmpg"), Side("fine_tuning"))
    assert gain.value.value == pytest.approx(100 * (1 - own))
    assert evidence.compare(Side("cdc_mmpg"), Side("cdc_mmpg", "shuffled")).value.value == pytest.approx(100)
    form = build_paper_table(evidence)
    assert form.title == "Table 3 of the paper: msrvtt_retrieval"
    assert form.header[:5] == ["method", "VR@1", "paper", "VR@5", "paper"]
    by_name = {label: [each.text for each in cells] for label, cells in form.rows}
    assert by_name["CDC-MMPG"][:4] == ["100.0", "6.6", "100.0", "21.3 †"]
    assert by_name["Fine-tuning"][:2] == ["33.3", "4.8"]
    assert by_name["F-linear"][:2] == ["not run", "2.0"]  # named with its command
    assert "Split inference: the cloud answers (computed)" not in by_name
    assert build_frames_table(evidence) is None
    assert tables.main([str(root), "--paper"]) == 0


@pytest.mark.parametrize(
    ("shuffled", "mean_head", "said"),
    [
        (0.7, 0.7, "CDC-MMPG: another sample's anchor costs nothing that this test can tell ({}): the adaptation is "
                   "unused."),
        (0.2, 0.7, "CDC-MMPG: another sample's anchor costs {}: its head depends on what was uploaded."),
        (0.97, 0.2, "CDC-MMPG: another sample's anchor does better, by its own minus that {}: the adaptation is "
                    "unused, or harms."),
    ],
)  # fmt: skip
def test_findings_on_controls_follow_the_sign_of_the_difference(shuffled, mean_head, said, tmp_path):
    root = tmp_path / "synthetic"
    answered_run(root, "cdc_mmpg", cases={"own": 0.7, "shuffled": shuffled, "mean_head": mean_head})
    evidence = Evidence(root)
    points = evidence.compare(Side("cdc_mmpg"), Side("cdc_mmpg", "shuffled")).format_points().text
    sentences = [each.text for each in list_findings(evidence)]
    assert said.format(points) in sentences
    (about,) = (each for each in sentences if each.startswith("CDC-MMPG: the mean of all heads, for everyone, costs"))
    assert ("one head for all would do" in about) == (mean_head == 0.7)
    assert ("that heads differ is of use" in about) == (mean_head == 0.2)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.97, "adds to fine-tuning"), (0.2, "loses to fine-tuning"),
     (0.6, "shows no difference to fine-tuning that this test can tell")],
)  # fmt: skip
def test_findings_on_adaptation_follow_the_sign_of_the_difference(share, said, tmp_path):
    root = tmp_path / "synthetic"
    answered_run(root, "fine_tuning", cases={"own": 0.6})
    answered_run(root, "cdc_mmpg", cases={"own": share, "bypassed": share})
    answered_run(root, "cdc_mmpg_session", cases={"n16": share, "shuffled_n16": 0.1})
    sentences = [each.text for each in list_findings(Evidence(root))]
    assert sum(each.startswith(f"Per-sample adaptation (CDC-MMPG) {said}: ") for each in sentences) == 1
    assert sum(each.startswith(f"Adaptation to a session (Session, n = 16) {said}: ") for each in sentences) == 1
    assert any(each.startswith("The reasoner (ADR) can be left out in CDC-MMPG") for each in sentences)


def test_the_least_bytes_within_two_tenths_of_a_point(tmp_path):
    root = tmp_path / "synthetic"
    asked = questions(unseen=150)
    last = len(asked) - 1  # of 1,200 on devices not seen, two are 0.17 points and three 0.25
    missed = {"n16": 0, "float32": 0, "int8": 2, "int4": 3}
    cases = {case: [last - number >= few for number in range(len(asked))] for case, few in missed.items()}
    sizes = {"float32": {"bytes": 1824}, "int8": {"bytes": 484}, "int4": {"bytes": 258}}
    answered_run(root, "cdc_mmpg_session", cases=cases, asked=asked, payloads=sizes, bytes={"up": 768, "down": 1824})
    answered_run(root, "cdc_mmpg_session_full", asked=asked, bytes={"up": 768, "down": 6596})
    evidence = Evidence(root)
    least, top = find_equal_payloads(evidence)
    assert (least.bytes.value, top.bytes.value) == (484, 1824)
    assert list_claims(evidence)[-1].text.startswith("484 bytes a session are enough (Session, n = 16, int8): 99.8 %")
    rows = dict(build_payload_table(evidence).rows)
    assert [each.text for each in rows["Session, n = 16, int4"][:3]] == ["a session", "258", "390"]
    assert list(rows)[-1] == "Session, full layer"


def test_the_papers_tables(tmp_path):
    root = tmp_path / "msvd"
    answered_run(root, "fine_tuning", devices=False)
    size = {"device": 11_546_921, "cloud": 46_542_537, "trained": 7}
    answered_run(root, "cdc_mmpg", devices=False, reasoner="paper_qa", parameters=size)
    answered_run(root, "cdc_mmpg.frames2", devices=False, seconds={"train": 80.0, "test": 1.0})
    answered_run(root, "hyper", devices=False, bytes={"up": 768, "down": 388_388})
    evidence = Evidence(root)
    first, fourth, sixth = build_paper_table(evidence), build_frames_table(evidence), build_delay_table(evidence)
    assert first.title == "Table 1 of the paper: msvd"
    assert first.header == [
        "method", "test %", "paper", "vs fine-tuning", "D-Param", "paper", "C-Param", "paper", "bytes up", "bytes down",
        "delay up, ms", "delay down, ms", "paper", "seeds",
    ]  # fmt: skip
    rows = {row[0]: dict(zip(range(13), row[1:], strict=True)) for row in first.texts()}
    assert [rows["CDC-MMPG"][i] for i in (1, 4, 6, 10, 11)] == ["35.4", "11.5M", "46.5M", "3.70", "3.71"]
    assert [rows["CDC-MMPG"][i] for i in (3, 5)] == ["11,546,921", "46,542,537"]
    assert any("27,802,816 parameters) fit the paper's totals" in note.text for note in first.notes)
    assert (rows["F-linear"][0], rows["F-linear"][1], rows["F-linear"][11]) == ("not run", "17.3", "60000 †")
    split = rows["Split inference: the cloud answers (computed)"]
    assert (split[7], split[8]) == ("768", "2")
    assert rows["Generator on the device (computed)"][3] == "58,089,458"
    assert fourth.header == ["frames", "CDC-MMPG %", "s / epoch", "Fine-tuning %", "s / epoch", "paper %",
                             "paper s / epoch"]  # fmt: skip
    two, three, four, _ = fourth.texts()
    assert (two[0], two[2], two[5:]) == ("2", "2.0", ["34.1", "204"])
    assert all(three[:4])
    assert four[1:5] == ["not run", ""] * 2
    download = next(row for row in sixth.texts() if row[0].startswith("Download a sample"))
    assert download[1:] == ["388,388", "388,520", "74.08", "24.69", "7.41", "3.70", "379.4", "3.71"]
    upload = sixth.texts()[0]
    assert upload[1:] == ["768", "836", "0.146", "0.0488", "0.0146", "0.00732", "0.75", "0.007"]


def test_the_study_of_the_reasoner_and_the_probes(tmp_path):
    root = tmp_path / "synthetic"
    for seed in range(2):
        answered_run(root, "cdc_mmpg_frozen.batch_global", seed, {"own": 0.9, "bypassed": 0.4})
    probes = [{"what": "the hue", "from": "the mean of 16", "degrees": 20.5, "low": 18.0, "high": 23.0, "chance": 90.0,
               "majority": 95.0, "number": 48},
              {"what": "the device", "from": "one anchor", "accuracy": 0.4}]  # fmt: skip
    folder = root / "privacy" / "seed0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"probes": probes}))
    evidence = Evidence(root)
    ((label, cells),) = build_reasoner_table(evidence).rows
    assert label == "batch, global"
    assert "±" in cells[0].text
    assert cells[2].text.startswith("+")
    assert cells[3].text == "2"
    assert any("In some readings of equation 16 the reasoner helps" in each.text for each in list_findings(evidence))
    assert build_privacy_table(evidence).texts() == [
        ["the hue, from the mean of 16", "20.5 [18.0, 23.0]", "degrees off", "90.0", "95.0", "48"],
        ["the device, from one anchor", "40.0", "% right", "", "", ""],
    ]


def test_the_weakest_devices_and_the_calibration_stand_beside_the_mean(tmp_path):
    root = tmp_path / "synthetic"
    for seed, percentile in enumerate((0.4, 0.5)):
        measured = {"tenth_percentile": {"own": {"unseen": percentile}}, "calibration_error": {"own": {"unseen": 0.04}}}
        answered_run(root, "fine_tuning", seed, {"own": 0.6}, **measured)
    answered_run(root, "linear", 0, {"own": 0.6})  # of an earlier version
    table = build_spread_table(Evidence(root))
    assert [row[0] for row in table.texts()] == ["Fine-tuning"]
    assert table.texts()[0][2:] == ["45.0", "4.0"]
    assert build_spread_table(Evidence(tmp_path / "nothing")) is None


def test_a_variant_is_compared_with_its_method(tmp_path):
    root = tmp_path / "synthetic"
    asked = questions(unseen=30)
    inside = [(*row[:2], "arc", *row[3:]) if row[2] == "unseen" and int(row[1][-1]) % 2 else row for row in asked]
    answered_run(root, "cdc_mmpg_session", cases={"n16": 0.9}, asked=asked)
    answered_run(root, "cdc_mmpg_session.arc90", cases={"n16": 0.7}, asked=inside)
    answered_run(root, "linear.devices24", cases={"own": 0.5}, asked=asked)
    evidence = Evidence(root)
    rows = dict(build_variants_table(evidence).rows)
    assert list(rows) == ["Session, n = 16: a quarter of the casts held out", "F-linear: 24 devices train"]
    outside, arc, gain, seeds = (cell.text for cell in rows["Session, n = 16: a quarter of the casts held out"])
    assert outside
    assert arc
    assert gain.startswith("−")  # on the questions whose devices are outside in the one, and unseen in both
    assert seeds == "1"
    assert rows["F-linear: 24 devices train"][2].text == ""  # all devices were not run
    assert evidence.groups == ["unseen", "seen"]  # an arc is no column of the other tables
    assert build_variants_table(Evidence(tmp_path / "nothing")) is None


def test_missing_runs_are_listed_with_their_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = Path("checkpoints") / "msvd"
    for seed in range(2):
        answered_run(root, "linear", seed, devices=False, encoder="all-in-one-ti.ckpt")
    answered_run(root, "fine_tuning", 0, devices=False, encoder="all-in-one-ti.ckpt")
    answered_run(Path("checkpoints") / "synthetic", "linear")
    answered_run(Path("checkpoints") / "synthetic", "cdc_mmpg_frozen.batch_anchor", cases={"own": 0.5, "bypassed": 0.5})
    (Path("checkpoints") / "synthetic" / "linear" / "seed0" / "predictions.test.csv").unlink()
    assert tables.main(["checkpoints", "--paper"]) == 0
    printed = capsys.readouterr().out
    for command in (
        "make train DATASET=msvd METHOD=fine_tuning SEED=1 CHECKPOINT=all-in-one-ti.ckpt",
        "make train DATASET=msvd METHOD=hyper SEEDS=2 CHECKPOINT=all-in-one-ti.ckpt",
        "make train DATASET=msvd METHOD=fine_tuning.frames4 SEED=0 CHECKPOINT=all-in-one-ti.ckpt",
        "make train DATASET=synthetic METHOD=cdc_mmpg_session SEED=0",
        "make train DATASET=synthetic METHOD=cdc_mmpg_frozen.batch_global SEEDS=5 ENCODER_SEED=0",
        "for seed in 1 2 3 4; do make train DATASET=synthetic METHOD=cdc_mmpg_frozen.batch_anchor SEED=$seed "
        "ENCODER_SEED=0; done",
    ):
        assert f"\n  {command}\n" in printed
        dataset = "msvd" if "msvd" in command else "synthetic"
        assert command in (Path("checkpoints") / dataset / "tables.md").read_text()
    assert "delete checkpoints/synthetic/linear/seed0 and train anew: it has no predictions.test.csv" in printed
    assert "METHOD=cdc_mmpg_session" not in (root / "tables.md").read_text()
    capsys.readouterr()
    assert tables.main([str(tmp_path / "checkpoints" / "synthetic"), "--paper"]) == 0
    assert "Table 1 of the paper" not in capsys.readouterr().out
    assert tables.main([str(tmp_path / "nothing"), "--paper"]) == 2
    assert "make train" in capsys.readouterr().err


# What stands beside the paper's figures, and what is left out


def notes(table):
    return [note.text for note in table.notes]


@pytest.mark.parametrize(
    ("dataset", "task", "signed", "noted"),
    [
        ("tgif", "open_ended", {"F-hyper": "18.7M §", "CDC-MMPG": "46.5M §", "F-linear": "60000"},
         ["MSVD's figure: with TGIF's 1,541 answers F-hyper has 28,849,061 parameters", "TGIF-QA's FrameQA",
          "nominal: set for a fine-tuning, not measured"]),
        ("msrvtt_choice", "multiple_choice", {"F-linear": "3.58 †", "F-hyper": "5.70"},
         ["below chance, which is 20 %", "TGIF's figure: the 772 bytes of this layer take 0.00736 ms"]),
    ],
)  # fmt: skip
def test_the_papers_own_errors_are_footnotes(dataset, task, signed, noted, tmp_path):
    answered_run(tmp_path / dataset, "fine_tuning", devices=False, task=task)
    evidence = Evidence(tmp_path / dataset)
    form = build_paper_table(evidence)
    rows = {label: [each.text for each in cells] for label, cells in form.rows}
    for label, text in signed.items():
        assert any(each.startswith(text) for each in rows[label]), rows[label]
    for text in noted:
        (note,) = (each for each in notes(form) if text in each)
        assert any(f" {note[0]}" in each for cells in rows.values() for each in cells)  # its sign stands in the table
    assert len(FOOTNOTE_SIGNS) >= len(form.notes) - 3
    if dataset == "tgif":
        assert any("TGIF-QA's FrameQA" in each for each in notes(build_frames_table(evidence)))
        assert any("TGIF-QA's FrameQA" in each for each in notes(build_method_table(evidence)))


def test_cut_annotation_files_stand_beside_no_published_figure(tmp_path, capsys):
    root = tmp_path / "msrvtt"
    rows = [{"split": "test", "what": "questions", "published": 72_821, "here": 53, "same": False, "edition": ""},
            {"split": "train", "what": "questions", "published": 158_581, "here": 158_581, "same": True}]  # fmt: skip
    answered_run(root, "fine_tuning", devices=False, published=rows)
    evidence = Evidence(root)
    for table in (build_paper_table(evidence), build_frames_table(evidence)):
        assert not any("paper" in name for name in table.header)
    assert [each[1] for _, each in build_method_table(evidence).rows] == [NO_TEXT] * 3
    said = "Not the published files, so no published figure stands beside (test: 53 of 72,821 questions)."
    assert said in notes(build_paper_table(evidence))
    assert said in caption_of(root)
    rows[0] |= {"here": 72_821, "same": True}
    answered_run(root, "fine_tuning", devices=False, published=rows)
    assert dict(build_paper_table(Evidence(root)).rows)["Fine-tuning"][1].text == "36.7"
    assert "Not the published files" not in caption_of(root)


@pytest.mark.parametrize(("share", "found"), [(0.0, False), (0.3, False), (0.7, True)])
def test_rows_that_only_guess_give_no_findings(share, found, tmp_path):
    root = tmp_path / "synthetic"
    floors = {"majority": {"unseen": {"all": cell(0.5)}}}
    cases = {"own": share, "shuffled": share, "bypassed": share, "mean_head": share}
    answered_run(root, "fine_tuning", cases={"own": share}, floors=floors)
    answered_run(root, "cdc_mmpg", cases=cases, floors=floors)
    answered_run(root, "on_device", cases={"own": share, "tent": share}, floors=floors)
    sizes = {"int8": {"bytes": 484}}
    answered_run(root, "cdc_mmpg_session", cases={"n16": share, "int8": share}, floors=floors, payloads=sizes)
    answered_run(root, "cdc_mmpg_frozen.batch_global", cases=cases, floors=floors)
    assert bool(list_findings(Evidence(root))) == found


def test_a_row_at_the_majority_answer_still_loses_to_one_that_learnt(tmp_path):
    root = tmp_path / "synthetic"
    floors = {"majority": {"unseen": {"all": cell(0.4)}}}
    answered_run(root, "fine_tuning", cases={"own": 0.9}, floors=floors)
    answered_run(root, "cdc_mmpg", cases={"own": 0.2, "shuffled": 0.2}, floors=floors)
    (sentence,) = (each.text for each in list_findings(Evidence(root)))
    assert sentence.startswith("Per-sample adaptation (CDC-MMPG) loses to fine-tuning")


# Results that are not as they should be


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"accuracy": {"own": {"test": {"all": {"value": NaN}}}}}',
        '{"accuracy": {"own": {"test": {"all": {"value": 0.5}}}}}', '{"accuracy": {"own": 0.5}}',
        '{"metrics": 3, "accuracy": {}}', '{"floors": {"majority": {"test": []}}}', '{"seed": "0"}',
        '{"published": {"test": 3}}', '{"metrics": {"val/accuracy": 1e999}}', '{"splits": ["a"]}', '{"commit": 5}',
    ],
)  # fmt: skip
def test_damaged_results_are_left_out_by_name(damage, tmp_path, caplog):
    root = tmp_path / "synthetic"
    answered_run(root, "linear")
    folder = answered_run(root, "fine_tuning")
    (folder / "results.json").write_text(damage)
    for arguments in ([str(root)], [str(root), "--paper"]):
        caplog.clear()
        assert tables.main(arguments) == 0
        assert f"{folder / 'results.json'}: damaged (" in caplog.text
    assert "Fine-tuning" not in by_label(root)


KEYS = ["dataset", "method", "seed", "monitor", "protocol", "splits", "metrics", "best_epoch", "epochs", "questions",
        "data", "encoder", "parameters", "bytes", "seconds", "commit", "floors"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_results_without_a_key_are_a_row(key, tmp_path):
    for number, value in enumerate(("absent", None)):
        root = tmp_path / str(number) / "synthetic"
        folder = answered_run(root, "fine_tuning")
        results = json.loads((folder / "results.json").read_text())
        results.pop(key)
        (folder / "results.json").write_text(json.dumps(results | ({} if value == "absent" else {key: value})))
        assert tables.main([str(root)]) == 0
        assert tables.main([str(root), "--paper"]) == 0
        assert "Fine-tuning" in by_label(root)


@pytest.mark.parametrize(
    "damage",
    ["", "\n", "clip,device\n", "direction,clip,caption,own\nVR,a,,x\n", "a,b\n1,2\n",
     "clip,device,group,type,question,answer,own,right\na,a,,,q,red,red,x\n",
     "clip,device,group,type,question,answer,own,right\na,a,,,q,red,red,\n"],
)  # fmt: skip
def test_a_damaged_table_of_answers_costs_the_differences_alone(damage, tmp_path, caplog):
    root = tmp_path / "synthetic"
    answered_run(root, "fine_tuning")
    folder = answered_run(root, "linear")
    (folder / "predictions.test.csv").write_text(damage)
    assert tables.main([str(root), "--paper"]) == 0
    assert f"{folder / 'predictions.test.csv'}: left out (" in caplog.text
    assert by_label(root)["F-linear"]["vs fine-tuning"] == ""
    assert f"delete {folder} and train anew: it has no" in (root / "tables.md").read_text()


def test_answers_of_earlier_versions_count_where_words_and_labels_agree(tmp_path, caplog):
    root = tmp_path / "synthetic"
    answered_run(root, "fine_tuning")
    folder = answered_run(root, "linear", cases={"own": 0.7})
    gain = Evidence(root).compare(Side("linear"), Side("fine_tuning"))
    path = folder / "predictions.test.csv"
    path.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in path.read_text().splitlines()))
    assert Evidence(root).compare(Side("linear"), Side("fine_tuning")).value.value == gain.value.value
    path.write_text(path.read_text().replace("wrong", "red"))  # equal candidates: more words than labels are right
    assert Evidence(root).compare(Side("linear"), Side("fine_tuning")) is None
    assert "equal words are no equal labels in own" in caplog.text


def test_a_method_that_no_table_knows_has_a_row(tmp_path, capsys):
    root = tmp_path / "synthetic"
    answered_run(root, "fine_tuning", cases={"own": 0.5})
    answered_run(root, "my_method", cases={"own": 0.9})
    answered_run(root, "fine_tuning.frames5")
    assert [label for label in by_label(root) if "Majority" not in label] == ["Fine-tuning", "my_method"]
    assert tables.main([str(root), "--paper"]) == 0
    assert "my_method" in dict(build_paper_table(Evidence(root)).rows)
    assert Evidence(root).find_seeds(["my_method"]) == [0]


def test_names_of_others_are_neither_markup_nor_control_characters(tmp_path, capsys):
    root = tmp_path / "[bold]a[" / "[/x] \x1b[31m|b"
    types = {"test": {"all": cell(0.5), "[/what]": cell(0.4), "a|b\nc": cell(0.3)}}
    write_run(root, "linear", devices=False, accuracy={"own": types}, machine="\x1b[2J [red]x")
    write_run(root, "mine [x]\x07", devices=False, accuracy={"own": types})
    for arguments in ([str(root)], [str(root), "--paper"]):
        assert tables.main(arguments) == 0
        printed = capsys.readouterr().out
        assert not [letter for letter in printed if not letter.isprintable() and letter != "\n"]
        for text in ("[/what]", "mine [x]\\x07", "\\x1b[2J [red]x", "[/x] \\x1b[31m|b"):
            assert text in printed
    lines = [line for line in (root / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "\x1b" not in (root / "tables.md").read_text()


# What is missing


def test_after_all_that_make_tables_trains_nothing_is_missing(tmp_path):
    listed = subprocess.run(["make", "-n", "tables", f"OUT={tmp_path}"], capture_output=True, text=True, check=True)
    fits = re.findall(r'default_root_dir="?[^ "]*/synthetic/([\w.]+)/seed(\d+)', listed.stdout)
    controls = re.findall(r"-m cdc_mmpg (on_device|prompts|privacy) \S*/seed(\d+)", listed.stdout)
    made = sorted({(name, int(seed)) for name, seed in (*fits, *controls)})
    assert len({name for name, _ in made}) == 69
    for name, seed in made:
        changes = {"accuracy": {}} if name.partition(".")[0] in ("encoder_pretraining", "privacy") else {}
        if not name.startswith("adr_"):
            write_run(tmp_path / "synthetic", name, seed, **changes)
    evidence = Evidence(tmp_path / "synthetic")
    assert [what for what, _ in find_missing(evidence)] == ["answers by question, for the differences"]
    asked = [("fine_tuning", 2), ("fine_tuning.frames4", 0), ("hyper", 0), ("cdc_mmpg_session", 1), ("privacy", 0),
             ("cdc_mmpg_frozen.group8_anchor", 3), ("on_device", 0), ("session_oracle", 2),
             ("linear.devices24", 0), ("cdc_mmpg_session.no_background", 0), ("prompts", 0)]  # fmt: skip
    for name, seed in asked:
        assert (name, seed) in made
        shutil.rmtree(tmp_path / "synthetic" / name / f"seed{seed}")
        commands = [line for _, lines in find_missing(Evidence(tmp_path / "synthetic")) for line in lines]
        assert [line for line in commands if f"METHOD={name} SEED={seed}" in line]
        write_run(tmp_path / "synthetic", name, seed, **({"accuracy": {}} if name == "privacy" else {}))


@pytest.mark.parametrize("dataset", ["msvd", "msrvtt_retrieval", "tgif_action"])
def test_a_known_dataset_without_runs_lists_its_commands(dataset, tmp_path, capsys):
    root = tmp_path / dataset
    assert tables.main([str(root), "--paper"]) == 0
    printed = capsys.readouterr().out
    for method in ("linear", "fine_tuning", "hyper", "cdc_mmpg", "cdc_mmpg_frozen"):
        assert f"make train DATASET={dataset} METHOD={method} SEED=0 OUT={tmp_path}" in printed
    assert ("METHOD=fine_tuning.frames5 SEED=0" in printed) == (dataset == "msvd")
    assert ("35.4" in printed and "not run" in printed) == (dataset == "msvd")
    assert "make train" in (root / "tables.md").read_text()
    assert tables.main([str(root)]) == 2


def test_the_rows_of_frames_are_of_the_same_seeds(tmp_path):
    root = tmp_path / "synthetic"
    for seed in range(3):
        answered_run(root, "fine_tuning", seed, cases={"own": 0.5 + 0.1 * seed})
        answered_run(root, "cdc_mmpg", seed)
    answered_run(root, "fine_tuning.frames2", 1)
    table = build_frames_table(Evidence(root))
    assert table.header == ["frames", "Fine-tuning %", "s / epoch"]
    three = dict(table.rows)["3"][0]
    assert [source.split("/")[1] for source in three.facts[0].sources] == ["seed1"]


@pytest.mark.parametrize("name", ["table.md", "tables.md"])
def test_on_a_full_disk_the_old_table_stays_and_the_new_one_is_shown(name, tmp_path, capsys, monkeypatch):
    root = tmp_path / "synthetic"
    write_run(root, "linear")
    (root / name).write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert tables.main([str(root), *(["--paper"] if name == "tables.md" else [])]) == 1
    shown = capsys.readouterr()
    assert f"{root / name}: cannot be written (No space left on device)" in shown.err
    assert "F-linear" in shown.out
    assert "written" not in shown.out
    assert (root / name).read_text() == "old"
    assert sorted(path.name for path in root.iterdir()) == ["linear", name]
