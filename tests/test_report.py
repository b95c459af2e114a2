"""The page: it opens alone, says what the figures say, and every figure on it can be made again from the runs."""

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
from test_tables import answered_run, questions, ranked_run

from cdc_mmpg.evaluation.metrics import accuracies
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.report import page as report
from cdc_mmpg.report.examples import EXAMPLES_OF_A_KIND, choose_examples

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
SESSION_CASES = {"n16": 0.9, "n8": 0.8, "n1": 0.6, "n0": 0.5, "shuffled_n16": 0.5, "float32": 0.9, "int8": 0.9}
SIZES = {"float32": {"bytes": 1824}, "int8": {"bytes": 484}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of every kind of run one, of most two seeds."""
    root = tmp_path_factory.mktemp("runs") / "synthetic"
    made = {"machine": "2 processors, Linux x86_64", "devices": "1 x cpu", "finished": "2026-01-02T03:04:05+00:00",
            "versions": {"python": "3.11.7", "numpy": "2.4.6"}}  # fmt: skip
    for seed in range(2):
        for method, cases in {
            "linear": {"own": 0.55}, "fine_tuning": {"own": 0.6},
            "cdc_mmpg": {"own": 0.6, "shuffled": 0.6, "shuffled_device": 0.3, "bypassed": 0.6, "int8": 0.5},
            "session_concatenated": {"n16": 0.7}, "cdc_mmpg_frozen.batch_global": {"own": 0.6, "bypassed": 0.4},
        }.items():  # fmt: skip
            answered_run(
                root, method, seed, cases, payloads={"int8": {"bytes": 1683}} if "int8" in cases else {}, **made
            )
        answered_run(
            root, "cdc_mmpg_session", seed, SESSION_CASES, payloads=SIZES, bytes={"up": 768, "down": 484}, **made
        )
    spread = {key: {"own": {"unseen": 0.31}} for key in ("tenth_percentile", "calibration_error")}
    answered_run(root, "hyper", 0, {"own": 0.5, "mean_head": 0.5}, **made, **spread)
    answered_run(root, "linear.devices12", 0, {"own": 0.4}, **made)
    held = [(*row[:2], "arc", *row[3:]) if row[1].endswith("1") else row for row in questions()]
    answered_run(root, "cdc_mmpg_session.arc90", 0, {"n16": 0.8}, asked=held, **made)
    answered_run(root, "cdc_mmpg.frames2", 0, **made)
    some = [None if row[2] == "seen" else row[3] == "color" for row in questions()]
    answered_run(root, "on_device", 0, {"own": 0.6, "tent": 0.6, "labels_15": some}, **made)
    probes = [{"what": "the hue", "from": "16 anchors", "degrees": 20.5, "low": 18.0, "high": 23.0, "chance": 90.0,
               "number": 48}, {"what": "a shape", "from": "1 anchor", "accuracy": 0.41, "chance": 0.25}]  # fmt: skip
    folder = root / "privacy" / "seed0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"probes": probes, "seed": 0}))
    return root


class Reader(HTMLParser):
    """Cells and figures of a page; complains where tags do not match."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.figures: list[str] = []  # each text of a <data>
        self.loose: list[str] = []  # texts of cells beside their figures
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


def read(root: Path, **arguments) -> tuple[str, Reader, dict]:
    assert report.main([str(root), *(f"--{name}={value}" for name, value in arguments.items())]) == 0
    html = (root / "report.html").read_text()
    return html, Reader(html), json.loads((root / "report.json").read_text())


# Making every figure again


def walk(content, pointer):
    for key in pointer.removeprefix("/").split("/"):
        name = key.replace("~1", "/").replace("~0", "~")
        content = content[int(name) if isinstance(content, list) else name]
    return content


def resolve(root, source):
    """What stands at a source that is one value."""
    place, _, pointer = source.partition("#")
    if "/" not in place:
        module = importlib.import_module(place)
        return walk(module.PRINTED, pointer) if pointer.startswith("/") else getattr(module, pointer)
    return walk(json.loads((root / place).read_text()), pointer)


def column(root, source):
    """A log's column by epoch."""
    place, _, name = source.partition("#")
    with (root / place).open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def answers(root, source, entry):
    """By question whether it was answered rightly, of those that the entry is about."""
    place, _, case = source.partition("#")
    found = {}
    with (root / place).open(newline="") as file:
        reader = csv.DictReader(file)
        mark = reader.fieldnames.index(case) - 6
        for row in reader:
            asked = entry.get("group", "test") in ("test", row["group"]) and row[case]
            if asked and entry.get("device", row["device"]) == row["device"]:
                key = tuple(row[name] for name in ("clip", "device", "group", "type", "question", "answer"))
                found[key] = float(row["right"][mark] == "r")
    return found


def differences(root, entry):
    """By question, over the seeds; the group is that of the first run's device, whatever it is in the other."""

    def ungrouped(key):
        return key[:2] + key[3:]

    of_all = {name: value for name, value in entry.items() if name != "group"}
    pairs = [(answers(root, a, entry), {ungrouped(key): value for key, value in answers(root, b, of_all).items()})
             for a, b in zip(entry["sources"], entry["minus"], strict=True)]  # fmt: skip
    shared = [key for key in pairs[0][0] if ungrouped(key) in pairs[0][1]]
    return {key: mean(a[key] - b[ungrouped(key)] for a, b in pairs) for key in shared}


def again(root, entry):  # noqa: PLR0911  a way to make it each
    """The entry's value, made anew."""
    how, sources = entry["how"], entry["sources"]
    if how == "column":
        return [100 * value for value in column(root, sources[0])]
    if how == "count":
        return len([resolve(root, source) for source in sources])
    if how == "share":
        return 100 * mean(mean(answers(root, source, entry).values()) for source in sources)
    if how in ("difference", "low", "high", "right only here", "devices better"):
        found = differences(root, entry)
        if how == "right only here":
            return sum(value > 0 for value in found.values())
        if how == "devices better":
            by_device = {}
            for key, value in found.items():
                by_device.setdefault(key[1], []).append(value)
            return sum(mean(values) > 0 for values in by_device.values())
        if how == "difference":
            return 100 * mean(found.values())
        found = differences(root, entry | {"group": "test"})  # draws are of the whole test
        clips, devices, groups = ([key[place] for key in found] for place in range(3))
        drawn = accuracies({"": list(found.values())}, clips, devices, groups, [""] * len(found))
        return 100 * drawn[""][entry["group"]]["all"][how]
    values = [resolve(root, source) for source in sources]
    if how == "value" and isinstance(values[0], str):
        return values[0]
    if "over" in entry:
        values = [value / resolve(root, below) for value, below in zip(values, entry["over"], strict=True)]
    values = [entry.get("times", 1) * (value + entry.get("plus", 0)) for value in values]
    if how == "delay":
        return 1000 * values[0] / (entry["rate"] * 1024 * 1024)
    made = {"value": lambda each: each[0], "mean": mean, "stdev": stdev, "least": min, "most": max, "sum": sum}
    assert how != "value" or len(values) == 1
    return made[how](values)


def test_every_figure_can_be_made_again_from_the_runs(runs):
    _, page, entries = read(runs)
    assert len(entries) > 400
    hows = {entry["how"] for entry in entries.values()}
    assert hows == {"value", "mean", "stdev", "least", "most", "sum", "count", "delay", "column", "share", "difference",
                    "low", "high", "right only here", "devices better"}  # fmt: skip
    for name, entry in entries.items():
        made = again(runs, entry)
        assert made == (entry["value"] if isinstance(made, str) else pytest.approx(entry["value"], abs=1e-6)), name
        if isinstance(made, str):
            assert made.startswith(entry["shown"]), name
        elif entry["how"] != "column":
            digits = len(entry["shown"].partition(".")[2])
            shown = float(entry["shown"].replace(",", "").replace("−", "-"))
            assert shown == pytest.approx(made, abs=0.51 * 10**-digits), name
    shown = {entry["shown"] for entry in entries.values()}
    assert set(page.figures) <= shown
    assert len(page.figures) > 400
    assert not [text for text in page.loose if NUMBER.search(text)], "a number in a table that is no figure"


def test_a_wrong_figure_would_be_noticed(runs):
    _, _, entries = read(runs)
    for name, entry in entries.items():
        if name.startswith("session_gain_points"):
            other = [re.sub(r"cdc_mmpg_session(.*)n16", r"linear\1own", source) for source in entry["sources"]]
            assert again(runs, entry | {"sources": other}) != pytest.approx(entry["value"], abs=1)
    for how in ("mean", "delay"):
        entry = next(each for each in entries.values() if each["how"] == how and each["value"])
        assert again(runs, entry | {"times": 3}) != pytest.approx(entry["value"])


def test_the_gain_of_the_session_and_the_bytes(runs):
    _, _, entries = read(runs)
    gain = entries["session_gain_points"]
    found = Evidence(runs).compare(Side("cdc_mmpg_session"), Side("fine_tuning"))
    assert (gain["value"], gain["low"], gain["high"]) == (found.value.value, found.low.value, found.high.value)
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


def test_the_page_stands_alone_and_is_readable_by_anybody(runs):
    html, page, _ = read(runs)
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
        "Does the reasoner do anything?",
        "What the upload gives away",
        "In the form of the paper's table 6",
    ):
        assert any(each.startswith(text) for each in page.text), text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", html.lower())


