"""What an upload reveals: linear probes on anchor features, of one clip and of the mean of several.

`cdc-mmpg privacy checkpoints/<dataset>/encoder_pretraining/seed<N>` takes the encoder that a finished run left,
computes the anchor features of all unlabelled clips as devices do (one frame, a neutral prompt: 192 floats), and
writes `checkpoints/<dataset>/privacy/seed<N>/results.json`. Whoever reads uploads is given labels to learn from:

- of the device: which of the seen devices sent it (uploads of other clips of the same devices to learn from), and its
  cast, in degrees (other devices to learn from);
- of the content, always learned from the seen devices and tested on others: how many objects, which shape and colour a
  single object has, as it is and as it looks, and the background's hue as it looks; of a mean, whether the first of its
  clips shows a shape or a colour, and that clip's background.

A probe is linear: logistic regression for classes, ridge regression onto the circle for angles. Its L2 penalty is
picked by cross-validation within the training part, folds by device, or by clip where devices are the classes.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.files import lock_folder
from cdc_mmpg.program import exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import RESULTS, write_json
from cdc_mmpg.training.reopen import folder_of, identity, is_done, provenance_of, reopen, results_of

if TYPE_CHECKING:
    from cdc_mmpg.data.interface import Content

logger = logging.getLogger(__name__)

NAME = "privacy"
WEIGHTS = "encoder.safetensors"

NUMBERS = (1, 4, 8, 16)  # of clips in an upload
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights, beside a mean loss
FOLDS = 4
DRAWS = 1000  # of the bootstrap over devices
LEARNED_FROM = 1 / 3  # of a seen device's clips, where devices are told apart; its other clips are the test's
REPEATS = 4  # in training, how often each clip is the first of a mean, each time with others

Array = NDArray[np.float64]
Places = NDArray[np.int64]


class Uploads(NamedTuple):
    """Means of anchors of a device each."""

    features: Array  # (U, 192)
    first: Places  # (U,) the clip that content is asked about
    devices: Places  # (U,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe a run's encoder; returns the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="what an upload reveals: linear probes on anchor features")
    parser.add_argument("run", type=Path, help="folder of a finished run that left an encoder")
    options = parser.parse_args(arguments)
    log_to_terminal()
    leave_on_signals()

    def run() -> None:
        results_of(options.run)  # before the evaluation's folder is made
        with lock_folder(folder_of(options.run, NAME)):
            evaluate(options.run, arguments)

    return exit_code(run)


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write the probes' figures, unless they are there.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: it left no encoder, or the dataset does not know what its clips show.
    """
    results_of(run)
    if not (run / WEIGHTS).is_file():
        raise ConfigError(f"{run}: left no {WEIGHTS}; take a run of encoder_pretraining or fine_tuning")
    folder, source = folder_of(run, NAME), provenance_of(run, WEIGHTS)
    if is_done(folder, source):
        return
    experiment = reopen(run)

    from cdc_mmpg.data.interface import Controls  # noqa: PLC0415  see `cli`
    from cdc_mmpg.models.weights import read_state_dict  # noqa: PLC0415
    from cdc_mmpg.training.sessions import SessionDataModule  # noqa: PLC0415

    model, data = experiment.model, experiment.dataset
    knows_contents = isinstance(data, Controls)
    if not knows_contents:
        raise ConfigError(
            f"{type(data).__name__} does not know what its clips show: only the embedded dataset (synthetic) does"
        )
    start = perf_counter()
    encoder = model.encoder
    encoder.load_state_dict(read_state_dict(run / WEIGHTS))
    data.prepare_data()
    data.setup("test")
    sessions, contents = data.sessions(), data.contents()
    view = SessionDataModule(data, encoder, model.head)
    view.trainer = experiment.trainer
    anchors = view.anchors(sessions).double().numpy()
    shown = [contents[sample.clip] for sample in sessions.anchors.samples]
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
    """The figures of all probes that there are clips enough for.

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
    found = [_identity(anchors, {device: whole[device] for device in seen}, number, seed) for number in NUMBERS]
    for target in _targets(casts, shown):
        for number in NUMBERS:
            if number == 1 or target.of_device or target.what in AFTER_AVERAGING:
                train = uploads(anchors, {d: whole[d] for d in seen}, number, REPEATS, seed, target.asked)
                test = uploads(anchors, {d: whole[d] for d in others}, number, 1, seed, target.asked)
                found.append(_probe(target, train, test, number, seed))
    return [probe for probe in found if probe is not None]


AFTER_AVERAGING = ("shape present", "look present", "background")  # of the first clip of a mean


def _targets(casts: Sequence[float], shown: Sequence["Content"]) -> list[Target]:
    """Everything but the device's identity."""
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


