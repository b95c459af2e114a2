"""Baselines: adaptation on the device alone, with backpropagation and without a cloud.

`cdc-mmpg on_device checkpoints/<dataset>/fine_tuning/seed<N>` adapts a finished fine-tuning run to every device
separately, and writes `checkpoints/<dataset>/on_device/seed<N>/results.json`:

- `own`: the unchanged weights of the run;
- `labels_2`, `labels_5`, `labels_15`: fine-tuned on 2, 5 or 15 labelled questions about clips of the device, which
  the methods do not have (see `interface.DeviceLabels`);
- `tent`: entropy minimisation over the test questions themselves (Wang et al. 2021, "Tent: Fully Test-Time Adaptation
  by Entropy Minimization");
- `t3a`, `lame`, `foa`: adaptation to the test questions by forward passes alone (`forward_only`).

Test questions never select a recipe. With labels, the recipe of a device is selected on other test devices, by the
accuracy on their remaining labelled questions, which is more than a real device could know. The validation devices
are unsuitable, since the run's epoch was selected on their questions, which favours unchanged weights. Methods
without labels use them. The results contain the grids with their accuracies.
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
    compute_entropy,
    shift_activations,
    smooth_over_neighbours,
)
from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, Split, VideoTextBatch
from cdc_mmpg.data.interface import DeviceLabels, LabelsDevices, SampleOrigin
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.evaluation.evaluate import evaluate_outcomes
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.results import PREDICTIONS, RESULTS, describe_provenance, write_json
from cdc_mmpg.training.reopen import (
    identify_run,
    is_done,
    load_finished_results,
    locate_evaluation,
    reopen,
    run_evaluation,
)
from cdc_mmpg.training.wandb_record import record_evaluation

logger = logging.getLogger(__name__)

NAME = "on_device"

LABEL_COUNTS = (2, 5, 15)  # labelled questions of a device; smaller sets are subsets of larger ones
# Parameters that train on labels: all or a part of those after the encoder's blocks. Training the encoder on 15 labels
# of the synthetic dataset made validation devices worse (59.7 % fell to 57.8 % or less), its last block was no better.
PARTS = {"layer": ("layer.",), "head": ("head.", "layer."), "pooler": ("encoder.pooler.", "head.", "layer.")}
LABEL_LEARNING_RATES = (1e-4, 3e-4, 1e-3)
STEPS = (10, 30, 100)  # steps of AdamW on all labels at once

# Settings of forward-only methods: members of a support set (0 is all), neighbours, strength of the shift.
FORWARD_ONLY = {"t3a": (1, 5, 20, 0), "lame": (1, 3, 5), "foa": (0.25, 0.5, 1.0)}
TENT_LEARNING_RATES = (1e-3, 1e-2)
TENT_QUESTIONS = (5, 15)  # questions per batch; each batch is one step


class Recipe(NamedTuple):
    """Settings of fine-tuning on a device."""

    parts: str  # see `PARTS`
    rate: float
    steps: int


class TentRecipe(NamedTuple):
    """Settings of entropy minimisation on a device."""

    rate: float
    questions: int  # per batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a run; return the exit code (see `errors`)."""
    return run_evaluation(
        NAME, "adaptation on the device alone, with backpropagation", "of fine-tuning", evaluate, arguments
    )


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write results and predictions unless they exist; see `evaluate_fine_tuned`."""
    evaluate_fine_tuned(NAME, run, Comparison, arguments)


def evaluate_fine_tuned(
    name: str, run: Path, compare: Callable[[FineTuning, Any, DeviceLabels], "Comparison"], arguments: Sequence[str]
) -> None:
    """Evaluate a control on a fine-tuning run and write its results, unless they exist.

    Args:
        name: name of the evaluation's folder.
        run: folder of the run.
        compare: creates the comparison from the run's model, dataset and labels of devices.
        arguments: arguments of the command, which the results record.

    Raises:
        CheckpointError: the run is not finished, or damaged.
        ConfigError: the run is not fine-tuning on open-ended questions, or the dataset does not know its devices.
        DataError: fewer than two devices have enough labels, or files of the dataset changed.
    """
    results = load_finished_results(run)
    folder, source = locate_evaluation(run, name), identify_run(run)
    if is_done(folder, source):
        return
    experiment = reopen(run)

    model, data = experiment.model, experiment.dataset
    if not isinstance(model, FineTuning):
        raise ConfigError(f"{run}: not a fine-tuning run, which devices start from (make train METHOD=fine_tuning)")
    labels_devices = isinstance(data, LabelsDevices)
    if not labels_devices:
        raise ConfigError(f"{type(data).__name__} asks no open-ended questions, which devices adapt to")
    data.prepare_data()
    data.setup("test")
    comparison = compare(model, data, data.device_labels())  # refuses a dataset that does not know its devices
    outcomes = comparison.outcomes()
    summary, parameters = data.summary(), model.parameter_counts()
    trained = max(recipe["trained"] for recipe in comparison.recipe.values())
    written = {
        **experiment.describe(folder, arguments),
        **describe_provenance(),
        "made_of": source,
        "devices": "1 x cpu",
        "metrics": {"test/accuracy": model.head.evaluate(outcomes)["accuracy"]},
        "classes": model.head.outputs,
        "questions": {split: row["questions"] for split, row in summary.items()},
        "data": summary,
        **evaluate_outcomes(data, outcomes, folder / PREDICTIONS),
        "recipe": comparison.recipe,
        "encoder": results.get("encoder"),
        "parameters": parameters._replace(trained=trained)._asdict(),
        "bytes": model.traffic()._asdict(),
        "seconds": comparison.seconds,
    }
    write_json(written, folder / RESULTS)
    print(f"written: {folder / RESULTS}")
    record_evaluation(run, folder, written)


class Comparison:
    """Test cases of a fine-tuned model on a dataset with labels for its devices (`interface.LabelsDevices`).

    Args:
        model: model with the run's weights, which every method restores.
        data: dataset after `setup`.
        labelled: its labels of devices (`interface.DeviceLabels`); None where nothing is fine-tuned on them.

    Attributes:
        recipe: by case, the selected settings and the grid with its accuracies.
        seconds: `train` for selection and adaptation, `test` for the unadapted answers.
    """

    def __init__(self, model: "FineTuning", data: Any, labelled: Any = None) -> None:
        self.model, self.data, self.labelled = model.eval().requires_grad_(False), data, labelled
        self.recipe: dict[str, Any] = {}
        self.seconds = {"train": 0.0, "test": 0.0}

    def outcomes(self) -> dict[str, tuple[Any, Any]]:
        """Return by case the indices of the answered test questions, and answer, label and probability of each."""
        labels, predictions = self.data.labels("test"), self.model.head.predictions
        return {
            case: (where.numpy(), predictions(scores, FeatureBatch(scores, labels[where], where)).numpy())
            for case, (where, scores) in self.score_cases().items()
        }

    def score_cases(self) -> dict[str, tuple["Tensor", "Tensor"]]:
        """Return by case the indices of the answered test questions, and their scores (N, L)."""
        start = perf_counter()
        test = self.data.dataset("test", augment=False)
        features = self.encode(test)
        with torch.no_grad():
            unadapted = self.model(features)
        self.seconds["test"] = perf_counter() - start
        start = perf_counter()
        all_questions = torch.arange(len(unadapted))
        cases = {"own": (all_questions, unadapted)}
        cases |= self.fine_tune_on_labels(features)
        cases["tent"] = (all_questions, self.adapt_with_tent(test, self.data.origins("test")))
        cases |= {case: (all_questions, scores) for case, scores in self.adapt_forward_only(features).items()}
        self.seconds["train"] = perf_counter() - start
        return cases

    def encode(self, dataset: Any) -> "Tensor":
        """Return the features (N, T, 192) of all samples, computed in test batches."""
        with torch.no_grad():
            parts = [self.model.encode(batch).frame_features for batch in self.data.batches(dataset, shuffle=False)]
        return torch.cat(parts)

    def fine_tune_on_labels(self, test: "Tensor") -> dict[str, tuple["Tensor", "Tensor"]]:
        """Fine-tune every device with labels; return by case its test questions and their scores (N, L).

        Args:
            test: (N, T, 192) features of the test questions.
        """
        questions, origins = self.labelled
        labelled, tested = group_by_device(origins), group_by_device(self.data.origins("test"))
        devices = [device for device in labelled if device in tested and len(labelled[device]) > max(LABEL_COUNTS)]
        if len(devices) < 2:
            raise DataError(
                f"{self.data.root}: {len(devices)} test devices have more than {max(LABEL_COUNTS)} labelled questions: "
                "two are needed, each to select the recipe of the other"
            )
        features, labels = self.encode(questions), questions.labels
        drawn = pad_rows([
            np.random.default_rng((self.data.seed, place)).permutation(labelled[device]).tolist()
            for place, device in enumerate(devices)
        ])  # fmt: skip
        further, held = drawn[:, max(LABEL_COUNTS) :], pad_rows([tested[device] for device in devices])
        order = held[held >= 0].argsort()
        cases = {}
        for number in LABEL_COUNTS:
            recipes, figures, weights = self._try_recipes(features, labels, drawn[:, :number], further)
            taken = pick_recipes(figures)  # by device
            scores = torch.zeros(*held.shape, self.model.head.outputs)
            for place in set(taken.tolist()):
                mask = torch.from_numpy(taken == place)
                adapted = {name: value[mask] for name, value in weights[place].items()}
                scores[mask] = self.score(adapted, test, held[mask])
            cases[f"labels_{number}"] = (held[held >= 0][order], scores[held >= 0][order])
            self.recipe[f"labels_{number}"] = self._describe_pick(recipes, figures, taken, features, labels, further)
        return cases

    def _try_recipes(
        self, features: "Tensor", labels: "Tensor", chosen: "Tensor", further: "Tensor"
    ) -> tuple[list[Recipe], "NDArray[np.int64]", list[dict[str, "Tensor"]]]:
        """Return all recipes, the number of correct answers to further questions (R, D), and the adapted weights."""
        recipes, correct, weights = [], [], []
        for parts, rate in product(PARTS, LABEL_LEARNING_RATES):
            for steps, adapted in zip(STEPS, self.fine_tune(features, labels, chosen, parts, rate, STEPS), strict=True):
                recipes.append(Recipe(parts, rate, steps))
                weights.append(adapted)
                correct.append(self._count_right(adapted, features, labels, further))
        return recipes, np.stack(correct), weights

    def _count_right(
        self, weights: Mapping[str, "Tensor"], features: "Tensor", labels: "Tensor", asked: "Tensor"
    ) -> "NDArray[np.int64]":
        """Count for each device (D,) the correct answers to its questions `asked` (D, Q) with the given weights."""
        answers = self.score(weights, features, asked).argmax(-1)
        return ((answers == labels[asked.clamp(min=0)]) & (asked >= 0)).sum(1).numpy()

    def _describe_pick(
        self,
        recipes: Sequence[Recipe],
        figures: "NDArray[np.int64]",
        taken: "NDArray[np.int64]",
        features: "Tensor",
        labels: "Tensor",
        further: "Tensor",
    ) -> dict[str, Any]:
        """Return the entry for the results: the most frequent recipe, and the accuracies of all recipes."""
        most = recipes[int(np.bincount(taken).argmax())]
        questions, names = int((further >= 0).sum()), PARTS[most.parts]
        trained = sum(value.numel() for name, value in self.model.named_parameters() if name.startswith(names))
        logger.info("%s, for %d of %d devices", most, sum(recipes[i] == most for i in taken), len(taken))
        unadapted = {
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
            "unadapted": int(self._count_right(unadapted, features, labels, further).sum()) / questions,
            "grid": [
                {**recipe._asdict(), "accuracy": int(correct.sum()) / questions}
                for recipe, correct in zip(recipes, figures, strict=True)
            ],
        }

    def fine_tune(
        self, features: "Tensor", labels: "Tensor", chosen: "Tensor", parts: str, rate: float, steps: Sequence[int]
    ) -> list[dict[str, "Tensor"]]:
        """Fine-tune D devices in parallel; return the trained weights (D, ...) by name after each number of steps.

        Every device minimises the mean cross-entropy of its own labels independently: AdamW updates elementwise. The
        weight decay is that of the run.

        Args:
            features: (N, T, 192) of the labelled questions.
            labels: (N,) of the same questions.
            chosen: (D, K) indices of the questions of each device, padded with -1.
            parts: group of parameters to train, see `PARTS`.
            rate: learning rate of AdamW.
            steps: numbers of steps, in increasing order.
        """
        weights = {
            name: value.detach().expand(len(chosen), *value.shape).clone().requires_grad_()
            for name, value in self.model.named_parameters()
            if name.startswith(PARTS[parts])
        }
        optimizer = torch.optim.AdamW(weights.values(), rate, weight_decay=self.model.weight_decay, fused=True)
        inputs = features[chosen.clamp(min=0)]
        targets = labels[chosen.clamp(min=0)].masked_fill(chosen < 0, UNKNOWN_LABEL)
        known = (targets != UNKNOWN_LABEL).sum(1).clamp(min=1)
        snapshots = []
        for step in range(1, steps[-1] + 1):
            scores = self._score_side_by_side(weights, inputs)
            losses = F.cross_entropy(
                scores.flatten(0, 1), targets.flatten(), ignore_index=UNKNOWN_LABEL, reduction="none"
            )
            optimizer.zero_grad()
            (losses.view_as(targets).sum(1) / known).sum().backward()
            optimizer.step()
            if step in steps:
                snapshots.append({name: value.detach().clone() for name, value in weights.items()})
        return snapshots

    def score(self, weights: Mapping[str, "Tensor"], features: "Tensor", asked: "Tensor") -> "Tensor":
        """Return scores (D, Q, L) of questions `asked` (D, Q) with weights (D, ...); features are (N, ...)."""
        with torch.no_grad():
            return self._score_side_by_side(weights, features[asked.clamp(min=0)])

    def _score_side_by_side(self, weights: Mapping[str, "Tensor"], features: "Tensor") -> "Tensor":
        """Return scores (D, K, L) of features (D, K, T, 192), each device with its own weights (D, ...)."""

        def score_device(parameters: dict[str, "Tensor"], inputs: "Tensor") -> Any:
            return functional_call(self.model, parameters, (inputs,))

        return vmap(score_device)(dict(weights), features)

    def adapt_with_tent(self, dataset: Any, origins: Sequence["SampleOrigin"]) -> "Tensor":
        """Return scores (N, L) of a split's questions with TENT; the recipe is selected on the validation devices."""
        validation, devices = self.data.dataset("val", augment=False), group_by_device(self.data.origins("val"))
        labels = self.data.labels("val")
        grid = []
        for recipe in (TentRecipe(*values) for values in product(TENT_LEARNING_RATES, TENT_QUESTIONS)):
            correct = self._tent_by_device(validation, devices, recipe).argmax(-1) == labels
            grid.append({**recipe._asdict(), "accuracy": float(correct.float().mean())})
        best = max(grid, key=lambda point: point["accuracy"])
        recipe = TentRecipe(*(best[name] for name in TentRecipe._fields))
        trained = sum(value.numel() for value in find_layer_norms(self.model).values())
        self.recipe["tent"] = {**recipe._asdict(), "trained": trained, "picked_on": len(labels), "grid": grid}
        logger.info("tent: %s, %.1f %% on validation devices", recipe, 100 * best["accuracy"])
        return self._tent_by_device(dataset, group_by_device(origins), recipe)

    def adapt_forward_only(self, test: "Tensor") -> dict[str, "Tensor"]:
        """Return by case scores (N, L) of test features (N, T, 192); settings are selected on validation devices."""
        validation, labels = self.encode(self.data.dataset("val", augment=False)), self.data.labels("val")
        with torch.no_grad():
            source = self.model.fuse(self.encode(self.data.dataset("train", augment=False))).mean(0)
            scores = {}
            for case, settings in FORWARD_ONLY.items():
                grid = []
                for setting in settings:
                    correct = self._adapt_by_device(case, setting, validation, "val", source).argmax(-1) == labels
                    grid.append({"setting": setting, "accuracy": float(correct.float().mean())})
                best = max(grid, key=lambda point: point["accuracy"])
                self.recipe[case] = {"setting": best["setting"], "trained": 0, "picked_on": len(labels), "grid": grid}
                logger.info("%s: %s, %.1f %% on validation devices", case, best["setting"], 100 * best["accuracy"])
                scores[case] = self._adapt_by_device(case, best["setting"], test, "test", source)
        return scores

    def _adapt_by_device(
        self, case: str, setting: float, features: "Tensor", split: Split, source: "Tensor"
    ) -> "Tensor":
        """Return scores (N, L) of a split's questions with features (N, T, 192), adapting to each device separately."""
        fused, layer = self.model.fuse(features), self.model.layer
        scores = torch.empty(len(features), self.model.head.outputs)
        for rows in group_by_device(self.data.origins(split)).values():
            if case == "foa":
                scores[rows] = self.model.head(shift_activations(fused[rows], source, setting), layer)
            elif case == "t3a":
                scores[rows] = adjust_prototypes(self.model.head.phi(fused[rows]), layer, int(setting))
            else:
                hidden = self.model.head.phi(fused[rows])
                scores[rows] = smooth_over_neighbours(hidden, layer(hidden), int(setting))
        return scores

    def _tent_by_device(self, dataset: Any, devices: Mapping[str, Sequence[int]], recipe: TentRecipe) -> "Tensor":
        """Return scores (N, L) of all questions; the adaptation to each device starts from the run's weights."""
        scores = torch.empty(len(dataset), self.model.head.outputs)
        for rows in devices.values():
            batches = iterate_batches(dataset, rows, recipe.questions)
            scores[list(rows)] = adapt_by_entropy(self.model, batches, recipe.rate)
        return scores