def test_the_page_states_the_findings(runs):
    _, page, _ = read(runs)
    text = "".join(page.text)
    assert "Per-sample adaptation (CDC-MMPG) shows no difference to fine-tuning that this test can tell" in text
    assert "Adaptation to a session (Session, n = 16) adds to fine-tuning: " in text
    assert re.search(
        r"CDC-MMPG: another sample's anchor costs nothing [^.]*\.\d[^:]*: the adaptation is unused\.", text
    )
    assert "make train DATASET=synthetic METHOD=session_oracle SEEDS=2" in text


def test_examples_are_chosen_by_a_rule_and_shown(runs, tmp_path):
    data = tmp_path / "data"
    (data / "somewhere").mkdir(parents=True)
    a, b = (Evidence(runs).find_runs(name)[0] for name in ("cdc_mmpg_session", "fine_tuning"))
    helped, hurt = choose_examples(a, "n16", b, "own", "unseen")
    assert len(helped) == EXAMPLES_OF_A_KIND
    for examples, better in ((helped, True), (hurt, False)):
        assert len({each.device for each in examples}) == len(examples)
        assert all(each.device.startswith("unseen") for each in examples)
        assert all((each.adapted == each.answer) == better != (each.static == each.answer) for each in examples)
    assert [each.device for each in helped] == sorted(each.device for each in helped)
    write_video(data / "somewhere" / f"{helped[0].clip}.mp4", 80)
    damaged = next(each.clip for each in hurt if each.clip != helped[0].clip)
    (data / "somewhere" / f"{damaged}.mp4").write_bytes(b"damaged")
    html, page, entries = read(runs, data=data)
    pictures = [attributes for tag, attributes in page.attributes if tag == "img"]
    clips = {each.clip for each in (*helped, *hurt)}
    assert {re.search("clip (.*),", each["alt"])[1] for each in pictures} == {helped[0].clip} <= clips
    assert all(each["src"].startswith("data:image/jpeg;base64,") for each in pictures)
    assert "Without the clips" not in html
    both = [entries[f"examples/numbers/{place}"]["value"] for place in range(2)]
    unseen = 96
    gain = entries["session_gain_points/seed0"]["value"]
    assert both[0] - both[1] == pytest.approx(gain * unseen / 100)


