"""FOA's prompts: what a device could learn by forward passes alone, from the questions that it is asked.

`cdc-mmpg prompts checkpoints/<dataset>/fine_tuning/seed<N>` starts from a finished fine-tuning run, for every device
anew (see `forward_only.search_prompts`), and writes `checkpoints/<dataset>/prompts/seed<N>/results.json`. It is apart
from `on_device`, since every question is answered `CANDIDATES` times.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from cdc_mmpg.controls.forward_only import PROMPTS, Statistics, measure_activations, search_prompts
from cdc_mmpg.controls.on_device import Comparison, batches_of, by_device, evaluate_fine_tuned
from cdc_mmpg.data.batch import Split
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.training.reopen import run_evaluation

logger = logging.getLogger(__name__)

NAME = "prompts"
WEIGHTS = (0.1, 0.4)  # of the activations' distance
QUESTIONS = 15  # of a batch
SOURCE_QUESTIONS = 256  # of training, whose activations are the source's


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a run; return the exit code (see `errors`)."""
    return run_evaluation(NAME, "what a device could learn by forward passes", "of fine-tuning", evaluate, arguments)


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write results and predictions, unless they are there; see `evaluate_fine_tuned`."""
    evaluate_fine_tuned(NAME, run, PromptComparison, arguments)


class PromptComparison(Comparison):
    """Answers with searched prompts, of a fine-tuned model on a dataset's test questions."""

    def score_cases(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the only case; the weight of the distance is picked on the validation devices."""
        start = perf_counter()
        training, validation, test = (self.data.dataset(split, augment=False) for split in ("train", "val", "test"))
        labels, none = self.data.labels("val"), torch.zeros(1, 0, FEATURE_DIM)
        some = training.__getitems__([(0, i) for i in range(min(SOURCE_QUESTIONS, len(training)))])
        source = Statistics(*(part[0] for part in measure_activations(self.model.encoder, some, none)[0]))
        grid = []
        for weight in WEIGHTS:
            right = self._score(validation, "val", source, weight).argmax(-1) == labels
            grid.append({"setting": weight, "accuracy": float(right.float().mean())})
        best = max(grid, key=lambda point: point["accuracy"])
        self.recipe["foa_prompts"] = {
            "setting": best["setting"], "trained": PROMPTS * FEATURE_DIM, "picked_on": len(labels), "grid": grid,
        }  # fmt: skip
        logger.info("weight %s, %.1f %% on validation devices", best["setting"], 100 * best["accuracy"])
        scores = self._score(test, "test", source, best["setting"])
        self.seconds["train"] = perf_counter() - start
        return {"foa_prompts": (torch.arange(len(scores)), scores)}

    @torch.no_grad()
    def _score(self, dataset: Any, split: Split, source: Statistics, weight: float) -> Tensor:
        """Return scores (N, L) of a split's questions, every device's own search anew."""
        found = torch.empty(len(dataset), self.model.head.outputs)
        for own in by_device(self.data.origins(split)).values():
            found[own] = search_prompts(self.model, batches_of(dataset, own, QUESTIONS), source, weight, self.data.seed)
        return found
