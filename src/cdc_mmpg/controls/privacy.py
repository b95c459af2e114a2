"""What an upload reveals: linear probes on what devices upload, of one clip and of the mean of several.

`cdc-mmpg privacy checkpoints/<dataset>/cdc_mmpg_session/seed<N>` computes what all unlabelled clips upload in a
finished run, as devices do (one frame, a neutral prompt: 192 floats, of a session the readings), and writes
`checkpoints/<dataset>/privacy/seed<N>/results.json`. Whoever reads uploads is given labels to learn from:

- of the device: which of the seen devices sent it (uploads of other clips of the same devices to learn from), and its
  cast, in degrees (other devices to learn from);
- of the content, always learned from the seen devices and tested on others: how many objects, which shape and colour a
  single object has, as it is and as it looks, and the background's hue as it looks; of a mean, whether the first of its
  clips shows a shape or a colour, and that clip's background.

A probe is linear: logistic regression for classes, ridge regression onto the circle for angles. Its L2 penalty is
picked by cross-validation within the training part, folds by device, or by clip where devices are the classes.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cdc_mmpg.data.interface import Content, Controls
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.results import RESULTS, write_json
from cdc_mmpg.training.reopen import folder_of, identity, is_done, provenance_of, reopen, results_of, run_evaluation
from cdc_mmpg.training.sessions import SessionDataModule

logger = logging.getLogger(__name__)

EVALUATION_NAME = "privacy"
WEIGHTS = "best.ckpt"

UPLOAD_SIZES = (1, 4, 8, 16)  # of clips in an upload
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights, beside a mean loss
FOLDS = 4
MAX_STEPS = 1000  # of L-BFGS, for a probe
BOOTSTRAP_DRAWS = 1000  # of the bootstrap over devices
TRAINING_SHARE = 1 / 3  # of a seen device's clips, where devices are told apart; its other clips are the test's
TRAINING_REPEATS = 4  # in training, how often each clip is the first of a mean, each time with others

Array = NDArray[np.float64]
Places = NDArray[np.int64]


class Uploads(NamedTuple):
    """Means of anchors of a device each."""

    features: Array  # (U, 192)
    first: Places  # (U,) the clip that content is asked about
    devices: Places  # (U,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe what a run uploads; returns the exit code (see `errors`)."""
    return run_evaluation(
        EVALUATION_NAME,
        "what an upload reveals: linear probes on what devices upload",
        "that answers questions",
        evaluate,
        arguments,
    )


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write the probes' figures, unless they are there.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: it answers no questions, or the dataset does not know what its clips show.
    """
    results_of(run)
    folder, source = folder_of(run, EVALUATION_NAME), provenance_of(run, WEIGHTS)
    if is_done(folder, source):
        return
    experiment = reopen(run)

    model, data = experiment.model, experiment.dataset
    if not isinstance(model, Answering):
        raise ConfigError(f"{run}: answers no questions, so no device uploads for it (METHOD=cdc_mmpg_session)")
    knows_contents = isinstance(data, Controls)
    if not knows_contents:
        raise ConfigError(
            f"{type(data).__name__} does not know what its clips show: only the embedded dataset (synthetic) does"
        )
    start = perf_counter()
    model.load_state_dict(load_checkpoint(run / WEIGHTS)["state_dict"])
    data.prepare_data()
    data.setup("test")
    sessions, contents = data.sessions(), data.contents()
    view = SessionDataModule(data, model.encoder.eval(), model.head, model.upload)
    view.trainer = experiment.trainer
    anchors = view.anchors("anchors", sessions.anchors, sessions.fingerprint).double().numpy()
    shown = [contents[sample.clip] for sample in sessions.anchors.samples]
    with threadpool_limits(1):  # products are tiny here: further threads only wait for each other
        probes = probe_all(anchors, sessions.pools, sessions.casts, shown, data.seed)
    write_json(
        {
            **identity(folder, experiment, source, arguments),
            "floats": int(anchors.shape[-1]),
            "clips": len(shown),
            "probes": probes,
            "seconds": {"train": 0.0, "test": perf_counter() - start},
        },
        folder / RESULTS,
    )
    print(f"written: {folder / RESULTS}")


class Target(NamedTuple):
    """What a probe tells from an upload.

    Classes are whole numbers (N,), presence is truth values (N, K), angles are degrees (N,).
    """

    what: str
    kind: str  # "classes", "presence" or "angle"
    values: NDArray[Any]  # by clip, of whose upload it is asked; by device where `of_device`
    classes: int = 0
    of_device: bool = False
    asked: NDArray[np.bool_] | None = None  # which clips it can be asked of; None is all


def probe_all(
    anchors: Array, pools: Sequence[Sequence[int]], casts: Sequence[float], shown: Sequence["Content"], seed: int
) -> list[dict[str, Any]]:
    """Return the figures of all probes that there are clips enough for.

    Args:
        anchors: (A, 192) anchor features.
        pools: by device, its anchors.
        casts: by device, in degrees.
        shown: by anchor, what it shows.
        seed: of the draws.

    Raises:
        DataError: no device trains, or all do.
    """
    seen = [device for device, pool in enumerate(pools) if pool and shown[pool[0]].seen]
    others = [device for device, pool in enumerate(pools) if pool and not shown[pool[0]].seen]
    if not seen or not others:
        raise DataError("probes learn from devices that train and are tested on others: here is one kind only")
    whole = {device: list(pool) for device, pool in enumerate(pools)}
    found = [
        _probe_identity(anchors, {device: whole[device] for device in seen}, number, seed) for number in UPLOAD_SIZES
    ]
    for target in _list_targets(casts, shown):
        for number in UPLOAD_SIZES:
            if number == 1 or target.of_device or target.what in AFTER_AVERAGING:
                train = draw_uploads(anchors, {d: whole[d] for d in seen}, number, TRAINING_REPEATS, seed, target.asked)
                test = draw_uploads(anchors, {d: whole[d] for d in others}, number, 1, seed, target.asked)
                found.append(_probe(target, train, test, number, seed))
    return [probe for probe in found if probe is not None]


AFTER_AVERAGING = ("shape present", "look present", "background")  # of the first clip of a mean


def _list_targets(casts: Sequence[float], shown: Sequence["Content"]) -> list[Target]:
    """Return all targets but the device's identity."""
    shapes = sorted({shape for content in shown for shape in content.shapes})
    colors = sorted({color for content in shown for color in (*content.colors, *content.looks)})
    alone = np.array([len(content.shapes) == 1 for content in shown])

    def classes(what: str, names: Sequence[str], values: Sequence[str]) -> Target:
        return Target(what, "classes", np.array([names.index(value) for value in values]), len(names), asked=alone)

    def presence(what: str, names: Sequence[str], values: Sequence[Sequence[str]]) -> Target:
        return Target(what, "presence", np.array([[name in value for name in names] for value in values]))

    return [
        Target("cast", "angle", np.array(casts), of_device=True),
        Target("count", "classes", np.array([len(content.shapes) - 1 for content in shown]), 2),
        classes("shape", shapes, [content.shapes[0] for content in shown]),
        classes("true color", colors, [content.colors[0] for content in shown]),
        classes("look", colors, [content.looks[0] for content in shown]),
        Target("background", "angle", np.array([content.background for content in shown])),
        presence("shape present", shapes, [content.shapes for content in shown]),
        presence("look present", colors, [content.looks for content in shown]),
    ]


