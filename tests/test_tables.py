"""Accuracies with bootstrap intervals, and the tables, captions and findings built from runs."""

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
from cdc_mmpg.evaluation.metrics import compute_accuracies, guess_answers
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


def draw_question_names(generator, devices=12, clips=5, questions=3):
    """Return clips, devices, groups and types, one entry per question."""
    names = [(f"clip{d}.{c}", f"device{d}") for d in range(devices) for c in range(clips) for _ in range(questions)]
    groups = ["seen" if int(device[6:]) % 3 else "unseen" for _, device in names]
    types = generator.choice(["color", "count"], len(names)).tolist()
    return [clip for clip, _ in names], [device for _, device in names], groups, types


def test_accuracies_and_counts_equal_a_manual_computation():
    correct = {"own": [1, 0, 1, 1, 0], "shuffled": np.array([False, False, True, False, False])}
    table = compute_accuracies(
        correct,
        clips=["a", "a", "b", "c", "c"],
        devices=["p", "p", "p", "q", "q"],
        groups=["seen", "seen", "seen", "unseen", "unseen"],
        types=["color", "size", "color", "color", "size"],
    )
    assert list(table) == ["own", "shuffled"]
    assert list(table["own"]) == ["test", "seen", "unseen"]
    assert list(table["own"]["test"]) == ["all", "color", "size"]

    def list_values(condition, group):
        return {kind: (cell["value"], cell["questions"]) for kind, cell in table[condition][group].items()}

    assert list_values("own", "test") == {"all": (3 / 5, 5), "color": (1.0, 3), "size": (0.0, 2)}
    assert list_values("own", "seen") == {"all": (2 / 3, 3), "color": (1.0, 2), "size": (0.0, 1)}
    assert list_values("own", "unseen") == {"all": (1 / 2, 2), "color": (1.0, 1), "size": (0.0, 1)}
    assert list_values("shuffled", "test") == {"all": (1 / 5, 5), "color": (1 / 3, 3), "size": (0.0, 2)}
    # One device with clips a (1 of 2 correct) and b (1 of 1): its draws are {a, a}, {a, b}, {b, b}.
    seen = table["own"]["seen"]["all"]
    assert (seen["low"], seen["high"]) == (0.5, 1.0)
    # One device with one clip: all draws are equal.
    unseen = table["own"]["unseen"]["all"]
    assert (unseen["low"], unseen["high"]) == (0.5, 0.5)
    json.dumps(table, allow_nan=False)


def test_accuracies_without_devices_and_types_have_one_cell():
    table = compute_accuracies({"own": [1.0, 0.0, 1.0]}, ["a", "b", "c"], ["a", "b", "c"], [""] * 3, [""] * 3)
    assert list(table["own"]) == ["test"]
    assert list(table["own"]["test"]) == ["all"]
    assert {name: type(value) for name, value in table["own"]["test"]["all"].items()} == {
        "value": float, "standard_error": float, "low": float, "high": float, "questions": int,
    }  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        compute_accuracies({"own": [1.0]}, ["a"], ["a"], [], [""])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_the_interval_of_a_constant_is_the_constant(value):
    clips, devices, groups, types = draw_question_names(np.random.default_rng(0))
    for kinds in compute_accuracies({"own": np.full(len(clips), value)}, clips, devices, groups, types)["own"].values():
        for cell in kinds.values():
            assert (cell["value"], cell["low"], cell["high"]) == pytest.approx((value,) * 3, abs=1e-12)


def test_interval_is_wider_if_answers_of_a_device_agree():
    clips, devices, _, _ = draw_question_names(np.random.default_rng(0), devices=30)
    none = [""] * len(clips)
    correct = {"own": [int(device[6:]) % 2 for device in devices]}
    distinct = [str(number) for number in range(len(clips))]
    clustered = compute_accuracies(correct, clips, devices, none, none)["own"]["test"]["all"]
    naive = compute_accuracies(correct, distinct, distinct, none, none)["own"]["test"]["all"]
    assert clustered["value"] == naive["value"] == 0.5
    ratio = (clustered["high"] - clustered["low"]) / (naive["high"] - naive["low"])
    assert ratio == pytest.approx(15**0.5, rel=0.15)  # 15 questions of a device carry the information of one


def test_bootstrap_draws_depend_on_the_seed_but_not_on_the_order():
    generator = np.random.default_rng(0)
    names = draw_question_names(generator)
    correct = generator.random(len(names[0])) < 0.6
    first = compute_accuracies({"own": correct}, *names)
    assert compute_accuracies({"own": correct}, *names) == first
    assert compute_accuracies({"own": correct}, *names, seed=1) != first
    order = generator.permutation(len(correct))
    shuffled = compute_accuracies({"own": correct[order]}, *([column[i] for i in order] for column in names))
    for group, kinds in first["own"].items():
        for kind, cell in kinds.items():
            assert shuffled["own"][group][kind] == pytest.approx(cell)


def test_conditions_share_their_bootstrap_draws():
    generator = np.random.default_rng(0)
    names = draw_question_names(generator)
    correct = generator.random(len(names[0])) < 0.6
    single = compute_accuracies({"own": correct}, *names)["own"]
    table = compute_accuracies({"own": correct, "other": ~correct, "same": correct}, *names)
    assert table["own"] == table["same"] == single
    mirrored = table["other"]["test"]["all"]
    assert mirrored["low"] == pytest.approx(1 - single["test"]["all"]["high"])


def bootstrap_by_loops(correct, clips, devices, groups, draws, seed):
    """Compute the same bootstrap intervals with plain loops over draws, devices and clips."""
    generator = np.random.default_rng(seed)
    tree = {}
    for value, clip, device, group in zip(correct, clips, devices, groups, strict=True):
        tree.setdefault(group, {}).setdefault(device, {}).setdefault(clip, []).append(value)
    means = {group: [] for group in [*tree, "test"]}
    for _ in range(draws):
        all_values = []
        for group, members in tree.items():
            group_values = []
            for device in generator.choice(list(members), len(members)):
                device_clips = members[device]
                for clip in generator.choice(list(device_clips), len(device_clips)):
                    group_values += device_clips[clip]
            means[group].append(np.mean(group_values))
            all_values += group_values
        means["test"].append(np.mean(all_values))
    return {group: np.percentile(values, (2.5, 97.5)) for group, values in means.items()}


@pytest.mark.parametrize("clips_of_a_device", [1, 4])
def test_intervals_agree_with_a_bootstrap_by_loops(clips_of_a_device):
    generator = np.random.default_rng(0)
    clips, devices, groups, types = draw_question_names(generator, devices=21, clips=clips_of_a_device)
    rates = dict(zip(dict.fromkeys(devices), generator.random(21), strict=True))
    correct = np.array([generator.random() < rates[device] for device in devices])
    table = compute_accuracies({"own": correct}, clips, devices, groups, types, draws=4000)["own"]
    for group, interval in bootstrap_by_loops(correct, clips, devices, groups, draws=4000, seed=1).items():
        cell = table[group]["all"]
        assert (cell["low"], cell["high"]) == pytest.approx(interval, abs=0.025)
        assert interval[1] - interval[0] > 0.1


