"""Logs of a run: CSV always, Weights & Biases beside it, everything below the run's folder."""

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
from cdc_mmpg.evaluation.metrics import CAPTIONS, ranked
from cdc_mmpg.files import atomic_write
from cdc_mmpg.methods.answering import Answering

logger = logging.getLogger(__name__)

PROJECT = "cdc-mmpg"
MAX_TABLE_EXAMPLES = 8  # in a table
PATIENCE_SECONDS = 15  # with a server that does not answer
UPLOAD_SECONDS = 120  # for what is not uploaded when a run ends; it stays on the disk
# What `loggers` sets by itself, and what cannot stop a run.
KEPT = ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING")
AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")  # how a sweep's agent names the run it starts


def loggers(run: Path, config: dict[str, Any]) -> list[Logger]:
    """Return loggers: CSV in `logs/`, and W&B in `wandb/` unless WANDB_MODE is disabled.

    W&B works offline unless a key is configured (WANDB_API_KEY or ~/.netrc) or WANDB_MODE says otherwise; a server
    that does not answer costs some seconds at the start or at the end and then nothing. Where its settings are wrong it
    works offline without them, and where that fails, too, there are the CSV logs alone. Below a sweep's agent the run
    is the one that the agent waits for, if its method is the one asked for: what make trains before it is a run apart.

    Args:
        run: `<dataset>/<method>/seed<N>`, whose parts name the W&B run, its group and its tags.
        config: what to record with the run.
    """
    found: list[Logger] = [CSVLogger(run, name="logs")]
    if not os.environ.get("WANDB_MODE", "-").strip():
        del os.environ["WANDB_MODE"]  # W&B takes an empty one for a wrong one
    if os.environ.get("WANDB_MODE", "").strip().lower() == "disabled":
        return found
    place = run.absolute() / "wandb"
    for name in ("CACHE", "DATA", "ARTIFACT"):  # W&B would use the home and the working directory
        os.environ[f"WANDB_{name}_DIR"] = str(place / name.lower())
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # sent offline, too, and waited for: 14 s a run
    method = run.absolute().parts[-2]
    awaited = AGENT[0] in os.environ and os.environ.get("METHOD", method) == method  # make exports what it was told
    try:
        place.mkdir(parents=True, exist_ok=True)
        wandb_run = _begin(run, config, awaited)
    except Exception as error:  # the client raises errors of many families
        logger.warning("W&B cannot be used (%s): logging offline; `wandb sync` uploads later", _reason(error))
        # The next run of this process does not wait again, nor read what was wrong.
        for name in [name for name in os.environ if name.startswith("WANDB_") and name not in KEPT]:
            del os.environ[name]
        os.environ |= {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(place / "config")}  # no settings of the home
        try:
            wandb_run = _begin(run, config, False, uuid.uuid4().hex)  # the other identity is taken by the attempt
        except Exception as again:
            logger.warning("W&B cannot be used at all (%s): the logs are in %s/logs", _reason(again), run)
            os.environ["WANDB_MODE"] = "disabled"
            return found
    return [*found, WandbLogger(experiment=wandb_run)]


