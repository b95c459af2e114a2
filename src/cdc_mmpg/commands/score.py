"""Predictions of other models as runs, which the tables and the report show as rows with the name of the file."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdc_mmpg.catalogue import BY_NAME
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.files import hash_file
from cdc_mmpg.program import exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import PREDICTIONS, RESULTS, describe_provenance, write_json
from cdc_mmpg.training.cli import check_paths
from cdc_mmpg.training.wandb_record import Subject, list_accuracies, start_record

ROW_NAME = re.compile(r"\w[\w.+-]*")  # of a file without its suffix


def main(arguments: Sequence[str] | None = None) -> int:
    """Score predictions files on a dataset's test split; return the exit code (see `errors`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Further arguments configure the dataset, as those of `cdc-mmpg fit`.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>, in which the runs are written")
    parser.add_argument(
        "--predictions", type=Path, action="append", required=True, metavar="FILE",
        help="CSV file with the columns id, answer; repeat for several",
    )  # fmt: skip
    options, dataset = parser.parse_known_args(arguments)
    dataset = [option for option in dataset if not option.startswith(("--model.", "--trainer."))]
    log_to_terminal()
    exit_on_signals()
    return run_to_exit_code(lambda: score_files(options.folder, options.predictions, dataset, arguments))


def score_files(folder: Path, files: Sequence[Path], dataset: Sequence[str], arguments: Sequence[str]) -> None:
    """Score predictions files and write a run for each: `<folder>/<name of the file>/seed<N>`.

    Args:
        folder: folder of the dataset's runs.
        files: predictions files, see `evaluation.predictions`.
        dataset: arguments that configure the dataset, see `training.experiment`.
        arguments: arguments of the command, for the results.

    Raises:
        ConfigError: a file's name cannot be that of a row, or the task is retrieval.
        DataError: a file or the dataset is unusable.
    """
    _check_names(folder, files)
    check_paths(dataset)
    from cdc_mmpg.evaluation.predictions import read_predictions, score_predictions  # noqa: PLC0415  imports torch

    predictions = [read_predictions(file) for file in files]
    from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  imports Lightning, too

    experiment = Experiment(dataset, run=False)
    data: Any = experiment.dataset
    if data.task == "retrieval":
        raise ConfigError(
            f"{folder.name} is for retrieval, which ranks all clips and captions: predictions files hold answers to "
            "questions. Choose a dataset of questions (DATASET=)"
        )
    data.prepare_data()
    data.setup("test")
    summary = data.summary()
    for file, answers in zip(files, predictions, strict=True):
        run = folder / file.stem / f"seed{experiment.settings['seed_everything']}"
        scores = score_predictions(data, answers, run / PREDICTIONS)
        unanswered = scores.pop("unanswered")
        results = {
            **experiment.describe(run, arguments),
            **describe_provenance(),
            "predictions": {"file": file.name, "sha256": hash_file(file), "unanswered": unanswered},
            "questions": {split: row["questions"] for split, row in summary.items()},
            "data": summary,
            **scores,
        }
        write_json(results, run / RESULTS)
        record = start_record(run, Subject.of_run(run, "control"), {"predictions": results["predictions"]})
        record.summarise(list_accuracies(results))
        record.log_answers(run / PREDICTIONS)
        record.end()
        number = results["questions"]["test"]
        print(f"{file}: {number - unanswered:,} of {number:,} test questions answered; written: {run / RESULTS}")


def _check_names(folder: Path, files: Sequence[Path]) -> None:
    """Refuse files whose names, without suffix, cannot be folders and rows of their own."""
    for name, number in Counter(file.stem for file in files).items():
        if not ROW_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r}: the name of a predictions file is the label of its row: use letters, digits and ._+- only"
            )
        if number > 1:
            raise ConfigError(f"{name}: {number} predictions files have this name, the label of the row: rename them")
        entries = [path.name for path in folder.glob(f"{name}/*") if not path.name.startswith("seed")]
        entries += [path.name for path in folder.glob(f"{name}/seed*/*")]
        if name.partition(".")[0] in BY_NAME or not {*entries} <= {PREDICTIONS, RESULTS, "wandb"}:
            raise ConfigError(f"{name}: {folder / name} is for other files: rename the predictions file")
