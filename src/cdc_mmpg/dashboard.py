"""Logs of a run: CSV always, Weights & Biases beside it, everything below the run's folder."""

import csv
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cdc_mmpg.batch import Split, VideoTextData
from cdc_mmpg.methods.base import Answering
from cdc_mmpg.metrics import CAPTIONS, ranked

logger = logging.getLogger(__name__)

PROJECT = "cdc-mmpg"
EXAMPLES = 8  # in a table
PATIENCE_SECONDS = 15  # with a server that does not answer


def loggers(run: Path, config: dict[str, Any]) -> list[Logger]:
    """CSV in `logs/`, and W&B in `wandb/` unless WANDB_MODE is disabled.

    W&B works offline unless a key is configured (WANDB_API_KEY or ~/.netrc) or WANDB_MODE says otherwise; a server
    that does not answer costs some seconds at the start and then nothing.

    Args:
        run: `<dataset>/<method>/seed<N>`, whose parts name the W&B run and its group.
        config: what to record with the run.
    """
    found: list[Logger] = [CSVLogger(run, name="logs")]
    mode: Any = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return found
    run.mkdir(parents=True, exist_ok=True)
    for name in ("CACHE", "DATA", "ARTIFACT"):  # W&B would use the home and the working directory
        os.environ[f"WANDB_{name}_DIR"] = str(run.absolute() / "wandb" / name.lower())
    identity = run / "wandb" / "id"  # a run that goes on is one run there, too
    if not identity.is_file():
        identity.parent.mkdir(exist_ok=True)
        identity.write_text(uuid.uuid4().hex)
    import wandb  # noqa: PLC0415  takes seconds, and only here

    dataset, method, seed = run.absolute().parts[-3:]

    def begin(mode: Any, identity: str) -> Any:
        settings = wandb.Settings(init_timeout=PATIENCE_SECONDS, silent=mode == "offline", console="off")
        return wandb.init(
            project=PROJECT,
            name=f"{dataset}/{method}/{seed}",
            group=f"{dataset}/{method}",
            id=identity,
            resume="allow",
            dir=run,
            mode=mode,
            config=config,
            settings=settings,
        )

    try:
        wandb_run = begin(mode or ("online" if wandb.login(prompt=False) else "offline"), identity.read_text())
    except Exception as error:  # the client raises errors of many families
        logger.warning("W&B cannot be reached (%s): logging offline; `wandb sync` uploads later", error)
        wandb_run = begin("offline", uuid.uuid4().hex)  # the other is taken by the attempt
    return [*found, WandbLogger(experiment=wandb_run)]


class ExampleTable(Callback):
    """After every evaluation: a few clips with question, prediction and answer, as CSV and as a W&B table.

    Args:
        run: the run's folder.
        data: the dataset.
    """

    def __init__(self, run: Path, data: VideoTextData) -> None:
        self.run, self.data = run, data

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of validation samples."""
        self._log(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of test samples."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        if not isinstance(pl_module, Answering) or not trainer.is_global_zero:
            return
        outcomes = pl_module.outcomes[split]
        first = next(iter(outcomes))
        if CAPTIONS in outcomes:
            labels = ranked({case: outcomes[case] for case in (first, CAPTIONS)})[first][0]
        else:
            labels = outcomes[first][1][:, 0]
        chosen = range(0, len(labels), -(-len(labels) // EXAMPLES))  # from all over the split
        examples = [(self.data.example(split, i), self.data.word(split, i, int(labels[i]))) for i in chosen]
        with (self.run / f"examples.{split}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(example.clip, example.question, word, example.answer) for example, word in examples]
            csv.writer(file).writerows([("clip", "question", "prediction", "answer"), *rows])
        for board in trainer.loggers:
            if isinstance(board, WandbLogger):
                import wandb  # noqa: PLC0415  see `loggers`

                strips = [wandb.Image(np.concatenate(list(example.frames), axis=1)) for example, _ in examples]
                table = [[strip, *row] for strip, row in zip(strips, rows, strict=True)]
                board.log_table(f"{split}/examples", ["frames", "clip", "question", "prediction", "answer"], table)