@pytest.mark.parametrize(("devices", "clips", "questions", "conditions"), [(144, 7, 3, 8), (500, 1, 26, 1)])
def test_intervals_take_little_memory(devices, clips, questions, conditions):
    generator = np.random.default_rng(0)
    names = draw_question_names(generator, devices, clips, questions)
    correct = {str(number): generator.random(len(names[0])) < 0.5 for number in range(conditions)}
    tracemalloc.start()
    compute_accuracies(correct, *names, draws=200)  # more draws use no larger chunks
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_cell_ignores_bootstrap_draws_without_its_questions():
    clips = [f"clip{number}" for number in range(6)]
    table = compute_accuracies({"own": [1, 0, 0, 0, 0, 0]}, clips, clips, [""] * 6, ["rare", *["often"] * 5])
    rare = table["own"]["test"]["rare"]
    assert (rare["value"], rare["low"], rare["high"], rare["questions"]) == (1.0, 1.0, 1.0, 1)


def test_majority_answers_overall_and_per_type():
    answers = ["red", "red", "blue", "blue", "two", "one", "two", "two"]
    types = ["color"] * 4 + ["count"] * 4
    assert guess_answers(answers, types, ["color", "count", "side"]) == {
        "majority": ["two"] * 3,
        "majority_per_type": ["blue", "two", "two"],  # ties: the first by name; without answers: as overall
    }
    assert guess_answers(["b", "a"], ["", ""], [""]) == {"majority": ["a"], "majority_per_type": ["a"]}


# The table of methods

TYPES = ("color", "shape", "size", "side", "count")
CONDITIONS = {
    "cdc_mmpg": ("own", "shuffled", "bypassed"),
    "cdc_mmpg_session": ("n16", "n8", "n4", "n1", "n0", "shuffled_n8", "shuffled_n16"),
}


def build_cell(value):
    return {"value": value, "low": value - 0.024, "high": value + 0.023, "questions": 1440}


def build_groups(value, devices):
    """Return accuracies: `value` on unseen devices, and one point less for every further question type."""
    if not devices:
        return {"test": {"all": build_cell(value)}}
    kinds = {kind: build_cell(value - 0.01 * number) for number, kind in enumerate(("all", *TYPES))}
    return {"test": {"all": build_cell(value + 0.05)}, "seen": {"all": build_cell(value + 0.1)}, "unseen": kinds}


def write_run(
    root: Path, method: str, seed: int = 0, value: float = 0.5, devices: bool = True, **changes: object
) -> Path:
    """Write a finished run of a dataset with or without devices; condition number i is 10 i points worse."""
    conditions = CONDITIONS.get(method, ("own",))
    accuracy = {name: build_groups(value - 0.1 * number, devices) for number, name in enumerate(conditions)}
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
        "floors": {"majority": build_groups(0.1, devices), "majority_per_type": build_groups(0.2, devices)},
        **changes,
    }
    folder = root / method / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_runs_on_different_protocols_are_refused(tmp_path):
    root = tmp_path / "msrvtt_retrieval"
    write_run(root, "linear", protocol="full")
    write_run(root, "linear", seed=1, protocol="9k")
    with pytest.raises(ConfigError, match="linear on protocol full; linear on protocol 9k"):
        read_rows(root)


@pytest.fixture
def synthetic(tmp_path):
    """One seed of every method on a dataset with devices."""
    root = tmp_path / "synthetic"
    for number, method in enumerate(catalogue.METHOD_LABELS):
        write_run(root, method, value=0.7 + 0.01 * number)
    return root


def read_header(folder):
    """Return the header of the table of methods."""
    return build_method_table(load_comparable(folder)).header


def read_rows(folder):
    """Return the rows of the table of methods, as texts."""
    return build_method_table(load_comparable(folder)).texts()


def read_caption(folder):
    """Return the caption of the table of methods."""
    return write_caption(load_comparable(folder))


def index_rows(folder):
    """Return the rows of the table of methods as dictionaries, by label."""
    header = read_header(folder)
    return {row[0]: dict(zip(header, row, strict=True)) for row in read_rows(folder)}


def test_method_labels_are_in_table_order():
    assert list(catalogue.METHOD_LABELS) == [
        "linear", "linear_virtual", "static_mlp", "fine_tuning", "fine_tuning_virtual", "hyper", "hyper_fan_in",
        "cdc_mmpg", "cdc_mmpg_virtual", "cdc_mmpg_frozen", "cdc_mmpg_session", "cdc_mmpg_session_basis",
        "cdc_mmpg_session_full", "cdc_mmpg_session_film", "cdc_mmpg_session_bias", "cdc_mmpg_session_collected",
        "cdc_mmpg_session_jitters",
        "cdc_mmpg_session_feature", "cdc_mmpg_session_plain", "session_concatenated", "mean_anchor",
        "mean_anchor_virtual", "in_context", "in_context_virtual", "corrected_grey_world", "corrected_hue_mode",
        "corrected_true_cast", "session_oracle", "on_device", "prompts",
    ]  # fmt: skip
    assert catalogue.METHOD_LABELS["cdc_mmpg"] == "CDC-MMPG"
    assert catalogue.METHOD_LABELS["cdc_mmpg_session"] == "Session, n = 16"


def test_rows_and_columns_of_a_dataset_with_devices(synthetic):
    assert read_header(synthetic) == [
        "method", "unseen %", "seen %", "vs fine-tuning", *TYPES, "knows", "val %", "D-Param", "C-Param", "up, B",
        "down, B", "epoch", "train s", "seeds",
    ]  # fmt: skip
    table = index_rows(synthetic)
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
        "Minus mean anchor",
        "Minus mean anchor, virtual",
        "In context, n = 16",
        "In context, virtual devices",
        "By hand: grey world",
        "By hand: hue histogram",
        "By hand: true cast (ceiling)",
        "Oracle: the true cast",
        "On the device: not adapted",
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
    table = index_rows(synthetic)
    costs = ("val %", "D-Param", "C-Param", "up, B", "down, B", "train s")
    session_row = table["Session, n = 16"]
    for label, unseen in (("n = 16", "80.0"), ("n = 8", "70.0"), ("n = 4", "60.0"), ("n = 1", "50.0")):
        row = table[f"Session, {label}"]
        assert row["unseen %"].split()[0] == unseen
        for name in costs[1:5]:
            assert row[name] == session_row[name] != ""
        assert (row["val %"], row["train s"]) == (("81.0", "34.2") if row is session_row else ("", ""))
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


