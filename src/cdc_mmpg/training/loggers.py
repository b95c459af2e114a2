"""Logs of a run: always CSV, usually also Weights & Biases, all in the run's folder."""

import contextlib
import csv
import io
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from cdc_mmpg.data.batch import Split
from cdc_mmpg.data.interface import VideoTextData
from cdc_mmpg.evaluation.metrics import CAPTIONS, rank_all
from cdc_mmpg.files import atomic_write
from cdc_mmpg.methods.answering import Answering

logger = logging.getLogger(__name__)

PROJECT = "cdc-mmpg"
MAX_TABLE_EXAMPLES = 8  # rows of a table of examples
PATIENCE_SECONDS = 15  # timeout for a server that does not answer
UPLOAD_SECONDS = 120  # timeout of the final upload; the rest stays on disk
# Variables that `build_loggers` sets itself, or that cannot make W&B fail.
PRESERVED_VARIABLES = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING")
AGENT_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")  # set by a sweep's agent for its run


def build_loggers(run: Path, config: dict[str, Any]) -> list[Logger]:
    """Return the loggers of a run: CSV in `logs/`, and W&B in `wandb/` unless WANDB_MODE is disabled.

    W&B works offline unless a key is configured (WANDB_API_KEY or ~/.netrc) or WANDB_MODE is set. A server that does
    not answer delays the start or the end by some seconds. With invalid settings W&B works offline without them; if
    that fails, too, only CSV is logged. Under a sweep's agent, a run of METHOD is the run that the agent waits for; the
    runs that it builds on are separate W&B runs.

    Args:
        run: `<dataset>/<method>/seed<N>`, whose parts name the W&B run, its group and its tags.
        config: configuration to record with the run.
    """
    boards: list[Logger] = [CSVLogger(run, name="logs")]
    if not os.environ.get("WANDB_MODE", "-").strip():
        del os.environ["WANDB_MODE"]  # W&B refuses an empty value
    if os.environ.get("WANDB_MODE", "").strip().lower() == "disabled":
        return boards
    folder = run.absolute() / "wandb"
    for name in ("CACHE", "DATA", "ARTIFACT"):  # W&B would use the home and the working directory
        os.environ[f"WANDB_{name}_DIR"] = str(folder / name.lower())
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it sends even offline: 14 s a run
    method = run.absolute().parts[-2]
    awaited = AGENT_VARIABLES[0] in os.environ and os.environ.get("METHOD", method) == method  # make exports METHOD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wandb_run = _start_wandb_run(run, config, awaited)
    except Exception as error:  # the client raises many unrelated types
        logger.warning(
            "W&B cannot be used (%s): logging offline; upload later with `wandb sync %s/wandb/offline-run-*`",
            _describe_error(error), run,
        )  # fmt: skip
        # So that the next run of this process neither waits again nor reads the invalid settings.
        for name in [name for name in os.environ if name.startswith("WANDB_") and name not in PRESERVED_VARIABLES]:
            del os.environ[name]
        os.environ |= {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(folder / "config")}  # not the home's
        try:
            wandb_run = _start_wandb_run(run, config, False, uuid.uuid4().hex)  # the first id may be in use
        except Exception as again:
            logger.warning("W&B cannot be used at all (%s): the logs are in %s/logs", _describe_error(again), run)
            os.environ["WANDB_MODE"] = "disabled"
            return boards
    return [*boards, WandbLogger(experiment=wandb_run)]


def _start_wandb_run(run: Path, config: dict[str, Any], awaited: bool, identity: str | None = None) -> Any:
    """Start a W&B run.

    Args:
        run: see `build_loggers`.
        config: see `build_loggers`.
        awaited: whether a sweep's agent waits for this run.
        identity: id of the W&B run; None for the one in the run's folder, or a new one.
    """
    import wandb  # noqa: PLC0415  takes seconds

    dataset, method, seed = run.absolute().parts[-3:]
    if "@" in os.environ.get("WANDB_BASE_URL", ""):  # the client prints the URL
        raise ValueError("WANDB_BASE_URL contains a password: remove it and set WANDB_API_KEY")
    kept = run / "wandb" / "id"  # a resumed run keeps its W&B run
    if awaited:
        kept.write_text(os.environ[AGENT_VARIABLES[1]])
    elif identity is None:
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex)
        identity = kept.read_text()
    wandb.teardown()  # W&B caches the environment, and an earlier run in this process may have failed
    with contextlib.nullcontext() if awaited else _without_agent():
        mode: Any = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        wandb_run = wandb.init(
            project=None if awaited else os.environ.get("WANDB_PROJECT", PROJECT),
            name=f"{dataset}/{method}/{seed}",
            group=dataset,
            job_type=method,
            tags=[part[:64] for part in (dataset, method, seed)],  # the maximum length
            id=None if awaited else identity,
            resume="allow",
            dir=run,
            mode=mode,
            config=config,
            settings=wandb.Settings(
                init_timeout=PATIENCE_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                silent=mode == "offline",
                console="off",
            ),
        )
    wandb_run.define_metric("trainer/global_step")  # the horizontal axis
    wandb_run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return wandb_run


