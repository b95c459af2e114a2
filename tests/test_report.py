"""Report page: self-contained and accessible; every figure on it can be recomputed from the files of the runs."""

import csv
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
from test_figures import write_video
from test_tables import build_questions, write_answers, write_ranks

from cdc_mmpg.evaluation.metrics import compute_accuracies
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.report import page as report
from cdc_mmpg.report.examples import EXAMPLES_PER_KIND, choose_examples

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
SESSION_CASES = {"n16": 0.9, "n8": 0.8, "n1": 0.6, "n0": 0.5, "shuffled_n16": 0.5, "float32": 0.9, "int8": 0.9}
SIZES = {"float32": {"bytes": 1824}, "int8": {"bytes": 484}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Write one run of every kind, most of them with two seeds."""
    root = tmp_path_factory.mktemp("runs") / "synthetic"
    provenance = {
        "machine": "2 processors, Linux x86_64", "devices": "1 x cpu", "finished": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.11.7", "numpy": "2.4.6"},
    }  # fmt: skip
    for seed in range(2):
        for method, cases in {
            "linear": {"own": 0.55}, "fine_tuning": {"own": 0.6},
            "cdc_mmpg": {"own": 0.6, "shuffled": 0.6, "shuffled_device": 0.3, "bypassed": 0.6, "int8": 0.5},
            "session_concatenated": {"n16": 0.7}, "cdc_mmpg_frozen.batch_global": {"own": 0.6, "bypassed": 0.4},
        }.items():  # fmt: skip
            write_answers(
                root, method, seed, cases, payloads={"int8": {"bytes": 1683}} if "int8" in cases else {}, **provenance
            )
        write_answers(
            root, "cdc_mmpg_session", seed, SESSION_CASES, payloads=SIZES, bytes={"up": 768, "down": 484}, **provenance
        )
    spread = {key: {"own": {"unseen": 0.31}} for key in ("tenth_percentile", "calibration_error")}
    write_answers(root, "hyper", 0, {"own": 0.5, "mean_head": 0.5}, **provenance, **spread)
    write_answers(root, "linear.devices12", 0, {"own": 0.4}, **provenance)
    arc_questions = [(*row[:2], "arc", *row[3:]) if row[1].endswith("1") else row for row in build_questions()]
    write_answers(root, "cdc_mmpg_session.arc90", 0, {"n16": 0.8}, samples=arc_questions, **provenance)
    write_answers(root, "cdc_mmpg.frames2", 0, **provenance)
    labelled_outcomes = [None if row[2] == "seen" else row[3] == "color" for row in build_questions()]
    write_answers(root, "on_device", 0, {"own": 0.6, "tent": 0.6, "labels_15": labelled_outcomes}, **provenance)
    probes = [{"what": "the hue", "from": "16 anchors", "degrees": 20.5, "low": 18.0, "high": 23.0, "chance": 90.0,
               "number": 48}, {"what": "a shape", "from": "1 anchor", "accuracy": 0.41, "chance": 0.25}]  # fmt: skip
    folder = root / "privacy" / "seed0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"probes": probes, "seed": 0}))
    return root


class Reader(HTMLParser):
    """Parser of the cells and figures of a page; fails where tags do not match."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.figures: list[str] = []  # the text of every <data>
        self.loose: list[str] = []  # texts of table cells outside <data>
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open[-1:] == ["data"]:
            self.figures.append(data)
        elif "td" in self.open:
            self.loose.append(data)


def build_report(root: Path, **arguments) -> tuple[str, Reader, dict]:
    assert report.main([str(root), *(f"--{name}={value}" for name, value in arguments.items())]) == 0
    html = (root / "report.html").read_text()
    return html, Reader(html), json.loads((root / "report.json").read_text())


# Recomputing every figure


def follow_pointer(content, pointer):
    for key in pointer.removeprefix("/").split("/"):
        name = key.replace("~1", "/").replace("~0", "~")
        content = content[int(name) if isinstance(content, list) else name]
    return content


def resolve(root, source):
    """Return the single value at a source, `file#pointer` or `module#name`."""
    place, _, pointer = source.partition("#")
    if "/" not in place:
        module = importlib.import_module(place)
        return follow_pointer(module.PRINTED, pointer) if pointer.startswith("/") else getattr(module, pointer)
    return follow_pointer(json.loads((root / place).read_text()), pointer)


def read_column(root, source):
    """Return a column of a log, by epoch."""
    place, _, name = source.partition("#")
    with (root / place).open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def read_answers(root, source, entry):
    """Return whether each question of the entry was answered correctly (1.0 or 0.0), by question."""
    place, _, case = source.partition("#")
    correct = {}
    with (root / place).open(newline="") as file:
        reader = csv.DictReader(file)
        position = reader.fieldnames.index(case) - 6
        for row in reader:
            is_asked = entry.get("group", "test") in ("test", row["group"]) and row[case]
            if is_asked and entry.get("device", row["device"]) == row["device"]:
                key = tuple(row[name] for name in ("clip", "device", "group", "type", "question", "answer"))
                correct[key] = float(row["right"][position] == "r")
    return correct


def compute_differences(root, entry):
    """Return the differences by question, averaged over seeds; groups are those of the first run."""

    def drop_group(key):
        return key[:2] + key[3:]

    ungrouped_entry = {name: value for name, value in entry.items() if name != "group"}
    pairs = [
        (read_answers(root, a, entry),
         {drop_group(key): value for key, value in read_answers(root, b, ungrouped_entry).items()})
        for a, b in zip(entry["sources"], entry["minus"], strict=True)
    ]  # fmt: skip
    shared = [key for key in pairs[0][0] if drop_group(key) in pairs[0][1]]
    return {key: mean(a[key] - b[drop_group(key)] for a, b in pairs) for key in shared}


def recompute(root, entry):  # noqa: PLR0911  one return per kind of figure
    """Return the value of an entry, recomputed from its sources."""
    how, sources = entry["how"], entry["sources"]
    if how == "column":
        return [100 * value for value in read_column(root, sources[0])]
    if how == "count":
        return len([resolve(root, source) for source in sources])
    if how == "share":
        return 100 * mean(mean(read_answers(root, source, entry).values()) for source in sources)
    if how in ("difference", "low", "high", "right only here", "devices better"):
        by_question = compute_differences(root, entry)
        if how == "right only here":
            return sum(value > 0 for value in by_question.values())
        if how == "devices better":
            by_device = {}
            for key, value in by_question.items():
                by_device.setdefault(key[1], []).append(value)
            return sum(mean(values) > 0 for values in by_device.values())
        if how == "difference":
            return 100 * mean(by_question.values())
        by_question = compute_differences(root, entry | {"group": "test"})  # draws are of all groups
        clips, devices, groups = ([key[place] for key in by_question] for place in range(3))
        intervals = compute_accuracies(
            {"": list(by_question.values())}, clips, devices, groups, [""] * len(by_question)
        )
        return 100 * intervals[""][entry["group"]]["all"][how]
    values = [resolve(root, source) for source in sources]
    if how == "value" and isinstance(values[0], str):
        return values[0]
    if "over" in entry:
        values = [value / resolve(root, denominator) for value, denominator in zip(values, entry["over"], strict=True)]
    values = [entry.get("times", 1) * (value + entry.get("plus", 0)) for value in values]
    if how == "delay":
        return 1000 * values[0] / (entry["rate"] * 1024 * 1024)
    functions = {"value": lambda items: items[0], "mean": mean, "stdev": stdev, "least": min, "most": max, "sum": sum}
    assert how != "value" or len(values) == 1
    return functions[how](values)


def test_every_figure_can_be_recomputed_from_the_runs(runs):
    _, page, entries = build_report(runs)
    assert len(entries) > 400
    kinds = {entry["how"] for entry in entries.values()}
    assert kinds == {"value", "mean", "stdev", "least", "most", "sum", "count", "delay", "column", "share",
                     "difference", "low", "high", "right only here", "devices better"}  # fmt: skip
    for name, entry in entries.items():
        recomputed = recompute(runs, entry)
        assert recomputed == (
            entry["value"] if isinstance(recomputed, str) else pytest.approx(entry["value"], abs=1e-6)
        ), name
        if isinstance(recomputed, str):
            assert recomputed.startswith(entry["shown"]), name
        elif entry["how"] != "column":
            digits = len(entry["shown"].partition(".")[2])
            shown = float(entry["shown"].replace(",", "").replace("−", "-"))
            assert shown == pytest.approx(recomputed, abs=0.51 * 10**-digits), name
    shown = {entry["shown"] for entry in entries.values()}
    assert set(page.figures) <= shown
    assert len(page.figures) > 400
    assert not [text for text in page.loose if NUMBER.search(text)], "a number in a table that is no figure"


def test_figures_of_the_other_world_can_be_recomputed_from_its_folder(runs, tmp_path, monkeypatch):
    root = shutil.copytree(runs, tmp_path / "synthetic")
    other = tmp_path / "synthetic_memory"
    shutil.copytree(runs / "fine_tuning", other / "fine_tuning")
    monkeypatch.chdir(root)  # the folder may be given as "."
    entries = build_report(Path())[2]
    quoted = {name: entry for name, entry in entries.items() if entry["sources"][0].startswith("../synthetic_memory/")}
    assert quoted.keys() == {"worlds/Fine-tuning/memory: unseen %/0", "worlds/Fine-tuning/memory: unseen %/1"}
    for entry in quoted.values():
        assert recompute(root, entry) == pytest.approx(entry["value"], abs=1e-6)


def test_a_wrong_figure_would_be_noticed(runs):
    _, _, entries = build_report(runs)
    for name, entry in entries.items():
        if name.startswith("session_gain_points"):
            other_sources = [re.sub(r"cdc_mmpg_session(.*)n16", r"linear\1own", source) for source in entry["sources"]]
            assert recompute(runs, entry | {"sources": other_sources}) != pytest.approx(entry["value"], abs=1)
    for how in ("mean", "delay"):
        entry = next(candidate for candidate in entries.values() if candidate["how"] == how and candidate["value"])
        assert recompute(runs, entry | {"times": 3}) != pytest.approx(entry["value"])


def test_the_session_gain_and_the_bytes_match_the_evidence(runs):
    _, _, entries = build_report(runs)
    gain = entries["session_gain_points"]
    comparison = Evidence(runs).compare(Side("cdc_mmpg_session"), Side("fine_tuning"))
    assert (gain["value"], gain["low"], gain["high"]) == (
        comparison.value.value,
        comparison.low.value,
        comparison.high.value,
    )
    assert gain["low"] < gain["value"] < gain["high"]
    assert gain["value"] == pytest.approx(mean(gain["seeds"].values()))
    assert gain["sources"] == [f"cdc_mmpg_session/seed{seed}/predictions.test.csv#n16" for seed in range(2)]
    assert gain["minus"] == [f"fine_tuning/seed{seed}/predictions.test.csv#own" for seed in range(2)]
    assert entries["session_gain_points/seed1"]["value"] == gain["seeds"]["1"]
    least = entries["bytes_at_equal_accuracy"]
    best = least["best"]
    assert least["value"] in (484, 1824)
    assert least["accuracy"] >= best["accuracy"] - 0.2
    assert entries["bytes_at_equal_accuracy/best/bytes"]["value"] == best["bytes"] >= least["value"]


def test_the_page_is_self_contained_and_accessible(runs):
    html, page, _ = build_report(runs)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", html)
    assert len(html) < 3_000_000
    tags = [tag for tag, _ in page.attributes]
    assert [tags.count(tag) for tag in ("h1", "main", "nav", "body")] == [1, 1, 1, 1]
    assert ("html", {"lang": "en"}) in page.attributes
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.attributes
    for tag, attributes in page.attributes:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "img":
            assert attributes["alt"]
        if tag == "a":
            assert ("section", {"id": attributes["href"].removeprefix("#")}) in page.attributes
    assert tags.count("table") == tags.count("caption") == tags.count("thead")
    for text in (
        "Accuracy and bytes",
        "Device by device",
        "Training",
        "Where the time goes",
        "What is missing",
        "Does the reasoner (ADR) help?",
        "Privacy: what a probe reads from the upload",
        "In the layout of the paper's table 6",
    ):
        assert any(part.startswith(text) for part in page.text), text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", html.lower())


def test_the_page_states_the_findings(runs):
    _, page, _ = build_report(runs)
    text = "".join(page.text)
    assert "Per-sample adaptation (CDC-MMPG) does not differ significantly from fine-tuning" in text
    assert "Per-session adaptation (Session, n = 16) improves on fine-tuning: " in text
    pattern = r"CDC-MMPG: using another sample's anchor makes no significant difference \([^.]*\.\d[^:]*: no sign that"
    assert re.search(pattern + r" the adaptation is used\.", text)
    assert "make train DATASET=synthetic METHOD=session_oracle SEEDS=2" in text


def test_examples_are_chosen_by_a_rule_and_shown(runs, tmp_path):
    data = tmp_path / "data"
    (data / "somewhere").mkdir(parents=True)
    a, b = (Evidence(runs).find_runs(name)[0] for name in ("cdc_mmpg_session", "fine_tuning"))
    helped, hurt = choose_examples(a, "n16", b, "own", "unseen")
    assert len(helped) == EXAMPLES_PER_KIND
    for examples, better in ((helped, True), (hurt, False)):
        assert len({example.device for example in examples}) == len(examples)
        assert all(example.device.startswith("unseen") for example in examples)
        assert all(
            (example.adapted == example.answer) == better != (example.static == example.answer) for example in examples
        )
    assert [example.device for example in helped] == sorted(example.device for example in helped)
    write_video(data / "somewhere" / f"{helped[0].clip}.mp4", 80)
    damaged = next(example.clip for example in hurt if example.clip != helped[0].clip)
    (data / "somewhere" / f"{damaged}.mp4").write_bytes(b"damaged")
    html, page, entries = build_report(runs, data=data)
    pictures = [attributes for tag, attributes in page.attributes if tag == "img"]
    clips = {example.clip for example in (*helped, *hurt)}
    assert {re.search("clip (.*),", picture["alt"])[1] for picture in pictures} == {helped[0].clip} <= clips
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in pictures)
    assert "Clips are not shown" not in html
    correct_counts = [entries[f"examples/numbers/{number}"]["value"] for number in range(2)]
    unseen = 96
    gain = entries["session_gain_points/seed0"]["value"]
    assert correct_counts[0] - correct_counts[1] == pytest.approx(gain * unseen / 100)


