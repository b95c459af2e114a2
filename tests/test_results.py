"""Results of a test: files written, answers scored by label, and the commit, dirty where git misses source files."""

import csv
import errno
import json
import math
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from test_tables import build_cell, write_run

from cdc_mmpg import results
from cdc_mmpg.data.interface import SampleOrigin
from cdc_mmpg.errors import CDCError
from cdc_mmpg.evaluation.evaluate import evaluate_outcomes
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.report import page as report
from cdc_mmpg.report.examples import choose_examples

CANDIDATES = ["a dog", "a cat", "a dog", "a bird", ""]


def build_choices(number: int = 8) -> SimpleNamespace:
    """Return a multiple-choice dataset: two candidates have the same words, one has none, the first is right."""
    clips = [f"clip{i}" for i in range(number)]
    return SimpleNamespace(
        task="multiple_choice",
        origins=lambda split: [SampleOrigin(clip, clip, "", "", "which?", CANDIDATES[0]) for clip in clips],
        texts=lambda split, index: CANDIDATES,
        word=lambda split, index, label: CANDIDATES[label],
    )


def write_choices(root, method, predicted, other):
    """Write a finished run with answers of two cases; `other` answers the first questions only."""
    rows, other_rows = (np.array([[label, 0, 0.5] for label in words]) for words in (predicted, other))
    outcomes = {"own": (np.arange(len(rows)), rows), "some": (np.arange(len(other_rows)), other_rows)}
    folder = root / method / "seed0"
    folder.mkdir(parents=True)
    evaluation = evaluate_outcomes(build_choices(), outcomes, folder / "predictions.test.csv")
    write_run(root, method, devices=False, task="multiple_choice", **evaluation)
    return evaluation


def test_answers_are_scored_by_label_not_by_words(tmp_path):
    root = tmp_path / "msrvtt_choice"
    first = write_choices(root, "cdc_mmpg", [0, 0, 0, 2, 2, 2, 4, 1], [0, 2])
    second = write_choices(root, "fine_tuning", [0, 2, 1, 0, 2, 1, 0, 4], [4, 4])
    shares = [evaluation["accuracy"]["own"]["test"]["all"]["value"] for evaluation in (first, second)]
    assert shares == [3 / 8, 3 / 8]  # compared by words, 6 and 5 would be right
    evidence = Evidence(root)
    for (run,), share in zip((evidence.find_runs("cdc_mmpg"), evidence.find_runs("fine_tuning")), shares, strict=True):
        assert np.mean(run.answers.correct["own"]) == share
    own_case, partial_case = (
        evidence.find_runs("cdc_mmpg")[0].answers.correct[case].tolist() for case in ("own", "some")
    )
    assert own_case == [1, 1, 1, 0, 0, 0, 0, 0]
    assert partial_case[:2] == [1, 0]
    assert all(map(math.isnan, partial_case[2:]))
    # An answer with empty text still counts as an answer, and is wrong.
    assert evidence.find_runs("fine_tuning")[0].answers.correct["some"].tolist()[:2] == [0, 0]
    assert evidence.compare(Side("cdc_mmpg"), Side("fine_tuning")).value.value == 0
    helped, hurt = choose_examples(
        evidence.find_runs("cdc_mmpg")[0], "own", evidence.find_runs("fine_tuning")[0], "own", "test"
    )
    assert [example.clip for example in helped] == ["clip1", "clip2"]
    assert [example.clip for example in hurt] == ["clip3", "clip6"]
    assert report.main([str(root)]) == 0
    page = (root / "report.html").read_text()
    assert page.count('class="wrong">a dog ✗') == 2
    with (root / "cdc_mmpg" / "seed0" / "predictions.test.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [*SampleOrigin._fields, "own", "some", "right"]


def test_on_a_full_disk_the_old_answers_stay(tmp_path, monkeypatch):
    def fail_on_full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "predictions.test.csv"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail_on_full_disk)
    rows = np.zeros((8, 3))
    with pytest.raises(CDCError, match=r"predictions\.test\.csv: cannot be written \(No space left"):
        evaluate_outcomes(build_choices(), {"own": (np.arange(8), rows)}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "dirty"),
    [("src/cdc_mmpg/new.py", True), ("experiments/tuned/new.yaml", True), ("data_modules/new.py", True),
     ("src/cdc_mmpg/__pycache__/new.pyc", False), ("notes.txt", False), ("checkpoints/msvd/table.md", False)],
)  # fmt: skip
def test_files_that_git_does_not_know_make_a_commit_dirty(name, dirty, tmp_path, monkeypatch):
    tracked = tmp_path / "src" / "cdc_mmpg" / "results.py"
    tracked.parent.mkdir(parents=True)
    tracked.touch()
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    monkeypatch.setattr(results, "__file__", str(tracked))
    clean = results.describe_provenance()["commit"]
    assert len(clean) == 40
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("new")
    assert results.describe_provenance()["commit"] == (f"{clean}-dirty" if dirty else clean)


def test_non_finite_numbers_are_written_as_null_and_named(tmp_path, caplog):
    path = tmp_path / "results.json"
    results.write_json({"metrics": {"test/loss": math.nan, "val/loss": 0.5}, "list": [math.inf]}, path)
    assert json.loads(path.read_text()) == {"metrics": {"test/loss": None, "val/loss": 0.5}, "list": [None]}
    assert "/metrics/test/loss, /list/0" in caplog.text
    assert results.read_results(tmp_path) is not None


def test_written_results_fit_the_expected_types(tmp_path):
    folder = write_run(tmp_path / "synthetic", "linear", accuracy={"own": {"test": {"all": build_cell(0.5)}}})
    assert results.read_results(folder)["method"] == "linear"
    assert results.find_misfit({"probes": [{"what": "hue", "degrees": "20"}]}) == "/probes/0/degrees"
    assert results.find_misfit({"of another version": [1, {"a": "b"}]}) is None