def test_a_resumed_run_is_one_curve(runs):
    run = Evidence(runs).find_runs("linear")[0]
    log = run.path / "logs" / "version_1" / "metrics.csv"
    log.parent.mkdir()
    log.write_text("epoch,step,val/accuracy\n2,29,0.9\n3,39,0.95\n")
    try:
        _, _, entries = read(runs)
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
            answered_run(root, method, devices=False)
        else:
            ranked_run(root, method, {"own": {"VR": [best, 2], "TR": [1, best, 2, 3]}})
    html, page, entries = read(root)
    assert f"Table {1 if dataset == 'msvd' else 3} of the paper: {dataset}" in page.text
    printed = [entry for entry in entries.values() if entry["sources"][:1] and "paper#" in entry["sources"][0]]
    assert len(printed) > 10
    for entry in printed:
        assert resolve(root, entry["sources"][0]) == entry["value"]
    assert "Device by device" not in page.text
    assert not [text for text in page.loose if NUMBER.search(text)]
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", html.lower())


def test_a_single_run_has_a_page_and_none_has_not(tmp_path, capsys):
    folder = answered_run(tmp_path / "synthetic", "linear")
    for name in ("predictions.test.csv", "logs/version_0/metrics.csv"):
        (folder / name).unlink()
    _, page, _ = read(tmp_path / "synthetic")
    assert "No two runs can be compared yet." in page.text
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "make train" in capsys.readouterr().err
    (tmp_path / "synthetic" / "report.html").unlink()
    (tmp_path / "synthetic" / "report.html").mkdir()
    assert report.main([str(tmp_path / "synthetic")]) == 1
    assert "report.html: cannot be written" in capsys.readouterr().err


