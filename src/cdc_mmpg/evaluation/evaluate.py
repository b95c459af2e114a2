"""What a test gave, by task: figures with intervals for results.json, and every answer as a table."""

import csv
from collections.abc import Iterable
from io import StringIO
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torchmetrics.functional.classification import binary_calibration_error

from cdc_mmpg.data.batch import UNKNOWN_ANSWER, UNKNOWN_LABEL
from cdc_mmpg.data.interface import SampleOrigin, VideoTextData
from cdc_mmpg.evaluation.metrics import CAPTIONS, RECALLS, RIGHT, Outcomes, accuracies, majorities, ranked
from cdc_mmpg.files import atomic_write


def evaluation(data: VideoTextData, outcomes: Outcomes, table: Path) -> dict[str, Any]:
    """The test's figures for results.json; writes every answer into `table` (CSV).

    Returns:
        accuracy: by case, group of devices and type of question (see `metrics.accuracies`), in retrieval by recall in
            place of the type; floors: the same of what needs no video; in retrieval median_rank, too. Elsewhere, by
            case and group, calibration_error (`measure_calibration`) and, where devices are known, tenth_percentile of
            the devices' accuracies (as WILDS has it: Koh et al. 2021).
    """
    return (_retrieval if data.task == "retrieval" else _answers)(data, outcomes, table)


def _answers(data: VideoTextData, outcomes: Outcomes, table: Path) -> dict[str, Any]:
    """Of tasks whose outcomes are predictions and labels; a case that answers some questions counts only those."""
    origins = data.origins("test")
    clips, devices, groups, types, *_ = (list(column) for column in zip(*origins, strict=True))
    correct: dict[str, ArrayLike] = {
        case: rows[:, 0] == rows[:, 1] for case, (where, rows) in outcomes.items() if len(where) == len(origins)
    }
    if data.task == "open_ended":
        trained = [(label, origin.type) for label, origin in
                   zip(data.labels("train").tolist(), data.origins("train"), strict=True)
                   if label != UNKNOWN_LABEL]  # fmt: skip
        words = [*data.answers(), UNKNOWN_ANSWER]
        guesses = majorities([words[label] for label, _ in trained], [kind for _, kind in trained], types)
        labels = [words[label] if label != UNKNOWN_LABEL else "" for label in data.labels("test").tolist()]
        floors: dict[str, ArrayLike] = {
            name: [given == true for given, true in zip(given, labels, strict=True)] for name, given in guesses.items()
        }
    else:
        floors = {"chance": [1 / len(data.texts("test", i)) for i in range(len(origins))]}
    found = accuracies(correct | floors, clips, devices, groups, types)
    given = [[""] * len(origins) for _ in outcomes]
    marks = [["."] * len(origins) for _ in outcomes]
    for words_given, own_marks, (case, (where, rows)) in zip(given, marks, outcomes.items(), strict=True):
        for i, (label, true) in zip(where.tolist(), rows[:, :2].astype(int).tolist(), strict=True):
            words_given[i] = data.word("test", i, label)
            own_marks[i] = "r" if label == true else "w"
        if case not in correct:
            own = [[column[i] for i in where.tolist()] for column in (clips, devices, groups, types)]
            found |= accuracies({case: rows[:, 0] == rows[:, 1]}, own[0], own[1], own[2], own[3])
    right = map("".join, zip(*marks, strict=True))
    lines = ([*origin, *own] for origin, *own in zip(origins, *given, right, strict=True))
    _write(table, [*SampleOrigin._fields, *outcomes, RIGHT], lines)
    return {
        "accuracy": {case: found[case] for case in outcomes},
        "floors": {name: found[name] for name in floors},
        **_measure_by_group(outcomes, np.array(devices), np.array(groups)),
    }


def _measure_by_group(
    outcomes: Outcomes, devices: NDArray[np.str_], groups: NDArray[np.str_]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return calibration and tenth percentile by case and group of devices; "test" is all."""
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
    """Return the expected calibration error of answers given with probabilities (N,), over 15 bins of equal width.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    given, true = torch.as_tensor(probabilities).float(), torch.as_tensor(right).long()
    return float(binary_calibration_error(given.clamp(0, 1), true, n_bins=15, norm="l1"))


def _retrieval(data: VideoTextData, outcomes: Outcomes, table: Path) -> dict[str, Any]:
    """Of retrieval, whose outcomes are embeddings."""
    places = ranked(outcomes)
    origins = data.origins("test")
    names = [origin.clip for origin in origins]
    of = {origin.clip: origin for origin in origins}
    owners = outcomes[CAPTIONS][0].tolist()
    asking = {"VR": names, "TR": [names[owner] for owner in owners]}
    kinds = [f"{way}@{k}" for way in asking for k in RECALLS]
    clips = [clip for way in asking for _ in RECALLS for clip in asking[way]]
    types = [f"{way}@{k}" for way in asking for k in RECALLS for _ in asking[way]]
    correct: dict[str, ArrayLike] = {
        case: np.concatenate([own <= k for own in both for k in RECALLS]) for case, both in places.items()
    }
    number, sizes = len(owners), np.bincount(owners, minlength=len(names)).tolist()
    chance = [[1 - comb(number - size, k) / max(1, comb(number, k)) for size in sizes] for k in RECALLS]
    chance += [[min(1.0, k / len(names))] * number for k in RECALLS]
    devices, groups = [of[clip].device for clip in clips], [of[clip].group for clip in clips]
    found = accuracies(correct | {"chance": np.concatenate(chance)}, clips, devices, groups, types)
    kept = {
        case: {group: {kind: own[kind] for kind in kinds if kind in own} for group, own in cells.items()}
        for case, cells in found.items()
    }
    rows = [("VR", name, "", *(int(both[0][i]) for both in places.values())) for i, name in enumerate(names)]
    seen: dict[int, int] = {}
    for i, owner in enumerate(owners):
        own = seen[owner] = seen.get(owner, -1) + 1
        rows.append(("TR", names[owner], data.texts("test", owner)[own], *(int(b[1][i]) for b in places.values())))
    _write(table, ["direction", "clip", "caption", *places], rows)
    medians = {
        case: {way: float(np.median(own)) for way, own in zip(asking, both, strict=True)}
        for case, both in places.items()
    }
    return {
        "accuracy": {case: kept[case] for case in places},
        "floors": {"chance": kept["chance"]},
        "median_rank": medians,
    }


def _write(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    text = StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