def _identity(anchors: Array, pools: dict[int, list[int]], number: int, seed: int) -> dict[str, Any] | None:
    """Which of these devices sent an upload, learned from a part of the clips of each."""
    learned, asked = {}, {}
    for device, pool in pools.items():
        order = np.random.default_rng((seed, device)).permutation(pool).tolist()
        cut = max(1, round(len(order) * LEARNED_FROM))
        learned[device], asked[device] = order[:cut], order[cut:]
    most = max(1, min(map(len, learned.values())) // 2)  # so that means of a few clips differ
    train = uploads(anchors, learned, min(number, most), REPEATS, seed)
    test = uploads(anchors, asked, number, 1, seed)
    names = {device: place for place, device in enumerate(pools)}
    values = np.array([names.get(device, -1) for device in range(max(pools) + 1)])
    return _probe(Target("device", "classes", values, len(names), of_device=True), train, test, number, seed)


def uploads(
    anchors: Array,
    pools: dict[int, list[int]],
    number: int,
    repeats: int,
    seed: int,
    asked: NDArray[np.bool_] | None = None,
) -> Uploads:
    """Every clip of every device as the first of `number`, the others drawn from the device's.

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
    fold_of = {group: place for place, group in enumerate(np.random.default_rng(seed).permutation(np.unique(groups)))}
    folds = np.array([fold_of[group] % FOLDS for group in groups.tolist()])
    sign = -1.0 if target.kind == "angle" else 1.0
    figures = []
    for penalty in PENALTIES:
        parts = []
        for fold in np.unique(folds):
            inside, outside = folds != fold, folds == fold
            if inside.any():
                outputs = fit(target, train.features[inside], wanted[inside], penalty)(train.features[outside])
                parts.append(score(target, outputs, wanted[outside]))
        figures.append(sign * float(np.concatenate(parts).mean()) if parts else 0.0)
    penalty = PENALTIES[int(np.argmax(figures))]
    outputs = fit(target, train.features, wanted, penalty)(test.features)
    scores = score(target, outputs, true)
    low, high = interval(scores, test.devices, seed)
    unit = "degrees" if target.kind == "angle" else "accuracy"
    found = {
        "what": target.what,
        "from": "one clip" if number == 1 else f"mean of {number}",
        "clips": number,
        unit: float(scores.mean()),
        "low": low,
        "high": high,
        "chance": {"classes": 1 / max(1, target.classes), "presence": 0.5, "angle": 90.0}[target.kind],
        "majority": float(score(target, constant(target, wanted, len(true)), true).mean()),
        "number": len(true),
        "devices": len(np.unique(test.devices)),
        "learned_from": len(wanted),
        "penalty": penalty,
    }
    if target.kind == "presence":
        found["area_under_curve"] = area_under_curve(outputs, true)
    logger.info("%s from %s: %s %.3f", target.what, found["from"], unit, found[unit])
    return found


def fit(target: Target, features: Array, values: NDArray[Any], penalty: float) -> Callable[[Array], Array]:
    """A linear probe, learned: from features (M, 192) to scores (M, C), logits (M, K), or cosine and sine (M, 2).

    Features are standardised by those that it learns from.
    """
    import torch  # noqa: PLC0415  see `cli`
    import torch.nn.functional as F  # noqa: PLC0415

    mean, deviation = features.mean(0), features.std(0) + 1e-8

    def inputs(rows: Array) -> Array:
        return np.column_stack([(rows - mean) / deviation, np.ones(len(rows))])

    own = inputs(features)
    if target.kind == "angle":
        angles = np.deg2rad(values)
        normal = own.T @ own / len(own) + penalty * np.diag([1.0] * (own.shape[1] - 1) + [0.0])
        solved: Array = np.linalg.solve(normal, own.T @ np.column_stack([np.cos(angles), np.sin(angles)]) / len(own))
        return lambda rows: inputs(rows) @ solved
    rows, wanted = torch.from_numpy(own).float(), torch.from_numpy(values)
    weights = torch.zeros(own.shape[1], target.classes or values.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        scores = rows @ weights
        mistakes = (
            F.cross_entropy(scores, wanted)
            if target.kind == "classes"
            else F.binary_cross_entropy_with_logits(scores, wanted.float())
        )
        total = mistakes + penalty * weights[:-1].square().sum() / 2
        total.backward()
        return float(total.detach())

    optimizer.step(loss)
    learned: Array = weights.detach().double().numpy()
    return lambda rows: inputs(rows) @ learned


def score(target: Target, outputs: Array, values: NDArray[Any]) -> Array:
    """(M,) whether each is right, the share of its truth values that are, or by how many degrees it is wrong."""
    if target.kind == "angle":
        angles = np.rad2deg(np.arctan2(outputs[:, 1], outputs[:, 0]))
        wrong: Array = np.abs((angles - values + 180) % 360 - 180)
        return wrong
    if target.kind == "presence":
        share: Array = ((outputs > 0) == values).mean(1)
        return share
    return (outputs.argmax(1) == values).astype(np.float64)


def constant(target: Target, values: NDArray[Any], number: int) -> Array:
    """Outputs that know no upload: the most frequent class or truth value, the mean angle, of training."""
    if target.kind == "angle":
        angles = np.deg2rad(values)
        row = np.array([np.cos(angles).mean(), np.sin(angles).mean()])
    elif target.kind == "presence":
        row = values.mean(0) - 0.5
    else:
        row = np.bincount(values, minlength=target.classes).astype(np.float64)
    return np.tile(row, (number, 1))


def area_under_curve(outputs: Array, values: NDArray[Any]) -> float:
    """How often something present scores higher than something absent; mean over the K, 0.5 for chance."""
    areas = []
    for scores, there in zip(outputs.T, values.T.astype(bool), strict=True):
        positive, negative = np.sort(scores[there]), scores[~there]
        if len(positive) and len(negative):
            above = len(positive) - np.searchsorted(positive, negative, side="right")
            level = np.searchsorted(positive, negative, side="right") - np.searchsorted(positive, negative)
            areas.append(float((above + level / 2).mean() / len(positive)))
    return float(np.mean(areas)) if areas else 0.5


def interval(scores: Array, devices: Places, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean, the devices resampled with all of their uploads."""
    _, places = np.unique(devices, return_inverse=True)
    sums, counts = np.bincount(places, scores), np.bincount(places)
    times = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), DRAWS)
    low, high = np.percentile((times @ sums) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
