"""Control: linear probes that measure what an upload reveals, for single clips and for means of several.

`cdc-mmpg privacy checkpoints/<dataset>/cdc_mmpg_session/seed<N>` computes the uploads of all unlabelled clips with a
finished run, as devices do (one frame, a neutral prompt: 192 floats; readings for sessions), and writes
`checkpoints/<dataset>/privacy/seed<N>/results.json`. The attacker has labels to learn from. The targets are:

- about the device: which of the seen devices sent the upload (trained on other clips of the same devices), and its
  cast in degrees (trained on other devices);
- about the content, trained on seen devices and tested on others: number of objects, shape, true colour and apparent
  colour of a single object, and the apparent hue of the background; for a mean, whether its first clip shows a shape
  or a colour, and the background of that clip.

All probes are linear: logistic regression for classes, ridge regression onto the circle for angles. The L2 penalty is
selected by cross-validation within the training part, with folds by device, or by clip if devices are the classes.
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

from cdc_mmpg.data.interface import Content, DescribesClips
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.results import RESULTS, describe_provenance, write_json
from cdc_mmpg.training.reopen import (
    identify_run,
    is_done,
    load_finished_results,
    locate_evaluation,
    reopen,
    run_evaluation,
)
from cdc_mmpg.training.sessions import SessionDataModule
from cdc_mmpg.training.wandb_record import record_evaluation

logger = logging.getLogger(__name__)

NAME = "privacy"

UPLOAD_SIZES = (1, 4, 8, 16)  # clips per upload
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # weights of the L2 penalty relative to the mean loss
CROSS_VALIDATION_FOLDS = 4
MAX_STEPS = 1000  # L-BFGS steps per probe
BOOTSTRAP_DRAWS = 1000  # draws over devices
TRAINING_SHARE = 1 / 3  # share of a seen device's clips that train the identity probe; the others test it
TRAINING_REPEATS = 4  # training means per first clip, each with other further clips

Array = NDArray[np.float64]
Places = NDArray[np.int64]


class Uploads(NamedTuple):
    """Uploads: means of anchors, each of one device."""

    features: Array  # (U, 192)
    first: Places  # (U,) first clip of each mean, the one whose content is probed
    devices: Places  # (U,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe the uploads of a run; return the exit code (see `errors`)."""
    return run_evaluation(
        NAME,
        "linear probes that measure what an upload reveals",
        "that answers questions",
        evaluate,
        arguments,
    )


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write the results of the probes, unless they exist.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: the run answers no questions, or the dataset does not know what its clips show.
    """
    load_finished_results(run)
    folder, source = locate_evaluation(run, NAME), identify_run(run)
    if is_done(folder, source):
        return
    experiment = reopen(run)

    model, data = experiment.model, experiment.dataset
    if not isinstance(model, Answering):
        raise ConfigError(f"{run}: answers no questions, so it has no uploads to probe (use METHOD=cdc_mmpg_session)")
    knows_contents = isinstance(data, DescribesClips)
    if not knows_contents:
        raise ConfigError(f"{type(data).__name__} does not know what its clips show: only the synthetic dataset does")
    start = perf_counter()
    data.prepare_data()
    data.setup("test")
    sessions, contents = data.sessions(), data.contents()
    view = SessionDataModule(data, model.encoder.eval(), model.head, model.upload)
    view.trainer = experiment.trainer
    anchors = view.anchors("anchors", sessions.anchors, sessions.fingerprint).double().numpy()
    shown = [contents[sample.clip] for sample in sessions.anchors.samples]
    with threadpool_limits(1):  # the matrices are too small to benefit from threads
        probes = probe_all(anchors, sessions.pools, sessions.casts, shown, data.seed)
    written = {
        **experiment.describe(folder, arguments),
        **describe_provenance(),
        "made_of": source,
        "devices": "1 x cpu",
        "floats": int(anchors.shape[-1]),
        "clips": len(shown),
        "probes": probes,
        "seconds": {"train": 0.0, "test": perf_counter() - start},
    }
    write_json(written, folder / RESULTS)
    print(f"written: {folder / RESULTS}")
    record_evaluation(run, folder, written)


class Target(NamedTuple):
    """Property that a probe predicts from an upload.

    Classes are integers (N,), presence is Boolean (N, K), angles are in degrees (N,).
    """

    name: str
    kind: str  # "classes", "presence" or "angle"
    values: NDArray[Any]  # true values by clip; by device if `of_device`
    classes: int = 0  # number of classes
    of_device: bool = False  # whether this is a property of the device
    asked: NDArray[np.bool_] | None = None  # clips for which the property is defined; None is all


def probe_all(
    anchors: Array, pools: Sequence[Sequence[int]], casts: Sequence[float], shown: Sequence["Content"], seed: int
) -> list[dict[str, Any]]:
    """Return the results of all probes with enough clips.

    Args:
        anchors: (A, 192) anchor features.
        pools: indices of the anchors of each device.
        casts: hue cast of each device in degrees.
        shown: content of each anchor.
        seed: seed of the draws.

    Raises:
        DataError: there are no seen or no unseen devices.
    """
    seen = [device for device, pool in enumerate(pools) if pool and shown[pool[0]].seen]
    others = [device for device, pool in enumerate(pools) if pool and not shown[pool[0]].seen]
    if not seen or not others:
        raise DataError("probes train on seen devices and are tested on unseen ones: the dataset has only one kind")
    rows = {device: list(pool) for device, pool in enumerate(pools)}
    results = [
        _probe_identity(anchors, {device: rows[device] for device in seen}, number, seed) for number in UPLOAD_SIZES
    ]
    for target in _list_targets(casts, shown):
        for number in UPLOAD_SIZES:
            if number == 1 or target.of_device or target.name in AFTER_AVERAGING:
                train = draw_uploads(anchors, {d: rows[d] for d in seen}, number, TRAINING_REPEATS, seed, target.asked)
                test = draw_uploads(anchors, {d: rows[d] for d in others}, number, 1, seed, target.asked)
                results.append(_probe(target, train, test, number, seed))
    return [result for result in results if result is not None]


AFTER_AVERAGING = ("shape present", "look present", "background")  # content targets also probed in means


def _list_targets(casts: Sequence[float], shown: Sequence["Content"]) -> list[Target]:
    """Return all targets except the identity of the device."""
    shapes = sorted({shape for content in shown for shape in content.shapes})
    colors = sorted({color for content in shown for color in (*content.colors, *content.seen_colors)})
    alone = np.array([len(content.shapes) == 1 for content in shown])

    def classes(name: str, names: Sequence[str], values: Sequence[str]) -> Target:
        return Target(name, "classes", np.array([names.index(value) for value in values]), len(names), asked=alone)

    def presence(name: str, names: Sequence[str], values: Sequence[Sequence[str]]) -> Target:
        return Target(name, "presence", np.array([[option in value for option in names] for value in values]))

    return [
        Target("cast", "angle", np.array(casts), of_device=True),
        Target("count", "classes", np.array([len(content.shapes) - 1 for content in shown]), 2),
        classes("shape", shapes, [content.shapes[0] for content in shown]),
        classes("true color", colors, [content.colors[0] for content in shown]),
        classes("look", colors, [content.seen_colors[0] for content in shown]),
        Target("background", "angle", np.array([content.background for content in shown])),
        presence("shape present", shapes, [content.shapes for content in shown]),
        presence("look present", colors, [content.seen_colors for content in shown]),
    ]


def _probe_identity(anchors: Array, pools: dict[int, list[int]], number: int, seed: int) -> dict[str, Any] | None:
    """Probe which of these devices sent an upload; train on a part of the clips of each device, test on the rest."""
    training, testing = {}, {}
    for device, pool in pools.items():
        order = np.random.default_rng((seed, device)).permutation(pool).tolist()
        cut = max(1, round(len(order) * TRAINING_SHARE))
        training[device], testing[device] = order[:cut], order[cut:]
    limit = max(1, min(map(len, training.values())) // 2)  # larger means of few clips would hardly differ
    train = draw_uploads(anchors, training, min(number, limit), TRAINING_REPEATS, seed)
    test = draw_uploads(anchors, testing, number, 1, seed)
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
    """Draw uploads: means of `number` clips, with every clip of a device once the first and random further clips.

    Args:
        anchors: (A, 192) anchor features.
        pools: indices of the anchors by device; devices with fewer than `number` have no upload.
        number: number of clips in an upload.
        repeats: number of uploads per first clip, each with new draws.
        seed: seed of the draws.
        asked: (A,) whether each clip can be the first; None is all.
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
    """Train a probe on uploads and return its test results; None if there are no uploads to train or test on."""
    if not len(train.features) or not len(test.features):
        return None
    if target.of_device:  # means of the same clips in another order are duplicates
        rows = np.round(np.column_stack([test.devices, test.features]), 9)
        kept = np.unique(rows, axis=0, return_index=True)[1]
        test = Uploads(test.features[kept], test.first[kept], test.devices[kept])
    wanted, true = (target.values[part.devices if target.of_device else part.first] for part in (train, test))
    groups = train.first if target.name == "device" else train.devices
    folds = min(CROSS_VALIDATION_FOLDS, len(np.unique(groups)))
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
    result = {
        "what": target.name,
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
        result["area_under_curve"] = area_under_curve(outputs, true)
    logger.info("%s from %s: %s %.3f", target.name, result["from"], unit, result[unit])
    return result


def fit_probe(target: Target, features: Array, values: NDArray[Any], penalty: float) -> Callable[[Array], Array]:
    """Fit a linear probe; return its map from features (M, 192) to scores (M, C), logits (M, K) or cosine, sine (M, 2).

    Features are standardised with the statistics of the training features. Scores of unseen classes are -inf.

    Args:
        target: property to predict.
        features: (N, 192) training features.
        values: true values of the training features, see `Target`.
        penalty: weight of half the squared weights relative to the mean loss; scikit-learn's is relative to the sum.
    """
    scaler = StandardScaler().fit(features)
    inputs = scaler.transform(features)
    if target.kind == "angle":
        angles = np.deg2rad(values)
        ridge = Ridge(alpha=penalty * len(inputs)).fit(inputs, np.column_stack([np.cos(angles), np.sin(angles)]))
        return lambda rows: ridge.predict(scaler.transform(rows))
    if target.kind == "presence":  # the mean is over clips and over labels
        logistic = LogisticRegression(C=1 / (penalty * values.size), max_iter=MAX_STEPS)
        with warnings.catch_warnings():  # about labels that all or no clips of a fold have
            warnings.simplefilter("ignore", UserWarning)
            classifiers = OneVsRestClassifier(logistic).fit(inputs, values.astype(np.int64))
        return lambda rows: classifiers.decision_function(scaler.transform(rows)).reshape(len(rows), -1)
    present = np.unique(values)
    if len(present) == 1:
        return lambda rows: ignore_uploads(target, values, len(rows))
    # For two classes scikit-learn has one weight vector w, equivalent to w/2 and -w/2: half the squared weights.
    halved = 2 if len(present) == 2 else 1
    logistic = LogisticRegression(C=halved / (penalty * len(inputs)), max_iter=MAX_STEPS).fit(inputs, values)

    def scores(rows: Array) -> Array:
        outputs = np.full((len(rows), target.classes), -np.inf)
        decided = logistic.decision_function(scaler.transform(rows))
        outputs[:, present] = np.column_stack([-decided, decided]) / 2 if decided.ndim == 1 else decided
        return outputs

    return scores


def score_outputs(target: Target, outputs: Array, values: NDArray[Any]) -> Array:
    """Return a score per upload (M,): correctness, share of correct labels, or error in degrees."""
    if target.kind == "angle":
        angles = np.rad2deg(np.arctan2(outputs[:, 1], outputs[:, 0]))
        errors: Array = np.abs((angles - values + 180) % 360 - 180)
        return errors
    if target.kind == "presence":
        share: Array = ((outputs > 0) == values).mean(1)
        return share
    return (outputs.argmax(1) == values).astype(np.float64)


def ignore_uploads(target: Target, values: NDArray[Any], number: int) -> Array:
    """Return outputs that ignore the uploads: the most frequent class or label, or mean angle, of training."""
    if target.kind == "angle":
        angles = np.deg2rad(values)
        row = np.array([np.cos(angles).mean(), np.sin(angles).mean()])
    elif target.kind == "presence":
        row = values.mean(0) - 0.5
    else:
        row = np.bincount(values, minlength=target.classes).astype(np.float64)
    return np.tile(row, (number, 1))


def area_under_curve(outputs: Array, values: NDArray[Any]) -> float:
    """Return the area under the ROC curve, averaged over the K labels; 0.5 is chance."""
    areas = [
        float(roc_auc_score(present, scores))
        for scores, present in zip(outputs.T, values.T.astype(bool), strict=True)
        if 0 < present.sum() < len(present)
    ]
    return float(np.mean(areas)) if areas else 0.5


def bootstrap_interval(scores: Array, devices: Places, seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap percentile interval of the mean score, resampling devices with all their uploads."""
    _, places = np.unique(devices, return_inverse=True)
    sums, counts = np.bincount(places, scores), np.bincount(places)
    times = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), BOOTSTRAP_DRAWS)
    low, high = np.percentile((times @ sums) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)
