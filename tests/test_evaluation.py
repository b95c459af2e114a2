"""Results of a test, compared with figures computed by hand: answers, floors, recalls, and the table of outcomes."""

import csv
from collections import Counter
from math import comb
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from cdc_mmpg.data.batch import UNKNOWN_ANSWER, UNKNOWN_LABEL
from cdc_mmpg.data.interface import SampleOrigin
from cdc_mmpg.evaluation.answers import MARKS_COLUMN
from cdc_mmpg.evaluation.evaluate import evaluate_outcomes
from cdc_mmpg.evaluation.metrics import CAPTIONS, RECALLS, compute_ranks, compute_recalls, rank_all


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Questions:
    """Open-ended questions, five in training and four in the test, as `evaluate_outcomes` reads them."""

    task = "open_ended"
    LABELS: ClassVar = {"train": [0, 0, UNKNOWN_LABEL, 1, 2], "test": [1, 0, UNKNOWN_LABEL, 2], "val": [2, 2, 2, 2]}
    TYPES: ClassVar = {"train": ["size", "size", "color", "color", "color"], "test": ["color", "size", "size", "shape"]}

    def origins(self, split: str) -> list[SampleOrigin]:
        assert split != "val"
        return [
            SampleOrigin(
                f"{split}{place}", f"device{place // 2}", ("seen", "unseen")[place % 2], kind, f"{kind}, no?", "-"
            )
            for place, kind in enumerate(self.TYPES[split])
        ]

    def labels(self, split: str) -> torch.Tensor:
        return torch.tensor(self.LABELS[split])

    def answers(self) -> list[str]:
        return ["big", "blue"]

    def word(self, split: str, index: int, label: int | None = None) -> str:
        return f"{split} {index}: {[*self.answers(), UNKNOWN_ANSWER][label or 0]}"


def test_open_ended_questions_get_accuracies_floors_and_a_table(tmp_path):
    labels = np.array(Questions.LABELS["test"])
    own = np.arange(4), np.stack([[1, 1, 1, 2], labels, [0.9, 0.8, 0.7, 0.6]], 1)
    other = np.arange(4), np.stack([[0, 0, 1, 1], labels, np.ones(4)], 1)
    some = np.array([3, 1]), np.array([[2, 2, 0.9], [2, 0, 0.8]])  # two of the questions
    cases = {"own": own, "other": other, "some": some}
    results = evaluate_outcomes(Questions(), cases, tmp_path / "table.csv")

    def values(where: str, case: str, group: str) -> dict[str, tuple[float, int]]:
        return {kind: (cell["value"], cell["questions"]) for kind, cell in results[where][case][group].items()}

    assert list(results) == ["accuracy", "floors", "calibration_error", "tenth_percentile"]
    assert list(results["accuracy"]) == ["own", "other", "some"]
    assert values("accuracy", "some", "test") == {"all": (0.5, 2), "shape": (1, 1), "size": (0, 1)}
    assert values("accuracy", "own", "test") == {"all": (0.5, 4), "color": (1, 1), "shape": (1, 1), "size": (0, 2)}
    assert values("accuracy", "own", "unseen") == {"all": (0.5, 2), "shape": (1, 1), "size": (0, 1)}
    assert values("accuracy", "other", "test")["all"] == (0.25, 4)
    # Right, wrong, wrong, right, each in a separate bin; a device has two questions, one of each group.
    assert results["calibration_error"]["own"]["test"] == pytest.approx((0.1 + 0.8 + 0.7 + 0.4) / 4)
    assert results["calibration_error"]["own"]["unseen"] == pytest.approx((0.8 + 0.4) / 2)
    assert results["calibration_error"]["other"]["test"] == pytest.approx(0.75)  # certain, but right once in four times
    assert results["tenth_percentile"]["own"] == {"test": 0.5, "seen": pytest.approx(0.1), "unseen": pytest.approx(0.1)}
    # Floors count the class of all other answers but not unknown answers: "big" twice, "blue" and the class once each.
    # For colors, "blue" and the class tie: "(unknown)" comes first by alphabet. Shapes have no training answer.
    assert list(results["floors"]) == ["majority", "majority_per_type"]
    assert values("floors", "majority", "test") == {
        "all": (0.25, 4),
        "color": (0, 1),
        "shape": (0, 1),
        "size": (0.5, 2),
    }
    assert values("floors", "majority_per_type", "test") == values("floors", "majority", "test")
    table = read_rows(tmp_path / "table.csv")
    assert list(table[0]) == [*SampleOrigin._fields, "own", "other", "some", MARKS_COLUMN]
    assert [row["some"] for row in table] == ["", f"test 1: {UNKNOWN_ANSWER}", "", f"test 3: {UNKNOWN_ANSWER}"]
    assert [row[MARKS_COLUMN] for row in table] == ["rw.", "wrw", "ww.", "rwr"]  # by label, one letter per case
    assert [row["clip"] for row in table] == ["test0", "test1", "test2", "test3"]
    assert [row["question"] for row in table] == ["color, no?", "size, no?", "size, no?", "shape, no?"]
    assert table[3]["own"] == f"test 3: {UNKNOWN_ANSWER}"
    assert [row["other"] for row in table] == ["test 0: big", "test 1: big", "test 2: blue", "test 3: blue"]


