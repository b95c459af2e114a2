"""Evaluation of a test by task: metrics with intervals for results.json, and a table of all answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torchmetrics.functional.classification import binary_calibration_error

from cdc_mmpg.data.batch import UNKNOWN_ANSWER, UNKNOWN_LABEL
from cdc_mmpg.data.interface import SampleOrigin, VideoTextData
from cdc_mmpg.evaluation.answers import QUESTION_COLUMNS, AnswersTable, write_answers
from cdc_mmpg.evaluation.metrics import CAPTIONS, RECALLS, Outcomes, compute_accuracies, guess_answers, rank_all


def evaluate_outcomes(data: VideoTextData, outcomes: Outcomes, table: Path) -> dict[str, Any]:
    """Return the metrics of a test for results.json, and write all answers to `table` (CSV).

    Returns:
        accuracy: by case, group of devices and type of question (see `metrics.compute_accuracies`), in retrieval by
            recall instead of type; floors: the same for baselines that ignore the video; in retrieval also
            median_rank. Else, by case and group, calibration_error (`measure_calibration`) and, if devices are known,
            tenth_percentile of the devices' accuracies (as in WILDS: Koh et al. 2021).
    """
    return (_evaluate_retrieval if data.task == "retrieval" else _evaluate_answers)(data, outcomes, table)


def _evaluate_answers(data: VideoTextData, outcomes: Outcomes, table: Path) -> dict[str, Any]:
    """Evaluate tasks with predictions and labels; an answer is right if the labels are equal."""
    origins = data.origins("test")
    given = {case: [""] * len(origins) for case in outcomes}
    right: dict[str, list[bool | None]] = {case: [None] * len(origins) for case in outcomes}
    for case, (where, rows) in outcomes.items():
        for i, (label, true) in zip(where.tolist(), rows[:, :2].astype(int).tolist(), strict=True):
            given[case][i], right[case][i] = data.word("test", i, label), label == true
    devices, groups = (np.array([origin[place] for origin in origins]) for place in (1, 2))
    return {**rate_answers(data, origins, given, right, table), **_measure_by_group(outcomes, devices, groups)}


def rate_answers(
    data: VideoTextData,
    origins: Sequence[SampleOrigin],
    given: Mapping[str, Sequence[str]],
    right: Mapping[str, Sequence[bool | None]],
    table: Path,
) -> dict[str, Any]:
    """Return accuracy and floors as `evaluate_outcomes` does, and write the answers to `table` (CSV).

    A case that answers a part of the questions is rated on these.

    Args:
        data: dataset of questions.
        origins: (N,) its test questions.
        given: by case, (N,) answer to each test question.
        right: by case, (N,) whether each answer is right; None for a question that was not asked.
        table: file to write.
    """
    asked = dict(zip(QUESTION_COLUMNS, zip(*origins, strict=True), strict=True))
    clips, devices, groups, types = (asked[name] for name in ("clip", "device", "group", "type"))
    floors = _score_floors(data, origins)
    complete: dict[str, ArrayLike] = {case: np.array(marks, bool) for case, marks in right.items() if None not in marks}
    accuracy = compute_accuracies(complete | floors, clips, devices, groups, types)
    for case, marks in right.items():
        if case not in complete:
            where = [i for i, mark in enumerate(marks) if mark is not None]
            parts = [[column[i] for i in where] for column in (clips, devices, groups, types)]
            rated = np.array([marks[i] for i in where], bool)
            accuracy |= compute_accuracies({case: rated}, parts[0], parts[1], parts[2], parts[3])
    write_answers(AnswersTable(asked, given, right), table)
    return {
        "accuracy": {case: accuracy[case] for case in right},
        "floors": {name: accuracy[name] for name in floors},
    }


def _score_floors(data: VideoTextData, origins: Sequence[SampleOrigin]) -> dict[str, ArrayLike]:
    """Return whether baselines that ignore the video are right, (N,) by name; of chance, how often."""
    if data.task != "open_ended":
        return {"chance": [1 / len(data.texts("test", i)) for i in range(len(origins))]}
    trained = [(label, origin.type) for label, origin in
               zip(data.labels("train").tolist(), data.origins("train"), strict=True)
               if label != UNKNOWN_LABEL]  # fmt: skip
    words = [*data.answers(), UNKNOWN_ANSWER]
    types = [origin.type for origin in origins]
    guesses = guess_answers([words[label] for label, _ in trained], [kind for _, kind in trained], types)
    labels = [words[label] if label != UNKNOWN_LABEL else "" for label in data.labels("test").tolist()]
    return {name: [guess == true for guess, true in zip(given, labels, strict=True)] for name, given in guesses.items()}


def _measure_by_group(
    outcomes: Outcomes, devices: NDArray[np.str_], groups: NDArray[np.str_]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return calibration error and tenth percentile by case and group of devices; "test" holds all devices."""
    calibration: dict[str, dict[str, float]] = {case: {} for case in outcomes}
    percentiles: dict[str, dict[str, float]] = {case: {} for case in outcomes if any(groups)}
    for case, (where, rows) in outcomes.items():
        right = rows[:, 0] == rows[:, 1]
        for group in ("test", *sorted(set(groups[where]) - {""})):
            of_group = (groups[where] == group) | (group == "test")
            calibration[case][group] = measure_calibration(rows[of_group, 2], right[of_group])
            if case in percentiles:
                _, numbers = np.unique(devices[where][of_group], return_inverse=True)
                shares = np.bincount(numbers, right[of_group]) / np.bincount(numbers)
                percentiles[case][group] = float(np.percentile(shares, 10))
    return {"calibration_error": calibration, "tenth_percentile": percentiles}