def _begin(run: Path, config: dict[str, Any], awaited: bool, identity: str | None = None) -> Any:
    """Start a W&B run.

    Args:
        run, config: see `loggers`.
        awaited: whether it is the run that a sweep's agent waits for.
        identity: of the run; None is the one that it had before, if there is one.
    """
    import wandb  # noqa: PLC0415  takes seconds, and only here

    dataset, method, seed = run.absolute().parts[-3:]
    if "@" in os.environ.get("WANDB_BASE_URL", ""):  # the client prints the address
        raise ValueError("WANDB_BASE_URL holds a password: leave it out, the key is WANDB_API_KEY")
    kept = run / "wandb" / "id"  # a run that goes on is one run there, too
    if awaited:
        kept.write_text(os.environ[AGENT[1]])
    elif identity is None:
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex)
        identity = kept.read_text()
    wandb.teardown()  # it reads the environment once, and an earlier run of this process may have failed
    with contextlib.nullcontext() if awaited else _without_agent():
        mode: Any = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        wandb_run = wandb.init(
            project=None if awaited else os.environ.get("WANDB_PROJECT", PROJECT),
            name=f"{dataset}/{method}/{seed}",
            group=dataset,
            job_type=method,
            tags=[part[:64] for part in (dataset, method, seed)],  # the longest that it takes
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


def _reason(error: Exception) -> str:
    """Return what is wrong, in one line; no value of a setting that the error quotes, for it may be the key."""
    if callable(errors := getattr(error, "errors", None)):  # pydantic's
        return "; ".join(f"WANDB_{'.'.join(map(str, part['loc'])).upper()}: {part['type']}" for part in errors())
    text = " ".join(str(error).split())
    for name, value in os.environ.items():
        if name.startswith("WANDB_") and value and re.search("KEY|TOKEN|PASS|SECRET", name):
            text = text.replace(value, "...")
    return f"{type(error).__name__}: " + re.sub(r"//[^/@\s]*@", "//...@", text)[:300]


@contextlib.contextmanager
def _without_agent() -> Iterator[None]:
    """Run as if no sweep's agent had started this process."""
    hidden = {name: os.environ.pop(name) for name in AGENT if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden


def close(boards: Sequence[Logger], results: dict[str, Any]) -> None:
    """Put a run's results into its summary, and end it: the next run of this process is another one.

    The summary's value of the monitored metric becomes that of the best epoch, where W&B has the last; a sweep
    optimises that number. (`define_metric(summary="max")` would leave a table in its place, which is none.)

    Args:
        boards: of the run.
        results: as `results.json` has them.
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
            except Exception as error:  # the results are written: a broken server takes nothing from them
                logger.warning("W&B could not end the run (%s): `wandb sync` uploads what it lacks", error)


def publish(folder: Path, page: str, figures: Mapping[str, float]) -> None:
    """Publish a dataset's report as a W&B run of its own, beside those of the methods.

    Args:
        folder: `checkpoints/<dataset>`.
        page: the report, as HTML.
        figures: what stands on it, by name.
    """
    for board in loggers(folder / "report" / "page", {}):
        if isinstance(board, WandbLogger):
            import wandb  # noqa: PLC0415  see `loggers`

            try:
                board.experiment.log({"report": wandb.Html(page, inject=False)})
                board.experiment.summary.update(dict(figures))
                board.experiment.finish()
            except Exception as error:  # the page is written: a broken server takes nothing from it
                logger.warning("W&B could not take the report (%s): `wandb sync` uploads what it lacks", error)


class ExampleTable(Callback):
    """After every evaluation: a few clips with question, prediction and answer, as CSV and as a W&B table.

    Args:
        run: the run's folder.
        data: the dataset.
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
            labels = ranked({case: outcomes[case] for case in (first, CAPTIONS)})[first][0]
        else:
            labels = outcomes[first][1][:, 0].astype(int)
        chosen = range(0, len(labels), -(-len(labels) // MAX_TABLE_EXAMPLES))  # from all over the split
        examples = [(self.data.example(split, i), self.data.word(split, i, int(labels[i]))) for i in chosen]
        rows = [(example.clip, example.question, word, example.answer) for example, word in examples]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("clip", "question", "prediction", "answer"), *rows])
        with atomic_write(self.run / f"examples.{split}.csv") as file:
            file.write(text.getvalue().encode())
        for board in trainer.loggers:
            if isinstance(board, WandbLogger) and self.tables:
                import wandb  # noqa: PLC0415  see `loggers`

                strips = [wandb.Image(np.concatenate(list(example.frames), axis=1)) for example, _ in examples]
                table = [[strip, *row] for strip, row in zip(strips, rows, strict=True)]
                try:
                    board.log_table(f"{split}/examples", ["frames", "clip", "question", "prediction", "answer"], table)
                except Exception as error:  # of a table the server is asked at once, and it may be gone meanwhile
                    logger.warning("W&B takes no table (%s): this run logs no more of them", error)
                    self.tables = False