def test_rows_exist_only_for_finished_runs_and_their_conditions(tmp_path):
    root = tmp_path / "synthetic"
    write_run(root, "linear")
    folder = write_run(root, "cdc_mmpg_session")
    results = json.loads((folder / "results.json").read_text())
    for name in ("n4", "n0"):
        del results["accuracy"][name]
    (folder / "results.json").write_text(json.dumps(results))
    (root / "hyper" / "seed0").mkdir(parents=True)  # not finished
    write_run(root, "adr_pretraining", accuracy={})  # has no answers
    assert [label for label in index_rows(root) if "Majority" not in label] == [
        "F-linear", "Session, n = 1", "Session, n = 8", "Session, n = 16", "· another device's 8 anchors",
        "· another device's 16 anchors",
    ]  # fmt: skip


def test_table_of_a_dataset_without_devices_shows_the_papers_figures(tmp_path):
    root = tmp_path / "msvd"
    for method in ("linear", "cdc_mmpg", "cdc_mmpg_frozen"):
        write_run(root, method, devices=False, value=0.35)
    assert read_header(root)[:5] == ["method", "test %", "paper %", "vs fine-tuning", "val %"]
    table = index_rows(root)
    assert (table["CDC-MMPG"]["test %"], table["CDC-MMPG"]["paper %"]) == ("35.0 [32.6, 37.3]", "35.4")
    assert table["F-linear"]["paper %"] == "17.3"
    for label in ("· ADR bypassed", "CDC-MMPG, frozen", "Majority answer"):
        assert table[label]["paper %"] == ""
    assert "no method can exceed 90.8 % (answers outside the vocabulary)" in read_caption(root)
    assert "95 % bootstrap interval (resampling clips)." in read_caption(root)
    types = {"test": {"all": build_cell(0.3), "what": build_cell(0.2), "who": build_cell(0.4)}}
    write_run(root, "linear", devices=False, accuracy={"own": types})
    assert read_header(root)[:6] == ["method", "test %", "paper %", "vs fine-tuning", "what", "who"]
    assert index_rows(root)["F-linear"]["who"] == "40.0"
    assert index_rows(root)["CDC-MMPG"]["who"] == ""


def test_several_seeds_show_mean_and_standard_deviation(tmp_path):
    root = tmp_path / "synthetic"
    for seed, value in enumerate((0.2, 0.4)):
        write_run(root, "linear", seed, value)
        write_run(root, "cdc_mmpg_session", seed, value + 0.3)
    row = index_rows(root)["F-linear"]
    assert (row["unseen %"], row["seen %"], row["val %"]) == ("30.0 ± 14.1", "40.0 ± 14.1", "31.0 ± 14.1")
    assert (row["color"], row["epoch"], row["seeds"]) == ("29.0", "12–13/40", "2")
    assert index_rows(root)["Majority answer"]["unseen %"] == "10.0 [7.6, 12.3]"
    assert index_rows(root)["Session, n = 8"]["unseen %"] == "50.0 ± 14.1"
    pairs = "±: standard deviation over seeds, each with its own world and pretraining; intervals over several seeds"
    assert pairs in read_caption(root)
    assert "In brackets" in read_caption(root)  # intervals of the majority rows


def test_caption_describes_intervals_encoder_and_machine(synthetic):
    caption = read_caption(synthetic)
    assert caption.startswith("synthetic: 3168 test questions, 2304 for training. In brackets: ")
    assert "95 % bootstrap interval (resampling devices, then their clips). " in caption
    assert "By question type (color, shape, size, side, count): % on unseen devices. " in caption
    assert "Encoder from: random weights. Best epoch by validation accuracy, tested once. " in caption
    assert caption.endswith("Commit 01234567.")
    assert "±" not in caption
    assert "Machine" not in caption
    write_run(synthetic, "linear", machine="8 cores, 16 GB")
    assert "Machine: 8 cores, 16 GB. " in read_caption(synthetic)
    for step, is_mentioned in ((32, False), (8, True)):
        write_run(synthetic, "linear", questions_per_step=step, recipe_questions_per_step=32)
        assert ("Questions per training step: 8 (recipe: 32). " in read_caption(synthetic)) == is_mentioned


def test_caption_describes_the_pretraining_of_the_encoder(synthetic, monkeypatch):
    encoder = synthetic / "encoder_pretraining" / "seed0" / "encoder.safetensors"
    for method in catalogue.METHOD_LABELS:
        write_run(synthetic, method, encoder=str(encoder))
    assert "Encoder from: encoder_pretraining/seed0/encoder.safetensors. Best" in read_caption(synthetic)
    labels = {"clips": 5760, "captions": 5760, "questions": 17280}
    encoder.parent.mkdir(parents=True)
    content = {"labels": labels, "seconds": {"train": 94.6, "test": 0.0}}
    (encoder.parent / "results.json").write_text(json.dumps(content))
    sentence = "Encoder pretrained in this run on 5,760 captions and 17,280 questions of 5,760 other clips (95 s)."
    assert sentence in read_caption(synthetic)
    monkeypatch.chdir(synthetic.parent)
    for method in catalogue.METHOD_LABELS:
        write_run(synthetic, method, encoder="synthetic/encoder_pretraining/seed0/encoder.safetensors")
    assert sentence in read_caption(Path("synthetic"))
    assert sentence in read_caption(synthetic)
    monkeypatch.chdir(synthetic)
    for method in catalogue.METHOD_LABELS:
        write_run(synthetic, method)  # without a checkpoint
    assert read_caption(Path()).startswith("synthetic: ")
    assert "Encoder from: random weights. Best" in read_caption(Path())
    for method in catalogue.METHOD_LABELS:
        write_run(synthetic, method, encoder="../other/encoder_pretraining/seed0/encoder.safetensors")
    assert "Encoder from: other/encoder_pretraining/seed0/encoder.safetensors. Best" in read_caption(synthetic)