def test_a_resumed_run_is_one_curve(runs):
    run = Evidence(runs).find_runs("linear")[0]
    log = run.path / "logs" / "version_1" / "metrics.csv"
    log.parent.mkdir()
    log.write_text("epoch,step,val/accuracy\n2,29,0.9\n3,39,0.95\n")
    try:
        _, _, entries = build_report(runs)
    finally:
        log.unlink()
        log.parent.rmdir()
    entry = entries["plots/curves/linear"]
    assert entry["value"] == pytest.approx([30, 40, 90, 95])
    assert entry["epochs"] == [0, 1, 2, 3]
    assert [source.split("/")[3] for source in entry["sources"]] == ["version_0", "version_1"]


@pytest.mark.parametrize("dataset", ["msvd", "msrvtt_retrieval"])
def test_other_datasets_have_a_page(dataset, tmp_path):
    root = tmp_path / dataset
    for method, best in (("fine_tuning", 9), ("cdc_mmpg", 1)):
        if dataset == "msvd":
            write_answers(root, method, devices=False)
        else:
            write_ranks(root, method, {"own": {"VR": [best, 2], "TR": [1, best, 2, 3]}})
    html, page, entries = build_report(root)
    assert f"Table {1 if dataset == 'msvd' else 3} of the paper: {dataset}" in page.text
    printed = [entry for entry in entries.values() if entry["sources"][:1] and "paper#" in entry["sources"][0]]
    assert len(printed) > 10
    for entry in printed:
        assert resolve(root, entry["sources"][0]) == entry["value"]
    assert "Device by device" not in page.text
    assert not [text for text in page.loose if NUMBER.search(text)]
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", html.lower())


