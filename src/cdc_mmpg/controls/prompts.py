"""Control: FOA's prompts, which a device learns by forward passes alone from the questions it is asked.

`cdc-mmpg prompts checkpoints/<dataset>/fine_tuning/seed<N>` adapts a finished fine-tuning run to every device
separately (see `forward_only.search_prompts`) and writes `checkpoints/<dataset>/prompts/seed<N>/results.json`. It is
separate from `on_device` because it answers every question `CANDIDATE_PROMPTS` times.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from cdc_mmpg.controls.forward_only import PROMPT_TOKENS, Statistics, measure_activations, search_prompts
from cdc_mmpg.controls.on_device import Comparison, evaluate_fine_tuned, group_by_device, iterate_batches
from cdc_mmpg.data.batch import Split
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.training.reopen import run_evaluation

logger = logging.getLogger(__name__)

NAME = "prompts"
DISTANCE_WEIGHTS = (0.1, 0.4)  # tried weights of the distance of activations
BATCH_QUESTIONS = 15
SOURCE_QUESTIONS = 256  # training questions for the source statistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a run; return the exit code (see `errors`)."""
    return run_evaluation(NAME, "prompts learned by forward passes alone", "of fine-tuning", evaluate, arguments)


def evaluate(run: Path, arguments: Sequence[str] = ()) -> None:
    """Write results and predictions unless they exist; see `evaluate_fine_tuned`."""
    evaluate_fine_tuned(NAME, run, PromptComparison, arguments)


class PromptComparison(Comparison):
    """Answers of a fine-tuned model with searched prompts to a dataset's test questions."""

    def score_cases(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the only case; the weight of the distance is selected on the validation devices."""
        start = perf_counter()
        training, validation, test = (self.data.dataset(split, augment=False) for split in ("train", "val", "test"))
        labels, no_prompt = self.data.labels("val"), torch.zeros(1, 0, FEATURE_DIM)
        batch = training.__getitems__([(0, i) for i in range(min(SOURCE_QUESTIONS, len(training)))])
        source = Statistics(*(part[0] for part in measure_activations(self.model.encoder, batch, no_prompt)[0]))
        grid = []
        for weight in DISTANCE_WEIGHTS:
            correct = self._score(validation, "val", source, weight).argmax(-1) == labels
            grid.append({"setting": weight, "accuracy": float(correct.float().mean())})
        best = max(grid, key=lambda point: point["accuracy"])
        self.recipe["foa_prompts"] = {
            "setting": best["setting"], "trained": PROMPT_TOKENS * FEATURE_DIM, "picked_on": len(labels), "grid": grid,
        }  # fmt: skip
        logger.info("selected weight %s: %.1f %% on validation devices", best["setting"], 100 * best["accuracy"])
        scores = self._score(test, "test", source, best["setting"])
        self.seconds["train"] = perf_counter() - start
        return {"foa_prompts": (torch.arange(len(scores)), scores)}

    @torch.no_grad()
    def _score(self, dataset: Any, split: Split, source: Statistics, weight: float) -> Tensor:
        """Return scores (N, L) of a split's questions, with a separate search per device."""
        scores = torch.empty(len(dataset), self.model.head.outputs)
        for places in group_by_device(self.data.origins(split)).values():
            batches = iterate_batches(dataset, places, BATCH_QUESTIONS)
            scores[places] = search_prompts(self.model, batches, source, weight, self.data.seed)
        return scores
