"""Logs of a run: CSV always, Weights & Biases beside it, everything below the run's folder."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cdc_mmpg.batch import Split
from cdc_mmpg.methods.base import Answering

logger = logging.getLogger(__name__)

PROJECT = "cdc-mmpg"


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
        os.environ.setdefault(f"WANDB_{name}_DIR", str(run.absolute() / "wandb" / name.lower()))
    import wandb  # noqa: PLC0415  takes seconds, and only here

    dataset, method, seed = run.absolute().parts[-3:]

    def begin(mode: Any) -> Any:
        settings = wandb.Settings(init_timeout=15, silent=mode == "offline", console="off")
        return wandb.init(
            project=PROJECT,
            name=f"{dataset}/{method}/{seed}",
            group=f"{dataset}/{method}",
            dir=run,
            mode=mode,
            config=config,
            settings=settings,
        )

    try:
        wandb_run = begin(mode or ("online" if wandb.login(prompt=False) else "offline"))
    except Exception as error:  # the client raises errors of many families
        logger.warning("W&B cannot be reached (%s): logging offline; `wandb sync` uploads later", error)
        wandb_run = begin("offline")
    return [*found, WandbLogger(experiment=wandb_run)]


class ExampleTable(Callback):
    """After every evaluation: a few clips with question, prediction and answer, as a W&B table."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of the first validation samples."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of the first test samples."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        boards = [board for board in trainer.loggers if isinstance(board, WandbLogger)]
        if not boards or not isinstance(pl_module, Answering) or not trainer.is_global_zero:
            return
        import wandb  # noqa: PLC0415  see `loggers`

        data: Any = trainer.datamodule
        words = [*data.answers(), "(unknown)"]
        rows = []
        for index, label in sorted(pl_module.predictions[split].items()):
            example = data.example(split, index)
            strip = np.concatenate(list(example.frames), axis=1)
            rows.append([wandb.Image(strip), example.clip, example.question, words[label], example.answer])
        for board in boards:
            board.log_table(f"{split}/examples", ["frames", "clip", "question", "prediction", "answer"], rows)