def pick_recipes(figures: "NDArray[np.int64]") -> "NDArray[np.int64]":
    """Select for each of D devices the index of the recipe that is best on all other devices (first on ties).

    Args:
        figures: (R, D) numbers of correct answers by recipe and device.
    """
    best: NDArray[np.int64] = (figures.sum(1, keepdims=True) - figures).argmax(0)
    return best


def group_by_device(origins: Sequence["SampleOrigin"]) -> dict[str, list[int]]:
    """Return the indices of the samples of each device."""
    groups: dict[str, list[int]] = {}
    for place, origin in enumerate(origins):
        groups.setdefault(origin.device, []).append(place)
    return groups


def iterate_batches(dataset: Any, places: Sequence[int], size: int) -> Iterator["VideoTextBatch"]:
    """Yield the samples at `places` in batches of `size`; the last batch may be smaller."""
    for start in range(0, len(places), size):
        yield dataset.__getitems__([(0, index) for index in places[start : start + size]])


def pad_rows(rows: Sequence[Sequence[int]]) -> "Tensor":
    """Stack rows of numbers to a tensor (R, length of the longest), padded with -1."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (length - len(row))] for row in rows])


def find_layer_norms(model: Any) -> dict[str, "Tensor"]:
    """Return the scales and shifts of a model's LayerNorms by name."""
    return {
        f"{name}.{parameter}": value
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for parameter, value in module.named_parameters(recurse=False)
    }


def adapt_by_entropy(model: Any, batches: Iterable["VideoTextBatch"], rate: float) -> "Tensor":
    """Adapt to one device with TENT and return the scores (N, L) of its questions; the weights are restored.

    Source: Wang et al. 2021, section 3 and their code: a batch's scores answer it, and then their mean entropy makes
    one step of Adam on the normalisation layers' scales and shifts. Here these are LayerNorms, which have no running
    statistics to replace.

    Args:
        model: model in evaluation mode.
        batches: batches of the device's questions, in order.
        rate: learning rate of Adam.
    """
    weights = find_layer_norms(model)
    original = {name: value.detach().clone() for name, value in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), rate)
    results = []
    try:
        for value in weights.values():
            value.requires_grad_(True)
        for batch in batches:
            scores = model(model.encode(batch).frame_features)
            results.append(scores.detach())
            optimizer.zero_grad()
            compute_entropy(scores).mean().backward()
            optimizer.step()
    finally:
        with torch.no_grad():
            for name, value in weights.items():
                value.requires_grad_(False)
                value.copy_(original[name])
                value.grad = None
    return torch.cat(results)
