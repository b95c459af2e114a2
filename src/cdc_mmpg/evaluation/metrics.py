"""Accuracies and recalls with intervals, and the floors below which a method has learnt nothing. Numpy only."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Cell = dict[str, float]  # value, standard_error, low, high, questions
Accuracies = dict[str, dict[str, dict[str, Cell]]]  # by condition, group of devices, type of question

Outcomes = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]  # by case: of which sample each row is, and what it says

INTERVAL = (2.5, 97.5)  # percentiles
CHUNK = 100  # draws that are held at once

CAPTIONS = "captions"  # the rows of the captions' embeddings, beside those of the clips by case
RECALLS = (1, 5, 10)
RIGHT = "right"  # last column of a table of answers: by case, "r" right or "w" wrong by label, "." not asked
SCORES = 30_000_000  # similarities that are held at once: 120 MB
TIE = 1e-6  # similarities of unit vectors that differ by less are equal: float32 knows no better


def accuracies(
    correct: Mapping[str, ArrayLike],
    clips: Sequence[str],
    devices: Sequence[str],
    groups: Sequence[str],
    types: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
    worlds: Sequence[str] = (),
) -> Accuracies:
    """Accuracies of N questions under every condition, with 95 % percentile intervals of a bootstrap in levels.

    A draw takes the devices of each group with replacement, then the clips of each drawn device; the questions of a
    clip stay together. Where every device has one clip, this is the bootstrap over clips. Of several worlds, which have
    no device in common, a draw takes the worlds first. All cells share the draws, and so do calls on the same
    questions: their differences are paired. A cell leaves out the draws without a question of it.

    Args:
        correct: by condition, (N,) whether each answer was correct.
        clips: (N) the clip that each question is about.
        devices: (N) its device; the clip itself where there are no devices.
        groups: (N) the group of that device, "" for none.
        types: (N) the question's type, "" for none.
        draws: of the bootstrap.
        seed: of the draws.
        worlds: (N) where each device comes from; empty where all come from one.

    Returns:
        condition -> group -> type -> value, standard_error (the draws' deviation), low, high, questions. Group "test"
        and type "all" hold everything.
    """
    asked = list(zip(worlds or [""] * len(clips), groups, devices, clips, strict=True))
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
    errors = np.nanstd(drawn, axis=-1)
    result: Accuracies = {}
    for i, condition in enumerate(correct):
        result[condition] = {}
        for j, (group, kind) in enumerate(cells):
            result[condition].setdefault(group, {})[kind] = {
                "value": float(values[i, j]),
                "standard_error": float(errors[i, j]),
                "low": float(low[i, j]),
                "high": float(high[i, j]),
                "questions": int(questions[j].sum()),
            }
    return result


def ranks(
    videos: NDArray[np.float32], texts: NDArray[np.float32], owners: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where what belongs together stands, 1 at best, when clips (V, D) ask for captions (C, D) and the reverse.

    Several captions belong to a clip: each asks for it on its own, and the clip finds any of them, so that the best
    placed counts (the protocol of MSRVTT's and MSVD's full splits). Ties, and similarities that are no numbers, count
    against us. Similarities are held in parts.

    Args:
        videos, texts: unit vectors.
        owners: (C,) the clip of each caption, as its row in `videos`; every clip has one at least.

    Returns:
        Ranks of clips (V,) and of captions (C,).
    """
    by_text = np.empty(len(texts), np.int64)
    step = max(1, SCORES // len(videos))
    for start in range(0, len(texts), step):
        part = slice(start, start + step)
        scores = texts[part] @ videos.T  # (c, V)
        own = np.take_along_axis(scores, owners[part, None], axis=1)
        by_text[part] = (~(scores < own - TIE)).sum(1)  # all that are not worse, itself among them
    by_video = np.empty(len(videos), np.int64)
    texts = texts[np.argsort(owners, kind="stable")]
    sizes = np.bincount(owners, minlength=len(videos))
    begins = np.cumsum(sizes) - sizes
    step = max(1, SCORES // len(texts))
    for start in range(0, len(videos), step):
        scores = videos[start : start + step] @ texts.T  # (v, C)
        for row, score in enumerate(scores, start):
            mine = slice(begins[row], begins[row] + sizes[row])
            others = ~(score < np.max(score[mine]) - TIE)
            by_video[row] = 1 + others.sum() - others[mine].sum()
    return by_video, by_text


def recalls(outcomes: Outcomes) -> dict[str, float]:
    """VR@K, TR@K, median ranks and the mean of the recalls, `recall`, of the first case.

    As the paper has it: VR@K is video to text (a clip asks for its captions), TR@K text to video.

    Args:
        outcomes: by case, which sample each row is of, and its embedding; see `CAPTIONS`.
    """
    first = next(iter(outcomes))
    videos, texts = ranked({case: outcomes[case] for case in (first, CAPTIONS)})[first]
    found = {
        f"{way}@{k}": float(np.mean(places <= k)) for way, places in (("VR", videos), ("TR", texts)) for k in RECALLS
    }
    return found | {
        "recall": float(np.mean(list(found.values()))),
        "VR_median_rank": float(np.median(videos)),
        "TR_median_rank": float(np.median(texts)),
    }


def ranked(outcomes: Outcomes) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Ranks of clips and of captions by case; arguments as `recalls`', the rows in the samples' order."""
    owners, texts = outcomes[CAPTIONS]
    found = {}
    for case, (clips, videos) in outcomes.items():
        if case != CAPTIONS:
            found[case] = ranks(videos, texts, np.searchsorted(clips, owners))
    return found


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


def _weights(places: Sequence[tuple[str, str, str, str]], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """(clips, at most CHUNK) how often each draw took each clip, for (world, group, device, clip) of all clips."""
    generator = np.random.default_rng(seed)
    worlds: dict[str, dict[str, dict[str, list[int]]]] = {}
    for number, (world, group, device, _) in enumerate(places):
        worlds.setdefault(world, {}).setdefault(group, {}).setdefault(device, []).append(number)
    for start in range(0, draws, CHUNK):
        weights = np.empty((len(places), min(CHUNK, draws - start)))
        taken = np.ones((1, weights.shape[1]), np.int64)
        if len(worlds) > 1:
            taken = generator.multinomial(len(worlds), _even(len(worlds)), weights.shape[1]).T
        for times_world, groups in zip(taken, worlds.values(), strict=True):
            for devices in groups.values():
                times = generator.multinomial(times_world * len(devices), _even(len(devices)))
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