def _probe_identity(anchors: Array, pools: dict[int, list[int]], number: int, seed: int) -> dict[str, Any] | None:
    """Probe which of these devices sent an upload, learned from a part of the clips of each."""
    learned, asked = {}, {}
    for device, pool in pools.items():
        order = np.random.default_rng((seed, device)).permutation(pool).tolist()
        cut = max(1, round(len(order) * TRAINING_SHARE))
        learned[device], asked[device] = order[:cut], order[cut:]
    most = max(1, min(map(len, learned.values())) // 2)  # so that means of a few clips differ
    train = draw_uploads(anchors, learned, min(number, most), TRAINING_REPEATS, seed)
    test = draw_uploads(anchors, asked, number, 1, seed)
    names = {device: place for place, device in enumerate(pools)}
    values = np.array([names.get(device, -1) for device in range(max(pools) + 1)])
    return _probe(Target("device", "classes", values, len(names), of_device=True), train, test, number, seed)


def draw_uploads(
    anchors: Array,
    pools: dict[int, list[int]],
    number: int,
    repeats: int,
    seed: int,
    asked: NDArray[np.bool_] | None = None,
) -> Uploads:
    """Draw uploads: every clip of every device as the first of `number`, the others drawn from the device's.

    Args:
        anchors: (A, 192).
        pools: by device, its anchors; a device with fewer has no upload.
        number: of clips in an upload.
        repeats: how often, with other draws each time.
        seed: of the draws.
        asked: (A,) which clips can be the first.
    """
    features, first, devices = [], [], []
    for device, pool in pools.items():
        if len(pool) < number:
            continue
        generator = np.random.default_rng((seed, device, number))
        for _ in range(repeats if number > 1 else 1):
            for clip in pool:
                if asked is None or asked[clip]:
                    rest = generator.permutation([other for other in pool if other != clip])[: number - 1]
                    features.append(anchors[[clip, *rest.tolist()]].mean(0))
                    first.append(clip)
                    devices.append(device)
    return Uploads(np.array(features), np.array(first, np.int64), np.array(devices, np.int64))


def _probe(target: Target, train: Uploads, test: Uploads, number: int, seed: int) -> dict[str, Any] | None:
    """Learn a target from uploads and tell it from others; None where there are none."""
    if not len(train.features) or not len(test.features):
        return None
    if target.of_device:  # the same clips in another order are the same upload
        rows = np.round(np.column_stack([test.devices, test.features]), 9)
        kept = np.unique(rows, axis=0, return_index=True)[1]
        test = Uploads(test.features[kept], test.first[kept], test.devices[kept])
    wanted, true = (target.values[part.devices if target.of_device else part.first] for part in (train, test))
    groups = train.first if target.what == "device" else train.devices
    folds = min(FOLDS, len(np.unique(groups)))
    splits = (
        GroupKFold(folds, shuffle=True, random_state=seed).split(train.features, groups=groups) if folds > 1 else ()
    )
    sign = -1.0 if target.kind == "angle" else 1.0
    parts: dict[float, list[Array]] = {penalty: [] for penalty in PENALTIES}
    for inside, outside in splits:
        for penalty in PENALTIES:
            outputs = fit_probe(target, train.features[inside], wanted[inside], penalty)(train.features[outside])
            parts[penalty].append(score_outputs(target, outputs, wanted[outside]))
    figures = [sign * float(np.concatenate(scores).mean()) if scores else 0.0 for scores in parts.values()]
    penalty = PENALTIES[int(np.argmax(figures))]
    outputs = fit_probe(target, train.features, wanted, penalty)(test.features)
    scores = score_outputs(target, outputs, true)
    low, high = bootstrap_interval(scores, test.devices, seed)
    unit = "degrees" if target.kind == "angle" else "accuracy"
    found = {
        "what": target.what,
        "from": "one clip" if number == 1 else f"mean of {number}",
        "clips": number,
        unit: float(scores.mean()),
        "low": low,
        "high": high,
        "chance": {"classes": 1 / max(1, target.classes), "presence": 0.5, "angle": 90.0}[target.kind],
        "majority": float(score_outputs(target, ignore_uploads(target, wanted, len(true)), true).mean()),
        "number": len(true),
        "devices": len(np.unique(test.devices)),
        "learned_from": len(wanted),
        "penalty": penalty,
    }
    if target.kind == "presence":
        found["area_under_curve"] = area_under_curve(outputs, true)
    logger.info("%s from %s: %s %.3f", target.what, found["from"], unit, found[unit])
    return found


def fit_probe(target: Target, features: Array, values: NDArray[Any], penalty: float) -> Callable[[Array], Array]:
    """Return a learned linear probe: from features (M, 192) to scores (M, C), logits (M, K), or cosine and sine (M, 2).

    Features are standardised by those that it learns from. Scores of classes that it has not seen are -inf.

    Args:
        target: what it tells.
        features: (N, 192) to learn from.
        values: theirs, see `Target`.
        penalty: weight of half the squared weights, beside the mean loss; scikit-learn's own are beside its sum.
    """
    scaler = StandardScaler().fit(features)
    inputs = scaler.transform(features)
    if target.kind == "angle":
        angles = np.deg2rad(values)
        ridge = Ridge(alpha=penalty * len(inputs)).fit(inputs, np.column_stack([np.cos(angles), np.sin(angles)]))
        return lambda rows: ridge.predict(scaler.transform(rows))
    if target.kind == "presence":  # the mean is over clips and over what is present
        logistic = LogisticRegression(C=1 / (penalty * values.size), max_iter=MAX_STEPS)
        with warnings.catch_warnings():  # that a fold shows something in every clip or in none
            warnings.simplefilter("ignore", UserWarning)
            several = OneVsRestClassifier(logistic).fit(inputs, values.astype(np.int64))
        return lambda rows: several.decision_function(scaler.transform(rows)).reshape(len(rows), -1)
    present = np.unique(values)
    if len(present) == 1:
        return lambda rows: ignore_uploads(target, values, len(rows))
    # Of two classes scikit-learn has one vector of weights: half its squares are the squares of one for each class.
    halved = 2 if len(present) == 2 else 1
    logistic = LogisticRegression(C=halved / (penalty * len(inputs)), max_iter=MAX_STEPS).fit(inputs, values)

    def scores(rows: Array) -> Array:
        found = np.full((len(rows), target.classes), -np.inf)
        decided = logistic.decision_function(scaler.transform(rows))
        found[:, present] = np.column_stack([-decided, decided]) / 2 if decided.ndim == 1 else decided
        return found

    return scores


def score_outputs(target: Target, outputs: Array, values: NDArray[Any]) -> Array:
    """Return whether each is right, the share of its truth values that are, or its error in degrees, (M,)."""
    if target.kind == "angle":
        angles = np.rad2deg(np.arctan2(outputs[:, 1], outputs[:, 0]))
        wrong: Array = np.abs((angles - values + 180) % 360 - 180)
        return wrong
    if target.kind == "presence":
        share: Array = ((outputs > 0) == values).mean(1)
        return share
    return (outputs.argmax(1) == values).astype(np.float64)


def ignore_uploads(target: Target, values: NDArray[Any], number: int) -> Array:
    """Return outputs that know no upload: the most frequent class or truth value, the mean angle, of training."""
    if target.kind == "angle":
        angles = np.deg2rad(values)
        row = np.array([np.cos(angles).mean(), np.sin(angles).mean()])
    elif target.kind == "presence":
        row = values.mean(0) - 0.5
    else:
        row = np.bincount(values, minlength=target.classes).astype(np.float64)
    return np.tile(row, (number, 1))


def area_under_curve(outputs: Array, values: NDArray[Any]) -> float:
    """Return how often something present scores higher than something absent; mean over the K, 0.5 for chance."""
    areas = [
        float(roc_auc_score(present, scores))
        for scores, present in zip(outputs.T, values.T.astype(bool), strict=True)
        if 0 < present.sum() < len(present)
    ]
    return float(np.mean(areas)) if areas else 0.5


def bootstrap_interval(scores: Array, devices: Places, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, the devices resampled with all of their uploads."""
    _, places = np.unique(devices, return_inverse=True)
    sums, counts = np.bincount(places, scores), np.bincount(places)
    times = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), BOOTSTRAP_DRAWS)
    low, high = np.percentile((times @ sums) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)
