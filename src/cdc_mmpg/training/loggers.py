"""Logs of a training run: always CSV, usually also Weights & Biases, all in the run's folder."""

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cdc_mmpg.data.batch import SPLITS, Split
from cdc_mmpg.data.interface import VideoTextData
from cdc_mmpg.evaluation.metrics import CAPTIONS, rank_all
from cdc_mmpg.files import atomic_write
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.results import ANNOTATIONS_KEY, PREDICTIONS, read_inputs
from cdc_mmpg.training.wandb_record import (
    Content,
    Record,
    Subject,
    WeightsKind,
    describe_checkpoint,
    describe_weights,
    list_accuracies,
    list_figures,
    name_artifact,
    start_record,
)

MAX_TABLE_EXAMPLES = 8  # rows of a table of examples
# Files of weights that runs exchange: type of the artifact, and argument of the model that names such a file.
EXCHANGED_FILES: dict[str, tuple[WeightsKind, str]] = {
    "encoder.safetensors": ("encoder", "encoder.checkpoint"),
    "adr.safetensors": ("reasoner", "adr"),
    "reading.safetensors": ("reading", "reading"),
}


class RecordLogger(WandbLogger):
    """Logger that logs to the W&B run of a record.

    Args:
        record: record with a W&B run.
    """

    def __init__(self, record: Record) -> None:
        super().__init__(experiment=record.run)
        self.record = record


def build_loggers(run: Path, model: LightningModule, config: dict[str, Any]) -> list[Logger]:
    """Return the loggers of a run: CSV in `logs/`, and W&B in `wandb/` (see `start_record`).

    Args:
        run: folder of the run.
        model: model to train.
        config: configuration to record with the run.
    """
    subject = Subject.of_run(run, "train" if isinstance(model, Answering) else "pretraining")
    record = start_record(run, subject, config)
    return [CSVLogger(run, name="logs"), *([RecordLogger(record)] if record.run else [])]


def find_record(boards: Sequence[Logger]) -> Record:
    """Return the record among the loggers, or one that does nothing."""
    return next((board.record for board in boards if isinstance(board, RecordLogger)), Record())


def find_weights(model: dict[str, Any], name: str) -> str | None:
    """Return the path of the weights that a model starts from, by the name of an argument; None if there are none."""
    value: Any = model
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) and Path(value).is_file() else None


def finish_loggers(boards: Sequence[Logger], run: Path, config: dict[str, Any], results: dict[str, Any]) -> None:
    """Record a run's results, answers and artifacts, and end its W&B run.

    The summary gets the monitored metric of the best epoch in place of the last one; a sweep optimises that number.
    (`define_metric(summary="max")` would store a table instead of a number.)

    Args:
        boards: loggers of the run.
        run: folder of the run.
        config: configuration of the run.
        results: content of `results.json`.
    """
    record = find_record(boards)
    if record.run is None:
        return
    costs = {part: results[part] for part in ("parameters", "bytes", "seconds")}
    best = {"best_epoch": results["best_epoch"]}
    record.summarise({**results["metrics"], **list_accuracies(results), **list_figures(costs), **best})
    weights = config["model"]["init_args"]
    written = [
        (run / name, kind)
        for name, (kind, argument) in EXCHANGED_FILES.items()
        if (run / name).is_file() and (name == "encoder.safetensors" or not find_weights(weights, argument))
    ]  # what a run loaded and only keeps a copy of is no output
    record.log(describe_checkpoint(run), *(describe_weights(path, kind) for path, kind in written))
    record.log_answers(run / PREDICTIONS)
    record.end()


class RunRecord(Callback):
    """Callback that records what a run builds on and how long its epochs take; logs short epochs, too.

    Args:
        run: folder of the run.
        config: configuration of the run.
        data: dataset of the run.
    """

    def __init__(self, run: Path, config: dict[str, Any], data: VideoTextData) -> None:
        self.run, self.config, self.data = run, config, data
        self._epoch_start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the inputs; log every step, or the last one, of an epoch that is shorter than the logging interval."""
        self._epoch_start = time.perf_counter()  # a run that resumes within an epoch does not start it
        steps = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, steps))
        record = find_record(trainer.loggers)
        record.attempt("note the inputs", lambda: record.use(*self._describe_inputs(trainer, pl_module)))

    def _describe_inputs(self, trainer: Trainer, pl_module: LightningModule) -> list[Content]:
        """Return the artifacts that the run builds on: its dataset, and the weights that it loads."""
        reads_captions = getattr(pl_module, "reads", "") == "captions"
        digests = {"annotations": read_inputs(self.run)[ANNOTATIONS_KEY]}
        if reads_captions:
            digests["captions"] = trainer.datamodule.fingerprint("train", frames=True)
        else:
            digests |= {split: self.data.fingerprint(split, frames=True) for split in SPLITS}
        name = name_artifact(self.run.absolute().parts[-3], "captions" if reads_captions else "data")
        weights = [(kind, find_weights(self.config["model"]["init_args"], argument))
                   for kind, argument in EXCHANGED_FILES.values()]  # fmt: skip
        given = [describe_weights(Path(path), kind) for kind, path in weights if path]
        return [Content(name, "dataset", digests=digests), *given]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._epoch_start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the seconds of the epoch, with its validation."""
        seconds = {"seconds/epoch": time.perf_counter() - self._epoch_start, "epoch": trainer.current_epoch}
        for board in trainer.loggers:
            board.log_metrics(seconds, step=trainer.global_step - 1)


class ExampleTable(Callback):
    """Table of a few clips with question, prediction and answer after every evaluation, as CSV and in W&B.

    Args:
        run: folder of the run.
        data: dataset of the clips.
    """

    def __init__(self, run: Path, data: VideoTextData) -> None:
        self.run, self.data = run, data

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table of validation samples."""
        self._log(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table of test samples."""
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        if not isinstance(pl_module, Answering) or not trainer.is_global_zero:
            return
        outcomes = pl_module.outcomes[split]
        first = next(iter(outcomes))
        if CAPTIONS in outcomes:
            labels = rank_all({case: outcomes[case] for case in (first, CAPTIONS)})[first][0]
        else:
            labels = outcomes[first][1][:, 0].astype(int)
        chosen = range(0, len(labels), -(-len(labels) // MAX_TABLE_EXAMPLES))  # spread over the split
        examples = [(self.data.example(split, i), self.data.word(split, i, int(labels[i]))) for i in chosen]
        rows = [(example.clip, example.question, word, example.answer) for example, word in examples]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("clip", "question", "prediction", "answer"), *rows])
        with atomic_write(self.run / f"examples.{split}.csv") as file:
            file.write(text.getvalue().encode())
        record = find_record(trainer.loggers)
        if record.run is None:
            return
        import wandb  # noqa: PLC0415  takes seconds

        strips = [wandb.Image(np.concatenate(list(example.frames), axis=1)) for example, _ in examples]
        table = [(strip, *row) for strip, row in zip(strips, rows, strict=True)]
        columns = ("frames", "clip", "question", "prediction", "answer")
        record.log_table(f"{split}/examples", columns, table, trainer.global_step - 1)