def test_a_single_run_has_a_page_and_an_empty_folder_is_refused(tmp_path, capsys):
    folder = write_answers(tmp_path / "synthetic", "linear")
    for name in ("predictions.test.csv", "logs/version_0/metrics.csv"):
        (folder / name).unlink()
    _, page, _ = build_report(tmp_path / "synthetic")
    assert "No two runs can be compared yet." in page.text
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "make train" in capsys.readouterr().err
    (tmp_path / "synthetic" / "report.html").unlink()
    (tmp_path / "synthetic" / "report.html").mkdir()
    assert report.main([str(tmp_path / "synthetic")]) == 1
    assert "report.html: cannot be written" in capsys.readouterr().err


def test_names_are_escaped_in_html(tmp_path):
    root = tmp_path / "a&b <i>"
    write_answers(root, "linear", machine="<script>alert(1)</script> {0}")
    html, page, _ = build_report(root)
    assert "<script" not in html
    assert "CDC-MMPG on a&b <i>" in page.text
    assert all(page.figures)


@pytest.mark.slow
def test_wandb_gets_the_page_and_its_figures(runs, tmp_path):
    """W&B runs offline in a separate process, because its client keeps threads."""
    root = tmp_path / "synthetic"
    shutil.copytree(runs, root)
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "cdc_mmpg", "report", str(root)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (media,) = (root / "report").rglob("*.html")
    assert media.read_text() == (root / "report.html").read_text()
    assert list((root / "report").rglob("offline-run-*/*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"synthetic"}


def test_names_with_braces_are_not_taken_for_figures(tmp_path):
    rows = [{"split": "{0}", "what": "{x}", "published": 2, "here": 1, "same": False}]
    write_answers(tmp_path / "{msvd}", "cdc_mmpg_session", cases={"n16": 0.9, "{x}": 0.9}, published=rows,
                 payloads={"{x}": {"bytes": 5}})  # fmt: skip
    html, _, _ = build_report(tmp_path / "{msvd}")
    assert "Session, n = 16, {x}" in html


def test_non_finite_values_of_logs_are_left_out_of_curves(runs, tmp_path):
    root = tmp_path / "synthetic"
    shutil.copytree(runs, root)
    log = root / "linear" / "seed0" / "logs" / "version_0" / "metrics.csv"
    log.write_text("epoch,step,val/accuracy\n0,9,nan\n1,19,0.4\n2,29,inf\n3,39,0.5\n")
    _, _, entries = build_report(root)
    assert entries["plots/curves/linear"]["value"] == pytest.approx([40, 50])


def test_questions_are_counted_in_the_runs_that_answer_them(tmp_path):
    root = tmp_path / "synthetic"
    write_answers(root, "linear")
    counts = {"train": 1, "val": 2, "test": 4_321}
    write_answers(root, "encoder_pretraining", questions=counts).joinpath("predictions.test.csv").unlink()
    path = root / "encoder_pretraining" / "seed0" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": {}}))
    _, _, entries = build_report(root)
    assert entries["made/questions/2"]["value"] == 3168


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_on_a_full_disk_the_old_page_stays(name, tmp_path, capsys, monkeypatch):
    root = tmp_path / "synthetic"
    write_answers(root, "linear")
    (root / name).write_text("old")
    replace = os.replace

    def fail_on_full_disk(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_full_disk)
    assert report.main([str(root)]) == 1
    assert f"{root / name}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert (root / name).read_text() == "old"
    assert not list(root.glob(".*"))
