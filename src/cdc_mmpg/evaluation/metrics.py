"""Accuracies and recalls with intervals, and the floors that a method must exceed. Numpy only."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Cell = dict[str, float]  # value, standard_error, low, high, questions
Accuracies = dict[str, dict[str, dict[str, Cell]]]  # by condition, group of devices, type of question

Outcomes = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]  # by case: sample index and values of each row

INTERVAL = (2.5, 97.5)  # percentiles
CHUNK_DRAWS = 100  # bootstrap draws held in memory at once

CAPTIONS = "captions"  # key of the captions' embeddings in outcomes; the other keys are cases with embeddings of clips
RECALLS = (1, 5, 10)  # K of recall@K
MAX_SCORES = 30_000_000  # similarities held in memory at once: 120 MB
TIE = 1e-6  # tolerance for equal similarities of unit vectors, from float32 precision


def compute_accuracies(
    correct: Mapping[str, ArrayLike],
    clips: Sequence[str],
    devices: Sequence[str],
    groups: Sequence[str],
    types: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
    worlds: Sequence[str] = (),
) -> Accuracies:
    """Return accuracies of N questions by condition, with 95 % percentile intervals of a hierarchical bootstrap.

    A draw resamples the devices of each group, then the clips of each drawn device; the questions of a clip stay
    together. With one clip per device, this is the bootstrap over clips. With several worlds, which share no devices,
    a draw resamples the worlds first. All cells share the draws, as do calls on the same questions, so that
    differences are paired. A cell ignores draws without any of its questions.

    Args:
        correct: by condition, (N,) whether each answer was correct.
        clips: (N) clip of each question.
        devices: (N) device of each clip; the clip itself if there are no devices.
        groups: (N) group of each device, "" for none.
        types: (N) type of each question, "" for none.
        draws: number of bootstrap draws.
        seed: seed of the draws.
        worlds: (N) world of each device; empty if there is only one.

    Returns:
        condition -> group -> type -> value, standard_error (deviation over the draws), low, high, questions. Group
        "test" and type "all" hold all questions.
    """
    origins = list(zip(worlds or [""] * len(clips), groups, devices, clips, strict=True))
    places = {origin: i for i, origin in enumerate(sorted(set(origins)))}  # sorted: draws ignore the order of questions
    clip_of = np.array([places[origin] for origin in origins])
    cells = {
        (group, kind): _match_names(groups, group, "test") & _match_names(types, kind, "all")
        for group in ("test", *sorted(set(groups) - {""}))
        for kind in ("all", *sorted(set(types) - {""}))
    }
    cells = {key: mask for key, mask in cells.items() if mask.any()}

    def sum_by_clip(amounts: ArrayLike) -> NDArray[np.float64]:  # (cells, clips)
        amounts = np.asarray(amounts, np.float64)
        return np.stack([np.bincount(clip_of, amounts * mask, len(places)) for mask in cells.values()])

    questions = sum_by_clip(np.ones(len(clips)))
    right = np.stack([sum_by_clip(values) for values in correct.values()])
    chunks = _draw_weights(list(places), draws, seed)
    drawn = np.concatenate([_divide(right @ weights, questions @ weights) for weights in chunks], -1)
    values = _divide(right.sum(-1), questions.sum(-1))
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


def compute_ranks(
    videos: NDArray[np.float32], texts: NDArray[np.float32], owners: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranks of matches, 1 is best, in both directions between clips (V, D) and captions (C, D).

    A clip can have several captions. Each of them is a query on its own, and a clip's query has the rank of its best
    caption (the protocol of MSRVTT's and MSVD's full splits). Ties and NaN similarities count as worse ranks.
    Similarities are computed in chunks.

    Args:
        videos: (V, D) unit vectors.
        texts: (C, D) unit vectors.
        owners: (C,) clip of each caption, as a row of `videos`; every clip has at least one caption.

    Returns:
        Ranks of clips (V,) and of captions (C,).
    """
    by_text = np.empty(len(texts), np.int64)
    step = max(1, MAX_SCORES // len(videos))
    for start in range(0, len(texts), step):
        part = slice(start, start + step)
        scores = texts[part] @ videos.T  # (c, V)
        matches = np.take_along_axis(scores, owners[part, None], axis=1)
        by_text[part] = (~(scores < matches - TIE)).sum(1)  # clips not worse than the match, including itself
    by_video = np.empty(len(videos), np.int64)
    texts = texts[np.argsort(owners, kind="stable")]
    sizes = np.bincount(owners, minlength=len(videos))
    begins = np.cumsum(sizes) - sizes
    step = max(1, MAX_SCORES // len(texts))
    for start in range(0, len(videos), step):
        scores = videos[start : start + step] @ texts.T  # (v, C)
        for row, score in enumerate(scores, start):
            part = slice(begins[row], begins[row] + sizes[row])
            better = ~(score < np.max(score[part]) - TIE)
            by_video[row] = 1 + better.sum() - better[part].sum()
    return by_video, by_text


def compute_recalls(outcomes: Outcomes) -> dict[str, float]:
    """Return VR@K, TR@K, median ranks and `recall`, the mean of the recalls, of the first case.

    As in the paper, VR@K is video-to-text retrieval (a clip is the query) and TR@K is text-to-video.

    Args:
        outcomes: by case, sample indices and embeddings of the rows; see `CAPTIONS`.
    """
    first = next(iter(outcomes))
    videos, texts = rank_all({case: outcomes[case] for case in (first, CAPTIONS)})[first]
    recalls = {
        f"{way}@{k}": float(np.mean(ranks <= k)) for way, ranks in (("VR", videos), ("TR", texts)) for k in RECALLS
    }
    return recalls | {
        "recall": float(np.mean(list(recalls.values()))),
        "VR_median_rank": float(np.median(videos)),
        "TR_median_rank": float(np.median(texts)),
    }


def rank_all(outcomes: Outcomes) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the ranks of clips and captions by case; arguments as in `compute_recalls`, rows in sample order."""
    owners, texts = outcomes[CAPTIONS]
    ranks = {}
    for case, (clips, videos) in outcomes.items():
        if case != CAPTIONS:
            ranks[case] = compute_ranks(videos, texts, np.searchsorted(clips, owners))
    return ranks


def guess_answers(
    train_answers: Sequence[str], train_types: Sequence[str], test_types: Sequence[str]
) -> dict[str, list[str]]:
    """Return answers that ignore the video: the most frequent training answer, overall and per question type.

    Args:
        train_answers: answers to the training questions.
        train_types: types of the training questions.
        test_types: types of the test questions; types without training questions get the overall answer.
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


def _match_names(names: Sequence[str], name: str, everything: str) -> NDArray[np.bool_]:
    """Return a mask (N,) of the names that equal `name`, or of all names if it is `everything`."""
    return np.array([name in (other, everything) for other in names], bool)


def _divide(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return part / whole, NaN where the whole is 0."""
    with np.errstate(invalid="ignore"):
        return part / whole


def _draw_weights(places: Sequence[tuple[str, str, str, str]], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield (clips, draws) how often each draw took each clip, in chunks, for (world, group, device, clip) of clips."""
    generator = np.random.default_rng(seed)
    worlds: dict[str, dict[str, dict[str, list[int]]]] = {}
    for number, (world, group, device, _) in enumerate(places):
        worlds.setdefault(world, {}).setdefault(group, {}).setdefault(device, []).append(number)
    for start in range(0, draws, CHUNK_DRAWS):
        weights = np.empty((len(places), min(CHUNK_DRAWS, draws - start)))
        taken = np.ones((1, weights.shape[1]), np.int64)
        if len(worlds) > 1:
            taken = generator.multinomial(len(worlds), _uniform(len(worlds)), weights.shape[1]).T
        for times_world, groups in zip(taken, worlds.values(), strict=True):
            for devices in groups.values():
                times = generator.multinomial(times_world * len(devices), _uniform(len(devices)))
                for rows, drawn in zip(devices.values(), times.T, strict=True):
                    # A device drawn k times gives k independent samples of its clips.
                    many = len(rows) > 1
                    weights[rows] = generator.multinomial(drawn * len(rows), _uniform(len(rows))).T if many else drawn
        yield weights


def _uniform(number: int) -> NDArray[np.float64]:
    return np.full(number, 1 / number)


def _most_frequent(counts: Counter[str]) -> str:
    """Return the most frequent answer, the alphabetically first on ties."""
    return min(counts, key=lambda answer: (-counts[answer], answer))
