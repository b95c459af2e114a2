"""Accuracies with intervals, and the floors below which a method has learnt nothing. Numpy only."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Cell = dict[str, float]  # value, low, high, questions
Accuracies = dict[str, dict[str, dict[str, Cell]]]  # by condition, group of devices, type of question

INTERVAL = (2.5, 97.5)  # percentiles
CHUNK = 100  # draws that are held at once


def accuracies(
    correct: Mapping[str, ArrayLike],
    clips: Sequence[str],
    devices: Sequence[str],
    groups: Sequence[str],
    types: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> Accuracies:
    """Accuracies of N questions under every condition, with 95 % percentile intervals of a two-level bootstrap.

    A draw takes the devices of each group with replacement, then the clips of each drawn device; the questions of a
    clip stay together. Where every device has one clip, this is the bootstrap over clips. All cells share the draws,
    and so do calls on the same questions: their differences are paired. A cell leaves out the draws without a question
    of it.

    Args:
        correct: by condition, (N,) whether each answer was correct.
        clips: (N) the clip that each question is about.
        devices: (N) its device; the clip itself where there are no devices.
        groups: (N) the group of that device, "" for none.
        types: (N) the question's type, "" for none.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        condition -> group -> type -> value, low, high, questions. Group "test" and type "all" hold everything.
    """
    asked = list(zip(groups, devices, clips, strict=True))
    places = {place: number for number, place in enumerate(sorted(set(asked)))}  # draws know no order of questions
    clip_of = np.array([places[place] for place in asked])
    cells = {
        (group, kind): _which(groups, group, "test") & _which(types, kind, "all")
        for group in ("test", *sorted(set(groups) - {""}))
        for kind in ("all", *sorted(set(types) - {""}))
    }
    cells = {key: which for key, which in cells.items() if which.any()}

    def by_clip(amounts: ArrayLike) -> NDArray[np.float64]:  # (cells, clips)
        amounts = np.asarray(amounts, np.float64)
        return np.stack([np.bincount(clip_of, amounts * which, len(places)) for which in cells.values()])

    questions = by_clip(np.ones(len(clips)))
    right = np.stack([by_clip(values) for values in correct.values()])
    chunks = _weights(list(places), draws, seed)
    drawn = np.concatenate([_shares(right @ weights, questions @ weights) for weights in chunks], -1)
    values = _shares(right.sum(-1), questions.sum(-1))
    low, high = np.nanpercentile(drawn, INTERVAL, axis=-1)
    result: Accuracies = {}
    for i, condition in enumerate(correct):
        result[condition] = {}
        for j, (group, kind) in enumerate(cells):
            result[condition].setdefault(group, {})[kind] = {
                "value": float(values[i, j]),
                "low": float(low[i, j]),
                "high": float(high[i, j]),
                "questions": int(questions[j].sum()),
            }
    return result


def majorities(
    train_answers: Sequence[str], train_types: Sequence[str], test_types: Sequence[str]
) -> dict[str, list[str]]:
    """What answers without looking: the most frequent training answer, overall and per question type.

    Args:
        train_answers, train_types: of the training questions.
        test_types: of the questions to answer; a type without training questions gets the overall answer.
    """
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for answer, kind in zip(train_answers, train_types, strict=True):
        by_type[kind][answer] += 1
    overall = _most_frequent(Counter(train_answers))
    best = {kind: _most_frequent(counts) for kind, counts in by_type.items()}
    return {
        "majority": [overall] * len(test_types),
        "majority_per_type": [best.get(kind, overall) for kind in test_types],
    }


def _which(names: Sequence[str], name: str, everything: str) -> NDArray[np.bool_]:
    """(N,) whether a question has this name."""
    return np.array([name in (own, everything) for own in names], bool)


def _shares(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Part of the whole, NaN where that is nothing."""
    with np.errstate(invalid="ignore"):
        return part / whole


def _weights(places: Sequence[tuple[str, str, str]], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """(clips, at most CHUNK) how often each draw took each clip, for (group, device, clip) of all clips."""
    generator = np.random.default_rng(seed)
    members: dict[str, dict[str, list[int]]] = {}
    for number, (group, device, _) in enumerate(places):
        members.setdefault(group, {}).setdefault(device, []).append(number)
    for start in range(0, draws, CHUNK):
        weights = np.empty((len(places), min(CHUNK, draws - start)))
        for devices in members.values():
            times = generator.multinomial(len(devices), _even(len(devices)), weights.shape[1])
            for own, drawn in zip(devices.values(), times.T, strict=True):
                # A device drawn k times gives k independent samples of its clips.
                many = len(own) > 1
                weights[own] = generator.multinomial(drawn * len(own), _even(len(own))).T if many else drawn
        yield weights


def _even(number: int) -> NDArray[np.float64]:
    return np.full(number, 1 / number)


def _most_frequent(counts: Counter[str]) -> str:
    """The first by alphabet of those."""
    return min(counts, key=lambda answer: (-counts[answer], answer))