class Choices:
    """Two multiple-choice questions, with two and with five candidates."""

    task = "multiple_choice"

    def origins(self, split: str) -> list[SampleOrigin]:
        return [SampleOrigin(clip, clip, "", "", "who?", "me") for clip in "ab"]

    def texts(self, split: str, index: int) -> list[str]:
        return [f"{split} candidate {place}" for place in range([2, 5][index])]

    def word(self, split: str, index: int, label: int | None = None) -> str:
        return self.texts(split, index)[label or 0]


def test_chance_of_a_multiple_choice_is_one_over_its_candidates(tmp_path):
    case_rows = np.array([1, 0]), np.array([[4, 4, 0.6], [1, 0, 0.5]])
    outcomes = {"own": (case_rows[0][::-1], case_rows[1][::-1])}
    results = evaluate_outcomes(Choices(), outcomes, tmp_path / "table.csv")
    assert results["floors"]["chance"]["test"]["all"]["value"] == pytest.approx((1 / 2 + 1 / 5) / 2)
    assert results["accuracy"]["own"]["test"]["all"]["value"] == 0.5
    assert results["tenth_percentile"] == {}  # the devices of the clips are unknown
    assert [row["own"] for row in read_rows(tmp_path / "table.csv")] == ["test candidate 1", "test candidate 4"]


class Pairs:
    """Twelve clips with one caption each, but three for the first, as `evaluate_outcomes` reads them."""

    task = "retrieval"

    def origins(self, split: str) -> list[SampleOrigin]:
        assert split == "test"
        return [SampleOrigin(f"clip{i}", f"device{i // 2}", ("seen", "unseen")[i % 2], "", "", "") for i in range(12)]

    def texts(self, split: str, index: int) -> list[str]:
        assert split == "test"
        return [f"caption {place} of {index}" for place in range(3 if index == 0 else 1)]