def _describe_error(error: Exception) -> str:
    """Return an error as one line without the values of settings, which may be the key."""
    if callable(errors := getattr(error, "errors", None)):  # of pydantic
        return "; ".join(f"WANDB_{'.'.join(map(str, part['loc'])).upper()}: {part['type']}" for part in errors())
    text = " ".join(str(error).split())
    for name, value in os.environ.items():
        if name.startswith("WANDB_") and value and re.search("KEY|TOKEN|PASS|SECRET", name):
            text = text.replace(value, "...")
    return f"{type(error).__name__}: " + re.sub(r"//[^/@\s]*@", "//...@", text)[:300]


@contextlib.contextmanager
def _without_agent() -> Iterator[None]:
    """Hide the variables of a sweep's agent during the block."""
    hidden = {name: os.environ.pop(name) for name in AGENT_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden


def finish_loggers(boards: Sequence[Logger], results: dict[str, Any]) -> None:
    """Write a run's results to its W&B summary and end the W&B run, so that the next run starts a new one.

    The summary gets the monitored metric of the best epoch in place of the last one; a sweep optimises that number.
    (`define_metric(summary="max")` would store a table instead of a number.)

    Args:
        boards: loggers of the run.
        results: content of `results.json`.
    """
    for board in boards:
        if isinstance(board, WandbLogger):
            figures = {
                f"test/{case}/{group}": cells["all"]["value"]
                for case, groups in results.get("accuracy", {}).items()
                for group, cells in groups.items()
                if "all" in cells
            }
            costs = {f"{part}/{name}": value for part in ("parameters", "bytes", "seconds")
                     for name, value in results[part].items()}  # fmt: skip
            best = {"best_epoch": results["best_epoch"]}
            try:
                board.experiment.summary.update(results["metrics"] | figures | costs | best)
                board.experiment.finish()
            except Exception as error:  # results.json is already written, so a server error is only logged
                logger.warning(
                    "W&B could not finish the run (%s): `wandb sync` uploads the rest", _describe_error(error)
                )


def publish(folder: Path, page: str, figures: Mapping[str, float]) -> None:
    """Publish a dataset's report as a separate W&B run.

    Args:
        folder: `checkpoints/<dataset>`.
        page: HTML of the report.
        figures: values in the report, by name.
    """
    for board in build_loggers(folder / "report" / "page", {}):
        if isinstance(board, WandbLogger):
            import wandb  # noqa: PLC0415  see `build_loggers`

            try:
                board.experiment.log({"report": wandb.Html(page, inject=False)})
                board.experiment.summary.update(dict(figures))
                board.experiment.finish()
            except Exception as error:  # the page is already written, so a server error is only logged
                logger.warning(
                    "W&B could not save the report (%s): `wandb sync` uploads the rest", _describe_error(error)
                )


class ExampleTable(Callback):
    """Table of a few clips with question, prediction and answer after every evaluation, as CSV and in W&B.

    Args:
        run: folder of the run.
        data: dataset of the clips.
    """

    def __init__(self, run: Path, data: VideoTextData) -> None:
        self.run, self.data, self.tables = run, data, True

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
        for board in trainer.loggers:
            if isinstance(board, WandbLogger) and self.tables:
                import wandb  # noqa: PLC0415  see `build_loggers`

                strips = [wandb.Image(np.concatenate(list(example.frames), axis=1)) for example, _ in examples]
                table = [[strip, *row] for strip, row in zip(strips, rows, strict=True)]
                try:
                    board.log_table(f"{split}/examples", ["frames", "clip", "question", "prediction", "answer"], table)
                except Exception as error:  # a table is sent at once, and the server may be unreachable by now
                    logger.warning(
                        "W&B could not save a table (%s): this run logs no more tables", _describe_error(error)
                    )
                    self.tables = False