def measure_calibration(probabilities: ArrayLike, right: ArrayLike) -> float:
    """Return the expected calibration error of answers with probabilities (N,), over 15 bins of equal width.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    given, true = torch.as_tensor(probabilities).float(), torch.as_tensor(right).long()
    return float(binary_calibration_error(given.clamp(0, 1), true, n_bins=15, norm="l1"))


def _evaluate_retrieval(data: VideoTextData, outcomes: Outcomes, table: Path) -> dict[str, Any]:
    """Evaluate retrieval, whose outcomes are embeddings."""
    ranks = rank_all(outcomes)
    origins = data.origins("test")
    names = [origin.clip for origin in origins]
    origin_of = {origin.clip: origin for origin in origins}
    owners = outcomes[CAPTIONS][0].tolist()
    queries = {"VR": names, "TR": [names[owner] for owner in owners]}
    kinds = [f"{way}@{k}" for way in queries for k in RECALLS]
    clips = [clip for way in queries for _ in RECALLS for clip in queries[way]]
    types = [f"{way}@{k}" for way in queries for k in RECALLS for _ in queries[way]]
    correct: dict[str, ArrayLike] = {
        case: np.concatenate([places <= k for places in both for k in RECALLS]) for case, both in ranks.items()
    }
    number, sizes = len(owners), np.bincount(owners, minlength=len(names)).tolist()
    chance = [[1 - comb(number - size, k) / max(1, comb(number, k)) for size in sizes] for k in RECALLS]
    chance += [[min(1.0, k / len(names))] * number for k in RECALLS]
    devices, groups = [origin_of[clip].device for clip in clips], [origin_of[clip].group for clip in clips]
    accuracy = compute_accuracies(correct | {"chance": np.concatenate(chance)}, clips, devices, groups, types)
    kept = {
        case: {group: {kind: cells[kind] for kind in kinds if kind in cells} for group, cells in groups_of.items()}
        for case, groups_of in accuracy.items()
    }
    texts, seen = [], Counter[int]()
    for owner in owners:
        texts.append(data.texts("test", owner)[seen[owner]])
        seen[owner] += 1
    asked = {
        "direction": [way for way, clips_of in queries.items() for _ in clips_of],
        "clip": [clip for clips_of in queries.values() for clip in clips_of],
        "caption": [""] * len(names) + texts,
    }
    write_answers(AnswersTable(asked, {case: np.concatenate(both).tolist() for case, both in ranks.items()}, {}), table)
    medians = {
        case: {way: float(np.median(places)) for way, places in zip(queries, both, strict=True)}
        for case, both in ranks.items()
    }
    return {
        "accuracy": {case: kept[case] for case in ranks},
        "floors": {"chance": kept["chance"]},
        "median_rank": medians,
    }
