"""What a device could do by itself, with backpropagation and without a cloud: the opponents of the method.

`cdc-mmpg on_device checkpoints/<dataset>/fine_tuning/seed<N>` starts from a finished fine-tuning run, for every device
anew, and writes `checkpoints/<dataset>/on_device/seed<N>/results.json`:

- `own`: the run's weights as they are;
- `labels_2`, `labels_5`, `labels_15`: fine-tuned on so many labelled questions about the device's own clips, which no
  method has (see `interface.DeviceLabels`);
- `tent`: entropy minimisation over the test questions themselves (Wang et al. 2021, "Tent: Fully Test-Time Adaptation
  by Entropy Minimization");
- `t3a`, `lame`, `foa`: what adapts to the test questions by forward passes alone (`forward_only`).

No test question decides a recipe. For labels, each device's is picked on other devices: by how their further labelled
questions are answered, which is more than a real device could know. The validation devices will not do: the run's
epoch was picked on their questions, which favours weights that stay as they are. For what has no labels they do. The
grids and their figures stand in the results.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cdc_mmpg.controls.forward_only import (
    adjust_prototypes,
    entropy,
    shift_activations,
    smooth_over_neighbours,
)
from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, Split, VideoTextBatch
from cdc_mmpg.data.interface import Controls, SampleOrigin
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.evaluation.evaluate import evaluation
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.results import RESULTS, write_json
from cdc_mmpg.training.reopen import folder_of, identity, is_done, provenance_of, reopen, results_of, run_evaluation

logger = logging.getLogger(__name__)

NAME = "on_device"
WEIGHTS = "best.ckpt"

LABELS = (2, 5, 15)  # labelled questions of a device, the fewer among the more
# What trains on labels: what is behind the encoder's blocks, or a part of it. The encoder does not: with 15 labels of
# the embedded dataset it made validation devices worse (59.7 % became 57.8 % and less), its last block nothing better.
PARTS = {"layer": ("layer.",), "head": ("head.", "layer."), "pooler": ("encoder.pooler.", "head.", "layer.")}
RATES = (1e-4, 3e-4, 1e-3)
STEPS = (10, 30, 100)  # of AdamW on all labels at once

# Of forward passes alone, by case: members of a support (0 is all), neighbours, strength of the shift.
FORWARD_ONLY = {"t3a": (1, 5, 20, 0), "lame": (1, 3, 5), "foa": (0.25, 0.5, 1.0)}
TENT_RATES = (1e-3, 1e-2)
TENT_QUESTIONS = (5, 15)  # of a batch, after which there is a step


class Recipe(NamedTuple):
    """How a device fine-tunes."""

    parts: str  # see `PARTS`
    rate: float
    steps: int


class TentRecipe(NamedTuple):
    """How a device minimises entropy."""

    rate: float
    questions: int  # of a batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a run; returns the exit code (see `errors`)."""
    return run_evaluation(
        NAME, "what a device could do by itself, with backpropagation", "of fine-tuning", evaluate, arguments
    )


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write results and predictions, unless they are there; see `evaluate_fine_tuned`."""
    evaluate_fine_tuned(NAME, run, Comparison, arguments)


def evaluate_fine_tuned(
    name: str, run: Path, compare: Callable[[FineTuning, Any], "Comparison"], arguments: Sequence[str]
) -> None:
    """Write what a device makes of a fine-tuning run, unless it is there.

    Args:
        name: of the evaluation's folder.
        run: folder of the run.
        compare: makes the cases of the run's model and dataset.
        arguments: of the command, to keep them.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: it is not of fine-tuning on open-ended questions, or the dataset has no labels for devices.
        DataError: no device has labels, or its files changed.
    """
    results = results_of(run)
    folder, source = folder_of(run, name), provenance_of(run, WEIGHTS)
    if is_done(folder, source):
        return
    experiment = reopen(run)

    model, data = experiment.model, experiment.dataset
    if not isinstance(model, FineTuning):
        raise ConfigError(f"{run}: not a fine-tuning run, from which devices begin (make train METHOD=fine_tuning)")
    knows_labels = isinstance(data, Controls)
    if not knows_labels:
        raise ConfigError(
            f"{type(data).__name__} has no labels for clips of its devices: only the embedded dataset (synthetic) has"
        )
    model.load_state_dict(load_checkpoint(run / WEIGHTS)["state_dict"])
    data.prepare_data()
    data.setup("test")
    comparison = compare(model, data)
    outcomes = comparison.outcomes()
    summary, parameters = data.summary(), model.parameter_counts()
    trained = max(recipe["trained"] for recipe in comparison.recipe.values())
    write_json(
        {
            **identity(folder, experiment, source, arguments),
            "metrics": {"test/accuracy": model.head.evaluate(outcomes)["accuracy"]},
            "classes": model.head.outputs,
            "questions": {split: row["questions"] for split, row in summary.items()},
            "data": summary,
            **evaluation(data, outcomes, folder / "predictions.test.csv"),
            "recipe": comparison.recipe,
            "encoder": results.get("encoder"),
            "parameters": parameters._replace(trained=trained)._asdict(),
            "bytes": model.traffic()._asdict(),
            "seconds": comparison.seconds,
        },
        folder / RESULTS,
    )
    print(f"written: {folder / RESULTS}")


class Comparison:
    """The cases of a fine-tuned model and a dataset that knows labels of its devices (`interface.Controls`).

    Args:
        model: with the run's weights, which are back in it whenever a method ends.
        data: set up.

    Attributes:
        recipe: by case, what was picked and from which figures.
        seconds: `train` for what picks and adapts, `test` for the unadapted answers.
    """

    def __init__(self, model: "FineTuning", data: Any) -> None:
        self.model, self.data = model.eval().requires_grad_(False), data
        self.recipe: dict[str, Any] = {}
        self.seconds = {"train": 0.0, "test": 0.0}

    def outcomes(self) -> dict[str, tuple[Any, Any]]:
        """By case: which test questions it answers, and answer, label and probability of each."""
        labels, predictions = self.data.labels("test"), self.model.head.predictions
        return {
            case: (where.numpy(), predictions(scores, FeatureBatch(scores, labels[where], where)).numpy())
            for case, (where, scores) in self.score_cases().items()
        }

    def score_cases(self) -> dict[str, tuple["Tensor", "Tensor"]]:
        """By case: which test questions it answers, and their scores (N, L)."""
        start = perf_counter()
        test = self.data.dataset("test", augment=False)
        features = self.features(test)
        with torch.no_grad():
            own = self.model(features)
        self.seconds["test"] = perf_counter() - start
        start = perf_counter()
        everywhere = torch.arange(len(own))
        given = {"own": (everywhere, own)}
        given |= self.labelled(features)
        given["tent"] = (everywhere, self.tent(test, self.data.origins("test")))
        given |= {case: (everywhere, scores) for case, scores in self.forward_only(features).items()}
        self.seconds["train"] = perf_counter() - start
        return given

    def features(self, dataset: Any) -> "Tensor":
        """(N, T, 192) of all its samples, in the batches of a test."""
        with torch.no_grad():
            found = [self.model.encode(batch).frame_features for batch in self.data.batches(dataset, shuffle=False)]
        return torch.cat(found)

    def labelled(self, test: "Tensor") -> dict[str, tuple["Tensor", "Tensor"]]:
        """By case: the test questions of devices with labels, and the scores (N, L) of the devices, each fine-tuned.

        Args:
            test: (N, T, 192) features of the test questions.
        """
        questions, origins = self.data.device_labels()
        theirs, asked = by_device(origins), by_device(self.data.origins("test"))
        devices = [device for device in theirs if device in asked and len(theirs[device]) > max(LABELS)]
        if len(devices) < 2:
            raise DataError(
                f"{self.data.root}: {len(devices)} test devices have more than {max(LABELS)} labelled questions: two "
                "are needed, one to pick the other's recipe on"
            )
        features, labels = self.features(questions), questions.labels
        drawn = padded([
            np.random.default_rng((self.data.seed, place)).permutation(theirs[device]).tolist()
            for place, device in enumerate(devices)
        ])  # fmt: skip
        further, held = drawn[:, max(LABELS) :], padded([asked[device] for device in devices])
        order = held[held >= 0].argsort()
        given = {}
        for number in LABELS:
            recipes, figures, weights = self._grid(features, labels, drawn[:, :number], further)
            taken = pick(figures)  # by device
            scores = torch.zeros(*held.shape, self.model.head.outputs)
            for place in set(taken.tolist()):
                own = torch.from_numpy(taken == place)
                theirs_now = {name: value[own] for name, value in weights[place].items()}
                scores[own] = self.score(theirs_now, test, held[own])
            given[f"labels_{number}"] = (held[held >= 0][order], scores[held >= 0][order])
            self.recipe[f"labels_{number}"] = self._picked(recipes, figures, taken, features, labels, further)
        return given

    def _grid(
        self, features: "Tensor", labels: "Tensor", chosen: "Tensor", further: "Tensor"
    ) -> tuple[list[Recipe], "NDArray[np.int64]", list[dict[str, "Tensor"]]]:
        """All recipes, how many further questions (D, ...) each device answers rightly with each, and the weights."""
        recipes, right, weights = [], [], []
        for parts, rate in product(PARTS, RATES):
            for steps, own in zip(STEPS, self.fine_tuned(features, labels, chosen, parts, rate, STEPS), strict=True):
                recipes.append(Recipe(parts, rate, steps))
                weights.append(own)
                right.append(self._right(own, features, labels, further))
        return recipes, np.stack(right), weights

    def _right(
        self, weights: Mapping[str, "Tensor"], features: "Tensor", labels: "Tensor", asked: "Tensor"
    ) -> "NDArray[np.int64]":
        """(D,) how many of the questions `asked` (D, Q) devices with such weights answer rightly."""
        answers = self.score(weights, features, asked).argmax(-1)
        return ((answers == labels[asked.clamp(min=0)]) & (asked >= 0)).sum(1).numpy()

    def _picked(
        self,
        recipes: Sequence[Recipe],
        figures: "NDArray[np.int64]",
        taken: "NDArray[np.int64]",
        features: "Tensor",
        labels: "Tensor",
        further: "Tensor",
    ) -> dict[str, Any]:
        """What goes into the results: the recipe of most devices, and the figures of all recipes."""
        most = recipes[int(np.bincount(taken).argmax())]
        questions, names = int((further >= 0).sum()), PARTS[most.parts]
        trained = sum(value.numel() for name, value in self.model.named_parameters() if name.startswith(names))
        logger.info("%s, for %d of %d devices", most, sum(recipes[i] == most for i in taken), len(taken))
        as_it_is = {
            name: value.expand(len(further), *value.shape)
            for name, value in self.model.named_parameters()
            if name.startswith(PARTS["layer"])
        }
        return {
            **most._asdict(),
            "trained": trained,
            "devices": len(taken),
            "devices_with_another": int(sum(recipes[i] != most for i in taken)),
            "picked_on": questions,
            "unadapted": int(self._right(as_it_is, features, labels, further).sum()) / questions,
            "grid": [
                {**recipe._asdict(), "accuracy": int(right.sum()) / questions}
                for recipe, right in zip(recipes, figures, strict=True)
            ],
        }

    def fine_tuned(
        self, features: "Tensor", labels: "Tensor", chosen: "Tensor", parts: str, rate: float, steps: Sequence[int]
    ) -> list[dict[str, "Tensor"]]:
        """The weights that train, by name and (D, ...) for D devices side by side, after so many steps.

        Every device descends on the mean cross-entropy of its own labels, as if it were alone: AdamW knows no
        neighbours, and the run's weight decay is kept.

        Args:
            features, labels: (N, T, 192) and (N,) of labelled questions.
            chosen: (D, K) which of them each device has, -1 where it has fewer.
            parts: what trains, see `PARTS`.
            rate: of AdamW.
            steps: in rising order.
        """
        weights = {
            name: value.detach().expand(len(chosen), *value.shape).clone().requires_grad_()
            for name, value in self.model.named_parameters()
            if name.startswith(PARTS[parts])
        }
        optimizer = torch.optim.AdamW(weights.values(), rate, weight_decay=self.model.weight_decay, fused=True)
        own = features[chosen.clamp(min=0)]
        wanted = labels[chosen.clamp(min=0)].masked_fill(chosen < 0, UNKNOWN_LABEL)
        known = (wanted != UNKNOWN_LABEL).sum(1).clamp(min=1)
        found = []
        for step in range(1, steps[-1] + 1):
            scores = self._side_by_side(weights, own)
            losses = F.cross_entropy(
                scores.flatten(0, 1), wanted.flatten(), ignore_index=UNKNOWN_LABEL, reduction="none"
            )
            optimizer.zero_grad()
            (losses.view_as(wanted).sum(1) / known).sum().backward()
            optimizer.step()
            if step in steps:
                found.append({name: value.detach().clone() for name, value in weights.items()})
        return found

    def score(self, weights: Mapping[str, "Tensor"], features: "Tensor", asked: "Tensor") -> "Tensor":
        """(D, Q, L) how devices with such weights score questions `asked` (D, Q) of those with features (N, ...)."""
        with torch.no_grad():
            return self._side_by_side(weights, features[asked.clamp(min=0)])

    def _side_by_side(self, weights: Mapping[str, "Tensor"], features: "Tensor") -> "Tensor":
        """(D, K, L) scores of features (D, K, T, 192), each device with its own weights (D, ...)."""

        def one(own: dict[str, "Tensor"], theirs: "Tensor") -> Any:
            return functional_call(self.model, own, (theirs,))

        return vmap(one)(dict(weights), features)

    def tent(self, dataset: Any, origins: Sequence["SampleOrigin"]) -> "Tensor":
        """(N, L) scores of a split's questions, after the recipe was picked on the validation devices."""
        validation, asked = self.data.dataset("val", augment=False), by_device(self.data.origins("val"))
        labels = self.data.labels("val")
        grid = []
        for recipe in (TentRecipe(*values) for values in product(TENT_RATES, TENT_QUESTIONS)):
            right = self._tent_by_device(validation, asked, recipe).argmax(-1) == labels
            grid.append({**recipe._asdict(), "accuracy": float(right.float().mean())})
        best = max(grid, key=lambda point: point["accuracy"])
        recipe = TentRecipe(*(best[name] for name in TentRecipe._fields))
        trained = sum(value.numel() for value in layer_norms(self.model).values())
        self.recipe["tent"] = {**recipe._asdict(), "trained": trained, "picked_on": len(labels), "grid": grid}
        logger.info("tent: %s, %.1f %% on validation devices", recipe, 100 * best["accuracy"])
        return self._tent_by_device(dataset, by_device(origins), recipe)

    def forward_only(self, test: "Tensor") -> dict[str, "Tensor"]:
        """By case: scores (N, L) of the test questions with features (N, T, 192), its setting picked on validation."""
        validation, labels = self.features(self.data.dataset("val", augment=False)), self.data.labels("val")
        with torch.no_grad():
            source = self.model.fuse(self.features(self.data.dataset("train", augment=False))).mean(0)
            given = {}
            for case, settings in FORWARD_ONLY.items():
                grid = []
                for setting in settings:
                    right = self._forward_by_device(case, setting, validation, "val", source).argmax(-1) == labels
                    grid.append({"setting": setting, "accuracy": float(right.float().mean())})
                best = max(grid, key=lambda point: point["accuracy"])
                self.recipe[case] = {"setting": best["setting"], "trained": 0, "picked_on": len(labels), "grid": grid}
                logger.info("%s: %s, %.1f %% on validation devices", case, best["setting"], 100 * best["accuracy"])
                given[case] = self._forward_by_device(case, best["setting"], test, "test", source)
        return given

    def _forward_by_device(
        self, case: str, setting: float, features: "Tensor", split: Split, source: "Tensor"
    ) -> "Tensor":
        """(N, L) scores of a split's questions with features (N, T, 192), every device's own adaptation anew."""
        fused, layer = self.model.fuse(features), self.model.layer
        found = torch.empty(len(features), self.model.head.outputs)
        for own in by_device(self.data.origins(split)).values():
            if case == "foa":
                found[own] = self.model.head(shift_activations(fused[own], source, setting), layer)
            elif case == "t3a":
                found[own] = adjust_prototypes(self.model.head.phi(fused[own]), layer, int(setting))
            else:
                hidden = self.model.head.phi(fused[own])
                found[own] = smooth_over_neighbours(hidden, layer(hidden), int(setting))
        return found

    def _tent_by_device(self, dataset: Any, asked: Mapping[str, Sequence[int]], recipe: TentRecipe) -> "Tensor":
        """(N, L) scores of all questions, every device's own adaptation beginning with the run's weights."""
        found = torch.empty(len(dataset), self.model.head.outputs)
        for own in asked.values():
            batches = batches_of(dataset, own, recipe.questions)
            found[list(own)] = adapt_by_entropy(self.model, batches, recipe.rate)
        return found