def test_names_are_no_markup(tmp_path):
    root = tmp_path / "a&b <i>"
    answered_run(root, "linear", machine="<script>alert(1)</script> {0}")
    html, page, _ = read(root)
    assert "<script" not in html
    assert "CDC-MMPG on a&b <i>" in page.text
    assert all(page.figures)


@pytest.mark.slow
def test_wandb_gets_the_page_and_its_figures(runs, tmp_path):
    """Offline, in a process of its own: the client keeps threads."""
    root = tmp_path / "synthetic"
    shutil.copytree(runs, root)
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "cdc_mmpg", "report", str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (media,) = (root / "report").rglob("*.html")
    assert media.read_text() == (root / "report.html").read_text()
    assert list((root / "report").rglob("offline-run-*/*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"synthetic"}


def test_names_with_braces_hold_no_figures(tmp_path):
    rows = [{"split": "{0}", "what": "{x}", "published": 2, "here": 1, "same": False}]
    answered_run(tmp_path / "{msvd}", "cdc_mmpg_session", cases={"n16": 0.9, "{x}": 0.9}, published=rows,
                 payloads={"{x}": {"bytes": 5}})  # fmt: skip
    html, _, _ = read(tmp_path / "{msvd}")
    assert "Session, n = 16, {x}" in html


def test_logs_that_hold_no_numbers_leave_the_page_whole(runs, tmp_path):
    root = tmp_path / "synthetic"
    shutil.copytree(runs, root)
    log = root / "linear" / "seed0" / "logs" / "version_0" / "metrics.csv"
    log.write_text("epoch,step,val/accuracy\n0,9,nan\n1,19,0.4\n2,29,inf\n3,39,0.5\n")
    _, _, entries = read(root)
    assert entries["plots/curves/linear"]["value"] == pytest.approx([40, 50])


def test_questions_are_counted_in_the_runs_that_answer_them(tmp_path):
    root = tmp_path / "synthetic"
    answered_run(root, "linear")
    counts = {"train": 1, "val": 2, "test": 4_321}
    answered_run(root, "encoder_pretraining", questions=counts).joinpath("predictions.test.csv").unlink()
    path = root / "encoder_pretraining" / "seed0" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": {}}))
    _, _, entries = read(root)
    assert entries["made/questions/2"]["value"] == 3168


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_on_a_full_disk_the_old_page_stays(name, tmp_path, capsys, monkeypatch):
    root = tmp_path / "synthetic"
    answered_run(root, "linear")
    (root / name).write_text("old")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert report.main([str(root)]) == 1
    assert f"{root / name}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert (root / name).read_text() == "old"
    assert not list(root.glob(".*"))