def test_retrieval_gets_recalls_chance_and_a_table(tmp_path):
    generator = np.random.default_rng(0)
    owners = np.array([0, 1, 0, 0, *range(2, 12)])  # captions in any order
    unit = {name: generator.normal(size=(size, 3)) for name, size in (("own", 12), ("other", 12), (CAPTIONS, 14))}
    unit = {
        name: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for name, rows in unit.items()
    }
    outcomes = {"own": (np.arange(12), unit["own"]), "other": (np.arange(12), unit["other"])}
    outcomes[CAPTIONS] = owners, unit[CAPTIONS]
    results = evaluate_outcomes(Pairs(), outcomes, tmp_path / "table.csv")
    for case in ("own", "other"):
        scores = unit[case] @ unit[CAPTIONS].T  # ranks by loops: of captions for a clip, then of clips
        videos = [min(1 + sum(scores[i, owners != i] > scores[i, caption]) for caption in np.flatnonzero(owners == i))
                  for i in range(12)]  # fmt: skip
        texts = [1 + sum(scores[:, j] > scores[owners[j], j]) for j in range(14)]
        for group in ("test", "seen", "unseen"):
            chosen = {"test": (0, 1), "seen": (0,), "unseen": (1,)}[group]
            cells = results["accuracy"][case][group]
            assert list(cells) == [f"{way}@{k}" for way in ("VR", "TR") for k in (1, 5, 10)]
            for k in RECALLS:
                hits = [rank <= k for i, rank in enumerate(videos) if i % 2 in chosen]
                assert (cells[f"VR@{k}"]["value"], cells[f"VR@{k}"]["questions"]) == (
                    pytest.approx(np.mean(hits)),
                    len(hits),
                )
                hits = [rank <= k for j, rank in enumerate(texts) if owners[j] % 2 in chosen]
                assert (cells[f"TR@{k}"]["value"], cells[f"TR@{k}"]["questions"]) == (
                    pytest.approx(np.mean(hits)),
                    len(hits),
                )
        assert results["median_rank"][case] == {"VR": np.median(videos), "TR": np.median(texts)}
        table = read_rows(tmp_path / "table.csv")
        assert [int(row[case]) for row in table] == [*videos, *texts]
        logged = compute_recalls({case: outcomes[case], CAPTIONS: outcomes[CAPTIONS]})
        assert logged["recall"] == pytest.approx(
            np.mean([np.mean(np.array(places) <= k) for places in (videos, texts) for k in (1, 5, 10)])
        )
        assert (logged["VR_median_rank"], logged["TR_median_rank"]) == (np.median(videos), np.median(texts))
    assert [row["direction"] for row in table] == ["VR"] * 12 + ["TR"] * 14
    assert [row["clip"] for row in table[:12]] == [f"clip{i}" for i in range(12)]
    assert [row["caption"] for row in table[:17]] == [""] * 12 + [
        "caption 0 of 0", "caption 0 of 1", "caption 1 of 0", "caption 2 of 0", "caption 0 of 2"
    ]  # fmt: skip
    assert [row["clip"] for row in table[12:16]] == ["clip0", "clip1", "clip0", "clip0"]
    # Chance that k of 14 captions drawn at random include one of the clip's, and k of 12 clips the caption's.
    chance = results["floors"]["chance"]["test"]
    for k in (1, 5, 10):
        sizes = Counter(owners.tolist()).values()
        expected = np.mean([1 - comb(14 - size, k) / comb(14, k) for size in sizes])
        assert chance[f"VR@{k}"]["value"] == pytest.approx(expected)
        assert chance[f"TR@{k}"]["value"] == pytest.approx(k / 12)


def test_ranks_do_not_depend_on_how_many_similarities_are_held(monkeypatch):
    generator = np.random.default_rng(1)
    owners = np.array([*range(7), 3, 0, 0])
    videos, texts = (generator.normal(size=(size, 4)).astype(np.float32) for size in (7, 10))
    expected = compute_ranks(videos, texts, owners)
    for limit in (5, 15):  # less than a row, which is computed anyway; one row or two
        monkeypatch.setattr("cdc_mmpg.evaluation.metrics.MAX_SCORES", limit)
        for ours, theirs in zip(compute_ranks(videos, texts, owners), expected, strict=True):
            assert ours.tolist() == theirs.tolist()


def test_similarities_within_a_millionth_are_ties():
    for below, rank in ((1e-6, 2), (3e-6, 1)):
        near = np.float32(1) - np.float32(below)
        texts = np.array([[1, 0], [near, (1 - near**2) ** 0.5]], np.float32)
        by_video, by_text = compute_ranks(np.array([[1, 0], [0, 1]], np.float32), texts, np.array([0, 1]))
        assert by_video.tolist() == [rank, 1]
        assert by_text.tolist() == [1, 2]


def test_rank_all_accepts_clips_in_any_order():
    """Samples are not numbered from 0 where the split is a share of a larger one."""
    eye = np.eye(4, dtype=np.float32)
    indices = np.array([2, 5, 7, 9])
    ranks = rank_all({"own": (indices, eye), CAPTIONS: (np.array([9, 2, 7, 5]), eye[[3, 0, 2, 1]])})
    assert list(ranks) == ["own"]
    assert [places.tolist() for places in ranks["own"]] == [[1] * 4, [1] * 4]


def test_chance_is_one_where_captions_are_fewer_than_ranks(tmp_path):
    class Few(Pairs):
        def origins(self, split: str) -> list[SampleOrigin]:
            return super().origins(split)[:3]

    eye = np.eye(3, dtype=np.float32)
    outcomes = {"own": (np.arange(3), eye), CAPTIONS: (np.arange(3), eye)}
    chance = evaluate_outcomes(Few(), outcomes, tmp_path / "table.csv")["floors"]["chance"]["test"]
    assert {name: cell["value"] for name, cell in chance.items()} == pytest.approx(
        {"VR@1": 1 / 3, "VR@5": 1, "VR@10": 1, "TR@1": 1 / 3, "TR@5": 1, "TR@10": 1}
    )