def pick(figures: "NDArray[np.int64]") -> "NDArray[np.int64]":
    """(D,) which of R recipes each device takes: the best on all other devices, the first of equals.

    Args:
        figures: (R, D) right answers.
    """
    best: NDArray[np.int64] = (figures.sum(1, keepdims=True) - figures).argmax(0)
    return best


def by_device(origins: Sequence["SampleOrigin"]) -> dict[str, list[int]]:
    """The places of each device's samples."""
    found: dict[str, list[int]] = {}
    for place, origin in enumerate(origins):
        found.setdefault(origin.device, []).append(place)
    return found


def batches_of(dataset: Any, places: Sequence[int], size: int) -> Iterator["VideoTextBatch"]:
    """Yield some samples in batches of so many, the last perhaps smaller."""
    for start in range(0, len(places), size):
        yield dataset.__getitems__([(0, index) for index in places[start : start + size]])


def padded(rows: Sequence[Sequence[int]]) -> "Tensor":
    """(R, most) of rows of numbers, -1 where a row has fewer."""
    most = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (most - len(row))] for row in rows])


def layer_norms(model: Any) -> dict[str, "Tensor"]:
    """Scales and shifts of a model's LayerNorms, by name."""
    return {
        f"{name}.{own}": value
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, value in module.named_parameters(recurse=False)
    }


def adapt_by_entropy(model: Any, batches: Iterable["VideoTextBatch"], rate: float) -> "Tensor":
    """TENT on one device: scores of its questions, given as it adapts; the weights are as before afterwards.

    Source: Wang et al. 2021, section 3 and their code: a batch's scores answer it, and then their mean entropy makes
    one step of Adam on the normalisation layers' scales and shifts. Here these are LayerNorms, which have no running
    statistics to replace.

    Args:
        model: in evaluation mode.
        batches: of the device's questions, in order.
        rate: of Adam.

    Returns:
        (N, L) scores of each question.
    """
    weights = layer_norms(model)
    before = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), rate)
    found = []
    try:
        for value in weights.values():
            value.requires_grad_(True)
        for batch in batches:
            scores = model(model.encode(batch).frame_features)
            found.append(scores.detach())
            optimizer.zero_grad()
            entropy(scores).mean().backward()
            optimizer.step()
    finally:
        with torch.no_grad():
            for name, value in weights.items():
                value.requires_grad_(False)
                value.copy_(before[name])
                value.grad = None
    return torch.cat(found)