def test_the_table_is_printed_and_written(synthetic, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "210")
    assert tables.main([str(synthetic)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 210
    assert not any("…" in line for line in printed)
    for row in read_rows(synthetic):
        assert any(all(part in line for part in row) for line in printed), row
    assert printed[-1] == f"written: {synthetic / 'table.md'}"
    text = (synthetic / "table.md").read_text()
    assert text == tables.render_method_page(load_comparable(synthetic))
    table, caption, findings = text.rstrip().split("\n\n")
    assert caption == read_caption(synthetic)
    assert findings in "\n".join(printed)
    lines = [re.fullmatch(r"\| (.*) \|", line)[1].split(" | ") for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(read_header(synthetic))}
    assert lines[1] == ["---", *["---:"] * (len(lines[0]) - 1)]
    assert lines[2:] == read_rows(synthetic)


def test_table_of_worlds_shows_both_worlds_per_method(tmp_path, capsys):
    assert worlds.main([str(tmp_path)]) == 0
    assert "no finished run of the synthetic dataset" in capsys.readouterr().out
    for number, dataset in enumerate(WORLDS):
        for place, side in enumerate(worlds.SIDES):
            if side.name != "on_device" and (dataset, side.name) != ("synthetic_memory", "cdc_mmpg"):
                write_run(tmp_path / dataset, side.name, value=0.5 + 0.1 * number + 0.01 * place)
    assert worlds.main([str(tmp_path)]) == 0
    assert f"written: {tmp_path / 'worlds.md'}" in capsys.readouterr().out
    header, _, *rows = (tmp_path / "worlds.md").read_text().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "method", "knows", "down, B", "sky: unseen %", "memory: unseen %", "session minus this, points: sky / memory",
    ]  # fmt: skip
    rows_by_label = {row[0]: row[1:] for row in cells}
    assert len(rows_by_label) <= 9
    assert rows_by_label["Session, n = 16"][:4] == ["vcd", "388,388", "56.0 [53.6, 58.3]", "66.0 [63.6, 68.3]"]
    assert rows_by_label["By hand: grey world"][0] == "s"
    assert rows_by_label["CDC-MMPG"][3] == ""  # no run in this world
    text = (tmp_path / "worlds.md").read_text()
    assert "Knows (beyond the training questions and answers): s = the kind of shift; v = " in text
    assert "v = the kind of shift, in training only (virtual devices: training devices seen with other casts)" in text
    assert "One world of each kind and one pretraining" in text
    write_run(tmp_path / "synthetic", "fine_tuning", seed=1)
    assert worlds.main([str(tmp_path)]) == 0
    assert "over 2 seeds, each with its own world and pretraining" in (tmp_path / "worlds.md").read_text()


def test_table_of_three_seeds_fits_in_210_columns(synthetic, capsys):
    for method in catalogue.METHOD_LABELS:
        for seed in range(3):
            write_run(synthetic, method, seed, 0.7 + 0.1 * seed, seconds={"train": 12345.6})
    assert tables.main([str(synthetic)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 210


@pytest.mark.parametrize("width", [80, 120, 210])
def test_table_is_split_into_blocks_on_narrow_terminals(width, synthetic, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for seed in range(3):
        write_run(synthetic, "cdc_mmpg_session", seed, 0.7 + 0.1 * seed)
    assert tables.main([str(synthetic)]) == 0
    printed = capsys.readouterr().out.splitlines()[:-1]
    heads = [line.split() for line in printed if line.startswith(" method ")]
    assert (len(heads) == 1) == (width == 210)
    if width < 210:
        assert max(len(line) for line in printed if not line.startswith("- ")) <= width
    header, *rows = read_header(synthetic), *read_rows(synthetic)
    assert " ".join(header[1:]).split() == [name for head in heads for name in head[1:]]
    for label, *cells in rows:
        lines = [line.removeprefix(f" {label}") for line in printed if line.startswith(f" {label}  ")]
        assert " ".join(cells).split() == " ".join(lines).split()


def test_folder_without_runs_is_an_error_with_a_remedy(tmp_path, capsys):
    assert tables.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "make train" in error
    assert not (tmp_path / "table.md").exists()


def test_run_without_accuracies_is_skipped_with_a_warning(synthetic, capsys, caplog):
    folder = write_run(synthetic, "hyper", seed=1)
    results = json.loads((folder / "results.json").read_text())
    del results["accuracy"]
    (folder / "results.json").write_text(json.dumps(results))
    assert tables.main([str(synthetic)]) == 0
    assert f'{folder / "results.json"} has no "accuracy"' in caplog.text
    assert f"delete {folder} and train anew" in caplog.text
    assert index_rows(synthetic)["F-hyper"]["seeds"] == "1"


def test_unwritable_table_is_an_error(synthetic, capsys):
    (synthetic / "table.md").mkdir()
    assert tables.main([str(synthetic)]) == 1
    assert "table.md: cannot be written" in capsys.readouterr().err


# Comparisons question by question


def build_questions(unseen: int = 12, seen: int = 6, clips: int = 4) -> list[tuple[str, ...]]:
    """Return two questions per clip: clip, device, group, type, question, answer."""
    return [
        (f"{group}{d:03}_{c:02}", f"{group}{d:03}", group, kind, f"what {kind}?", "red" if kind == "color" else "two")
        for group, devices in (("seen", seen), ("unseen", unseen))
        for d in range(devices)
        for c in range(clips)
        for kind in ("color", "count")
    ]


def draw_correct(share: float, name: str, number: int) -> list[bool]:
    """Return whether each question is answered correctly; every ten questions have the same share."""
    generator = np.random.default_rng([ord(letter) for letter in name])
    ranks = np.concatenate([generator.permutation(10) for _ in range(0, number, 10)])[:number]
    return (ranks + 0.5 < 10 * share).tolist()


def write_answers(
    root: Path, method: str, seed: int = 0, cases: dict[str, object] | None = None, devices: bool = True,
    samples: list[tuple[str, ...]] | None = None, **changes: object,
) -> Path:  # fmt: skip
    """Write a finished run with its answers.

    A case is the share of correct answers, or one value per question: correct, wrong, or None if it was not asked.
    """
    samples = samples or build_questions()
    if not devices:
        samples = [(clip, clip, "", "", question, answer) for clip, _, _, _, question, answer in samples]
    correct = {
        case: draw_correct(share, f"{method} {seed} {case}", len(samples)) if isinstance(share, float) else list(share)
        for case, share in (cases or {"own": 0.5}).items()
    }
    accuracy = {}
    for case, values in correct.items():
        rows = [number for number, value in enumerate(values) if value is not None]
        names = [[samples[number][place] for number in rows] for place in range(4)]
        accuracy |= compute_accuracies({case: [values[number] for number in rows]}, *names, draws=200)
    folder = write_run(root, method, seed, devices=devices, accuracy=accuracy, **changes)
    answer_words = {True: lambda answer: answer, False: lambda _: "wrong", None: lambda _: ""}
    with (folder / "predictions.test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "device", "group", "type", "question", "answer", *correct, "right"])
        for number, row in enumerate(samples):
            marks = "".join({True: "r", False: "w", None: "."}[values[number]] for values in correct.values())
            writer.writerow([*row, *(answer_words[values[number]](row[-1]) for values in correct.values()), marks])
    log = folder / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{epoch},{10 * epoch + 9},{0.3 + 0.1 * epoch},\n,{10 * epoch + 9},,0.5\n" for epoch in range(3)]
    log.write_text("epoch,step,val/accuracy,lr\n" + "".join(lines))
    return folder


def write_ranks(root: Path, method: str, ranks: dict[str, dict[str, list[int]]]) -> Path:
    """Write a retrieval run with ranks by case and direction, with two captions per clip."""
    first = next(iter(ranks.values()))
    rows = [("VR", f"clip{i}", "") for i in range(len(first["VR"]))]
    rows += [("TR", f"clip{i // 2}", f"caption {i % 2}") for i in range(len(first["TR"]))]
    kinds = {f"{way}@{k}": np.mean(np.array(first[way]) <= k) for way in ("VR", "TR") for k in (1, 5, 10)}
    accuracy = {case: {"test": {kind: build_cell(float(value)) for kind, value in kinds.items()}} for case in ranks}
    folder = write_run(root, method, devices=False, accuracy=accuracy, floors={}, protocol="full", task="retrieval",
                       median_rank={case: {way: float(np.median(by_way[way])) for way in by_way}
                                    for case, by_way in ranks.items()})  # fmt: skip
    with (folder / "predictions.test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["direction", "clip", "caption", *ranks])
        writer.writerows(
            [*row, *(([*by_way["VR"], *by_way["TR"]])[i] for by_way in ranks.values())] for i, row in enumerate(rows)
        )
    return folder


def test_difference_to_fine_tuning_is_paired_over_common_seeds(tmp_path):
    root = tmp_path / "synthetic"
    samples = build_questions()
    correct = {
        (method, seed): draw_correct(share, f"{method}{seed}", len(samples))
        for method, share, seeds in (("fine_tuning", 0.5, 3), ("cdc_mmpg", 0.7, 2))
        for seed in range(seeds)
    }
    for (method, seed), values in correct.items():
        write_answers(root, method, seed, {"own": values})
    evidence = Evidence(root)
    gain = evidence.compare(Side("cdc_mmpg"), Side("fine_tuning"))
    assert gain.seeds == (0, 1)
    differences = [
        np.mean([float(correct["cdc_mmpg", seed][i]) - correct["fine_tuning", seed][i] for seed in range(2)])
        for i in range(len(samples))
    ]
    clips, devices, groups = ([row[place] for row in samples] for place in range(3))
    unseen = np.array(groups) == "unseen"
    assert gain.value.value == pytest.approx(100 * np.array(differences)[unseen].mean())
    low, high = 100 * bootstrap_by_loops(differences, clips, devices, groups, draws=4000, seed=1)["unseen"]
    assert (gain.low.value, gain.high.value) == pytest.approx((low, high), abs=1.5)
    wide = evidence.cite_accuracy(Side("cdc_mmpg")).facts[0]
    assert wide.how == "mean"
    label, cells = build_method_table(evidence).rows[-1]
    assert label == "CDC-MMPG"
    assert cells[2].text == gain.format().text
    assert re.fullmatch(r"\+\d+\.\d \[[+−]?\d+\.\d, \+\d+\.\d\]", cells[2].text)


def test_questions_are_paired_in_any_order_but_only_if_identical(tmp_path):
    root = tmp_path / "synthetic"
    write_answers(root, "fine_tuning", cases={"own": 0.5})
    folder = write_answers(root, "linear", cases={"own": 0.7})
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


def test_case_with_some_questions_is_compared_on_those(tmp_path):
    root = tmp_path / "synthetic"
    samples = build_questions()
    write_answers(root, "fine_tuning", cases={"own": [True, False] * (len(samples) // 2)})
    partial = [True if row[2] == "unseen" else None for row in samples]
    write_answers(root, "on_device", cases={"own": 0.5, "labels_2": partial})
    gain = Evidence(root).compare(Side("on_device", "labels_2"), Side("fine_tuning"))
    assert gain.value.value == pytest.approx(50)


def test_recalls_are_paired_and_weigh_both_directions_equally(tmp_path):
    root = tmp_path / "msrvtt_retrieval"
    write_ranks(root, "fine_tuning", {"own": {"VR": [1, 20, 3], "TR": [1, 1, 20, 20, 7, 7]}})
    write_ranks(
        root, "cdc_mmpg", {"own": {"VR": [1, 1, 1], "TR": [1] * 6}, "shuffled": {"VR": [50] * 3, "TR": [50] * 6}}
    )
    evidence = Evidence(root)
    mean_recall = np.mean([1 / 3, 2 / 3, 2 / 3, 2 / 6, 2 / 6, 4 / 6])
    gain = evidence.compare(Side("cdc_mmpg"), Side("fine_tuning"))
    assert gain.value.value == pytest.approx(100 * (1 - mean_recall))
    assert evidence.compare(Side("cdc_mmpg"), Side("cdc_mmpg", "shuffled")).value.value == pytest.approx(100)
    form = build_paper_table(evidence)
    assert form.title == "Table 3 of the paper: msrvtt_retrieval"
    assert form.header[:5] == ["method", "VR@1", "paper", "VR@5", "paper"]
    by_name = {label: [cell.text for cell in cells] for label, cells in form.rows}
    assert by_name["CDC-MMPG"][:4] == ["100.0", "6.6", "100.0", "21.3 †"]
    assert by_name["Fine-tuning"][:2] == ["33.3", "4.8"]
    assert by_name["F-linear"][:2] == ["not run", "2.0"]  # listed with its command
    assert "Split inference: the cloud answers (computed)" not in by_name
    assert build_frames_table(evidence) is None
    assert tables.main([str(root), "--paper"]) == 0


@pytest.mark.parametrize(
    ("shuffled", "mean_head", "sentence"),
    [
        (0.7, 0.7, "CDC-MMPG: using another sample's anchor makes no significant difference ({}): no sign that the "
                   "adaptation is used."),
        (0.2, 0.7, "CDC-MMPG: using another sample's anchor costs {}: its head depends on what was uploaded."),
        (0.97, 0.2, "CDC-MMPG: using another sample's anchor is better (own minus control: {}): no sign that the "
                    "adaptation is used, and adapting may do harm."),
    ],
)  # fmt: skip
def test_findings_on_controls_follow_the_sign_of_the_difference(shuffled, mean_head, sentence, tmp_path):
    root = tmp_path / "synthetic"
    write_answers(root, "cdc_mmpg", cases={"own": 0.7, "shuffled": shuffled, "mean_head": mean_head})
    evidence = Evidence(root)
    points = evidence.compare(Side("cdc_mmpg"), Side("cdc_mmpg", "shuffled")).format_points().text
    sentences = [text.text for text in list_findings(evidence)]
    assert sentence.format(points) in sentences
    (verdict,) = (text for text in sentences if text.startswith("CDC-MMPG: using one mean head for all inputs "))
    assert (" makes no significant difference (" in verdict) == (mean_head == 0.7)
    assert ("one shared head would be enough" in verdict) == (mean_head == 0.7)
    assert (" costs " in verdict) == ("individual heads help" in verdict) == (mean_head == 0.2)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.97, "improves on fine-tuning"), (0.2, "is worse than fine-tuning"),
     (0.6, "does not differ significantly from fine-tuning")],
)  # fmt: skip
def test_findings_on_adaptation_follow_the_sign_of_the_difference(share, verdict, tmp_path):
    root = tmp_path / "synthetic"
    write_answers(root, "fine_tuning", cases={"own": 0.6})
    write_answers(root, "cdc_mmpg", cases={"own": share, "bypassed": share})
    write_answers(root, "fine_tuning_virtual", cases={"own": 0.6})
    write_answers(root, "cdc_mmpg_virtual", cases={"own": share})
    write_answers(root, "cdc_mmpg_session", cases={"n16": share, "shuffled_n16": 0.1})
    sentences = [text.text for text in list_findings(Evidence(root))]
    assert sum(text.startswith(f"Per-sample adaptation (CDC-MMPG) {verdict}: ") for text in sentences) == 1
    assert sum(text.startswith(f"Per-session adaptation (Session, n = 16) {verdict}: ") for text in sentences) == 1
    virtual = f"Per-sample adaptation (CDC-MMPG, virtual devices) {verdict} with the same virtual devices: "
    assert sum(text.startswith(virtual) for text in sentences) == 1
    assert any(text.startswith("The reasoner (ADR) makes no significant difference in CDC-MMPG") for text in sentences)


def test_smallest_payload_within_0_2_points_is_found(tmp_path):
    root = tmp_path / "synthetic"
    samples = build_questions(unseen=150)
    last = len(samples) - 1  # of 1,200 on unseen devices, two are 0.17 points, three 0.25
    missed = {"n16": 0, "float32": 0, "int8": 2, "int4": 3}
    cases = {case: [last - number >= limit for number in range(len(samples))] for case, limit in missed.items()}
    sizes = {"float32": {"bytes": 1824}, "int8": {"bytes": 484}, "int4": {"bytes": 258}}
    write_answers(
        root, "cdc_mmpg_session", cases=cases, samples=samples, payloads=sizes, bytes={"up": 768, "down": 1824}
    )
    write_answers(root, "cdc_mmpg_session_full", samples=samples, bytes={"up": 768, "down": 6596})
    evidence = Evidence(root)
    smallest, largest = find_equal_payloads(evidence)
    assert (smallest.bytes.value, largest.bytes.value) == (484, 1824)
    assert list_claims(evidence)[-1].text.startswith("484 bytes per session are enough (Session, n = 16, int8): 99.8 %")
    rows = dict(build_payload_table(evidence).rows)
    assert [cell.text for cell in rows["Session, n = 16, int4"][:3]] == ["session", "258", "390"]
    assert list(rows)[-1] == "Session, full layer"


def test_paper_tables_show_measured_and_published_figures(tmp_path):
    root = tmp_path / "msvd"
    write_answers(root, "fine_tuning", devices=False)
    parameters = {"device": 11_546_921, "cloud": 46_542_537, "trained": 7}
    write_answers(root, "cdc_mmpg", devices=False, reasoner="paper_qa", parameters=parameters)
    write_answers(root, "cdc_mmpg.frames2", devices=False, seconds={"train": 80.0, "test": 1.0})
    write_answers(root, "hyper", devices=False, bytes={"up": 768, "down": 388_388})
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
    download = next(row for row in sixth.texts() if row[0].startswith("Download per sample"))
    assert download[1:] == ["388,388", "388,520", "74.08", "24.69", "7.41", "3.70", "379.4", "3.71"]
    upload = sixth.texts()[0]
    assert upload[1:] == ["768", "836", "0.146", "0.0488", "0.0146", "0.00732", "0.75", "0.007"]


def test_tables_of_the_reasoner_study_and_the_privacy_probes(tmp_path):
    root = tmp_path / "synthetic"
    for seed in range(2):
        write_answers(root, "cdc_mmpg_frozen.batch_global", seed, {"own": 0.9, "bypassed": 0.4})
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
    assert any("The reasoner helps in some interpretations of the" in text.text for text in list_findings(evidence))
    assert build_privacy_table(evidence).texts() == [
        ["the hue, from the mean of 16", "20.5 [18.0, 23.0]", "degrees off", "90.0", "95.0", "48"],
        ["the device, from one anchor", "40.0", "% right", "", "", ""],
    ]


def test_spread_table_shows_tenth_percentile_and_calibration_error(tmp_path):
    root = tmp_path / "synthetic"
    for seed, percentile in enumerate((0.4, 0.5)):
        measured = {"tenth_percentile": {"own": {"unseen": percentile}}, "calibration_error": {"own": {"unseen": 0.04}}}
        write_answers(root, "fine_tuning", seed, {"own": 0.6}, **measured)
    write_answers(root, "linear", 0, {"own": 0.6})  # as earlier versions wrote it
    table = build_spread_table(Evidence(root))
    assert [row[0] for row in table.texts()] == ["Fine-tuning"]
    assert table.texts()[0][2:] == ["45.0", "4.0"]
    assert build_spread_table(Evidence(tmp_path / "nothing")) is None


def test_a_variant_is_compared_with_its_method(tmp_path):
    root = tmp_path / "synthetic"
    samples = build_questions(unseen=30)
    in_arc = [(*row[:2], "arc", *row[3:]) if row[2] == "unseen" and int(row[1][-1]) % 2 else row for row in samples]
    write_answers(root, "cdc_mmpg_session", cases={"n16": 0.9}, samples=samples)
    write_answers(root, "cdc_mmpg_session.arc90", cases={"n16": 0.7}, samples=in_arc)
    write_answers(root, "linear.devices24", cases={"own": 0.5}, samples=samples)
    evidence = Evidence(root)
    rows = dict(build_variants_table(evidence).rows)
    assert list(rows) == ["Session, n = 16: a quarter of the casts held out", "F-linear: 24 devices train"]
    texts = [cell.text for cell in rows["Session, n = 16: a quarter of the casts held out"]]
    outside, gain, arc, gain_in_arc, seeds = texts
    assert outside
    assert arc
    assert gain.startswith("−")  # on questions outside the arc, of devices unseen in both runs
    assert gain_in_arc.startswith("−")
    assert seeds == "1"
    assert rows["F-linear: 24 devices train"][1].text == ""  # the run with all devices is missing
    assert evidence.groups == ["unseen", "seen"]  # the other tables have no column for the arc
    assert build_variants_table(Evidence(tmp_path / "nothing")) is None


def test_a_deeper_encoder_gives_the_accuracy_of_split_inference(tmp_path):
    root = tmp_path / "synthetic"
    write_answers(root, "fine_tuning", cases={"own": 0.5})
    parameters = {"device": 2_900_000, "cloud": 0, "trained": 7}
    write_answers(root, "fine_tuning.depth6", cases={"own": 0.9}, parameters=parameters)
    evidence = Evidence(root)
    table = build_paper_table(evidence)
    split = dict(zip(table.header[1:], dict(table.rows)["Split inference: 6 layers in the cloud, from the frames"],
                     strict=True))  # fmt: skip
    texts = {name: cell.text for name, cell in split.items()}
    assert texts["unseen %"] == evidence.cite_accuracy(Side("fine_tuning.depth6")).text
    assert texts["vs fine-tuning"].startswith("+")
    assert (texts["D-Param"], texts["C-Param"]) == ("0", "2,900,000")
    assert (texts["bytes up"], texts["bytes down"]) == (f"{3 * 64 * 64 * 3:,}", "2")


def test_missing_runs_are_listed_with_their_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = Path("checkpoints") / "msvd"
    for seed in range(2):
        write_answers(root, "linear", seed, devices=False, encoder="all-in-one-ti.ckpt")
    write_answers(root, "fine_tuning", 0, devices=False, encoder="all-in-one-ti.ckpt")
    write_answers(Path("checkpoints") / "synthetic", "linear")
    write_answers(
        Path("checkpoints") / "synthetic", "cdc_mmpg_frozen.batch_anchor", cases={"own": 0.5, "bypassed": 0.5}
    )
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


# The paper's figures, their footnotes, and what is left out


def list_notes(table):
    return [note.text for note in table.notes]


@pytest.mark.parametrize(
    ("dataset", "task", "signed", "noted"),
    [
        ("tgif", "open_ended", {"F-hyper": "18.7M §", "CDC-MMPG": "46.5M §", "F-linear": "60000"},
         ["same value as for MSVD; with TGIF's 1,541 answers, F-hyper has 28,849,061 parameters", "TGIF-QA's FrameQA",
          "nominal: the paper sets it for a fine-tuning, not measured"]),
        ("msrvtt_choice", "multiple_choice", {"F-linear": "3.58 †", "F-hyper": "5.70"},
         ["below chance, which is 20 %", "same value as for TGIF; the 772 bytes of this layer take 0.00736 ms"]),
    ],
)  # fmt: skip
def test_errors_in_the_paper_are_marked_by_footnotes(dataset, task, signed, noted, tmp_path):
    write_answers(tmp_path / dataset, "fine_tuning", devices=False, task=task)
    evidence = Evidence(tmp_path / dataset)
    form = build_paper_table(evidence)
    rows = {label: [entry.text for entry in cells] for label, cells in form.rows}
    for label, text in signed.items():
        assert any(entry.startswith(text) for entry in rows[label]), rows[label]
    for text in noted:
        (note,) = (entry for entry in list_notes(form) if text in entry)
        assert any(f" {note[0]}" in entry for cells in rows.values() for entry in cells)  # its sign is in the table
    assert len(FOOTNOTE_SIGNS) >= len(form.notes) - 3
    if dataset == "tgif":
        assert any("TGIF-QA's FrameQA" in entry for entry in list_notes(build_frames_table(evidence)))
        assert any("TGIF-QA's FrameQA" in entry for entry in list_notes(build_method_table(evidence)))


def test_published_figures_are_omitted_for_truncated_annotation_files(tmp_path, capsys):
    root = tmp_path / "msrvtt"
    rows = [{"split": "test", "what": "questions", "published": 72_821, "here": 53, "same": False, "edition": ""},
            {"split": "train", "what": "questions", "published": 158_581, "here": 158_581, "same": True}]  # fmt: skip
    write_answers(root, "fine_tuning", devices=False, published=rows)
    evidence = Evidence(root)
    for table in (build_paper_table(evidence), build_frames_table(evidence)):
        assert not any("paper" in name for name in table.header)
    assert [cells[1] for _, cells in build_method_table(evidence).rows] == [NO_TEXT] * 3
    notice = "Not the published files (test: 53 of 72,821 questions), so published figures are left out."
    assert notice in list_notes(build_paper_table(evidence))
    assert notice in read_caption(root)
    rows[0] |= {"here": 72_821, "same": True}
    write_answers(root, "fine_tuning", devices=False, published=rows)
    assert dict(build_paper_table(Evidence(root)).rows)["Fine-tuning"][1].text == "36.7"
    assert "Not the published files" not in read_caption(root)


@pytest.mark.parametrize(("share", "has_findings"), [(0.0, False), (0.3, False), (0.7, True)])
def test_runs_at_or_below_the_majority_baseline_give_no_findings(share, has_findings, tmp_path):
    root = tmp_path / "synthetic"
    floors = {"majority": {"unseen": {"all": build_cell(0.5)}}}
    cases = {"own": share, "shuffled": share, "bypassed": share, "mean_head": share}
    write_answers(root, "fine_tuning", cases={"own": share}, floors=floors)
    write_answers(root, "cdc_mmpg", cases=cases, floors=floors)
    write_answers(root, "on_device", cases={"own": share, "tent": share}, floors=floors)
    sizes = {"int8": {"bytes": 484}}
    write_answers(root, "cdc_mmpg_session", cases={"n16": share, "int8": share}, floors=floors, payloads=sizes)
    write_answers(root, "cdc_mmpg_frozen.batch_global", cases=cases, floors=floors)
    assert bool(list_findings(Evidence(root))) == has_findings


def test_run_below_the_majority_baseline_is_compared_with_one_above_it(tmp_path):
    root = tmp_path / "synthetic"
    floors = {"majority": {"unseen": {"all": build_cell(0.4)}}}
    write_answers(root, "fine_tuning", cases={"own": 0.9}, floors=floors)
    write_answers(root, "cdc_mmpg", cases={"own": 0.2, "shuffled": 0.2}, floors=floors)
    (sentence,) = (text.text for text in list_findings(Evidence(root)))
    assert sentence.startswith("Per-sample adaptation (CDC-MMPG) is worse than fine-tuning")


# Damaged or incomplete results


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"accuracy": {"own": {"test": {"all": {"value": NaN}}}}}',
        '{"accuracy": {"own": {"test": {"all": {"value": 0.5}}}}}', '{"accuracy": {"own": 0.5}}',
        '{"metrics": 3, "accuracy": {}}', '{"floors": {"majority": {"test": []}}}', '{"seed": "0"}',
        '{"published": {"test": 3}}', '{"metrics": {"val/accuracy": 1e999}}', '{"splits": ["a"]}', '{"commit": 5}',
    ],
)  # fmt: skip
def test_damaged_results_are_skipped_with_a_warning(damage, tmp_path, caplog):
    root = tmp_path / "synthetic"
    write_answers(root, "linear")
    folder = write_answers(root, "fine_tuning")
    (folder / "results.json").write_text(damage)
    for arguments in ([str(root)], [str(root), "--paper"]):
        caplog.clear()
        assert tables.main(arguments) == 0
        assert f"{folder / 'results.json'}: cannot be used (" in caplog.text
    assert "Fine-tuning" not in index_rows(root)


KEYS = ["dataset", "method", "seed", "monitor", "protocol", "splits", "metrics", "best_epoch", "epochs", "questions",
        "data", "encoder", "parameters", "bytes", "seconds", "commit", "floors"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_results_without_a_key_still_give_a_row(key, tmp_path):
    for number, value in enumerate(("absent", None)):
        root = tmp_path / str(number) / "synthetic"
        folder = write_answers(root, "fine_tuning")
        results = json.loads((folder / "results.json").read_text())
        results.pop(key)
        (folder / "results.json").write_text(json.dumps(results | ({} if value == "absent" else {key: value})))
        assert tables.main([str(root)]) == 0
        assert tables.main([str(root), "--paper"]) == 0
        assert "Fine-tuning" in index_rows(root)


@pytest.mark.parametrize(
    "damage",
    ["", "\n", "clip,device\n", "direction,clip,caption,own\nVR,a,,x\n", "a,b\n1,2\n",
     "clip,device,group,type,question,answer,own,right\na,a,,,q,red,red,x\n",
     "clip,device,group,type,question,answer,own,right\na,a,,,q,red,red,\n",
     "clip,device,group,type,question,answer,own\na,a,,,q,red,red\n",
     "clip,device,group,type,question,answer,right\na,a,,,q,red,\n"],
)  # fmt: skip
def test_damaged_table_of_answers_omits_only_the_differences(damage, tmp_path, caplog):
    root = tmp_path / "synthetic"
    write_answers(root, "fine_tuning")
    folder = write_answers(root, "linear")
    (folder / "predictions.test.csv").write_text(damage)
    assert tables.main([str(root), "--paper"]) == 0
    assert f"{folder / 'predictions.test.csv'}: cannot be used (" in caplog.text
    assert index_rows(root)["F-linear"]["vs fine-tuning"] == ""
    assert f"delete {folder} and train anew: it has no" in (root / "tables.md").read_text()


def test_answers_without_marks_are_used_if_words_and_labels_agree(tmp_path, caplog):
    root = tmp_path / "synthetic"
    write_answers(root, "fine_tuning")
    folder = write_answers(root, "linear", cases={"own": 0.7})
    gain = Evidence(root).compare(Side("linear"), Side("fine_tuning"))
    path = folder / "predictions.test.csv"
    path.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in path.read_text().splitlines()))
    assert Evidence(root).compare(Side("linear"), Side("fine_tuning")).value.value == gain.value.value
    path.write_text(path.read_text().replace("wrong", "red"))  # equal candidates: more words than labels are correct
    assert Evidence(root).compare(Side("linear"), Side("fine_tuning")) is None
    assert "right words and right labels differ in own" in caplog.text


def test_unknown_method_has_a_row(tmp_path, capsys):
    root = tmp_path / "synthetic"
    write_answers(root, "fine_tuning", cases={"own": 0.5})
    write_answers(root, "my_method", cases={"own": 0.9})
    write_answers(root, "fine_tuning.frames5")
    assert [label for label in index_rows(root) if "Majority" not in label] == ["Fine-tuning", "my_method"]
    assert tables.main([str(root), "--paper"]) == 0
    assert "my_method" in dict(build_paper_table(Evidence(root)).rows)
    assert Evidence(root).find_seeds(["my_method"]) == [0]


def test_markup_and_control_characters_in_names_are_escaped(tmp_path, capsys):
    root = tmp_path / "[bold]a[" / "[/x] \x1b[31m|b"
    types = {"test": {"all": build_cell(0.5), "[/what]": build_cell(0.4), "a|b\nc": build_cell(0.3)}}
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


# Missing runs


def test_nothing_is_missing_after_make_tables(tmp_path):
    listing = subprocess.run(["make", "-n", "tables", f"OUT={tmp_path}"], capture_output=True, text=True, check=True)
    fits = re.findall(r'default_root_dir="?[^ "]*/synthetic/([\w.]+)/seed(\d+)', listing.stdout)
    controls = re.findall(r"-m cdc_mmpg (on_device|prompts|privacy) \S*/seed(\d+)", listing.stdout)
    trained = sorted({(name, int(seed)) for name, seed in (*fits, *controls)})
    assert len({name for name, _ in trained}) == 74
    for name, seed in trained:
        changes = {"accuracy": {}} if name.partition(".")[0] in ("encoder_pretraining", "privacy") else {}
        if not name.startswith("adr_"):
            write_run(tmp_path / "synthetic", name, seed, **changes)
    evidence = Evidence(tmp_path / "synthetic")
    assert [title for title, _ in find_missing(evidence)] == ["answers by question, needed for the differences"]
    removed = [("fine_tuning", 2), ("fine_tuning.frames4", 0), ("hyper", 0), ("cdc_mmpg_session", 1), ("privacy", 0),
             ("cdc_mmpg_frozen.group8_anchor", 3), ("on_device", 0), ("session_oracle", 2),
             ("linear.devices24", 0), ("cdc_mmpg_session.no_background", 0), ("prompts", 0)]  # fmt: skip
    for name, seed in removed:
        assert (name, seed) in trained
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


def test_rows_of_the_frames_table_use_common_seeds(tmp_path):
    root = tmp_path / "synthetic"
    for seed in range(3):
        write_answers(root, "fine_tuning", seed, cases={"own": 0.5 + 0.1 * seed})
        write_answers(root, "cdc_mmpg", seed)
    write_answers(root, "fine_tuning.frames2", 1)
    table = build_frames_table(Evidence(root))
    assert table.header == ["frames", "Fine-tuning %", "s / epoch"]
    three = dict(table.rows)["3"][0]
    assert [source.split("/")[1] for source in three.facts[0].sources] == ["seed1"]


@pytest.mark.parametrize("name", ["table.md", "tables.md"])
def test_full_disk_keeps_the_old_table_and_prints_the_new_one(name, tmp_path, capsys, monkeypatch):
    root = tmp_path / "synthetic"
    write_run(root, "linear")
    (root / name).write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert tables.main([str(root), *(["--paper"] if name == "tables.md" else [])]) == 1
    output = capsys.readouterr()
    assert f"{root / name}: cannot be written (No space left on device)" in output.err
    assert "F-linear" in output.out
    assert "written" not in output.out
    assert (root / name).read_text() == "old"
    assert sorted(path.name for path in root.iterdir()) == ["linear", name]
