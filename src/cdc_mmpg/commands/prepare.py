"""Check of a dataset and preparation of its frames: `cdc-mmpg data OUT --config DATASET.yaml ...`.

All checks run before the dataset is refused. The result is printed as a table and written to `data.json`, with the
configuration, the commit and the versions; the frames go to the cache that training reads.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cdc_mmpg.errors import DataError, format_names
from cdc_mmpg.program import escape_controls, exit_on_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.results import describe_provenance, write_json
from cdc_mmpg.training.cli import check_paths

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and prepare a dataset; return the exit code (see `errors`), 3 if training would refuse the dataset."""
    folder, *options = list(sys.argv[1:] if arguments is None else arguments)
    # `make data` takes the variables of `make train`; options of the training do not affect the data.
    options = [option for option in options if not option.startswith(("--model.", "--trainer."))]
    log_to_terminal()
    exit_on_signals()

    def run() -> None:
        check_paths(options)
        from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  imports torch and Lightning: 10 s

        experiment = Experiment(options, run=False)
        prepare(experiment.dataset, experiment.settings["data"], Path(folder))

    return run_to_exit_code(run)


def prepare(dataset: Any, settings: dict[str, Any], folder: Path) -> None:
    """Check a DataModule, fill its frame cache, print the result and write `data.json` into `folder`.

    Raises:
        DataError: training would refuse the dataset; names all problems.
    """
    found = dataset.check()
    if not found["splits"]:
        raise DataError(_join_problems(found["problems"], dataset.remedy()))
    write_json({**found, "configuration": settings, **describe_provenance()}, folder / "data.json")
    console = Console(soft_wrap=True, markup=False, emoji=False)  # file names may look like markup
    console.print(build_table(found, dataset.task))
    for row in found["published"]:
        published = "as published" if row["same"] else f"published {row['published']:,}"
        edition = f" ({row['edition']})" if row["edition"] else ""
        console.print(f"{row['split']}: {row['here']:,} {row['what']}, {published}{edition}")
    if not all(row["same"] for row in found["published"]):
        logger.warning("these are not the published splits: figures from them are not comparable with published ones")
    for split, source in found["notes"].items():
        console.print(escape_controls(f"{split}: {source}"))
    cache = found["cache"]
    ready = f"{found['ready']:,} of {found['clips']:,} clips ready, {len(found['missing']):,} absent, "
    ready += f"{len(found['unreadable']):,} unreadable"
    console.print(escape_controls(f"{ready}; frames in {cache['folder']} ({decimal(cache['bytes'])})"))
    print(f"written: {folder / 'data.json'}")
    problems, rest = list(found["problems"]), ", all named in data.json"
    for pair, names in found["shared_between_splits"].items():
        remedy = "fix the annotation files, or fetch them again"
        problems.append(f"{pair} share {len(names)} clips, but splits must not: {remedy}:{format_names(names, rest)}")
    lost = dataset.list_lost(found["missing"], found["unreadable"])
    if len(lost) > dataset.max_missing:
        problems.append(dataset.describe_lost(lost, found["clips"]))
    elif lost:
        logger.warning("left out with their questions:%s", format_names(lost, rest))
    if alike := found["same_content_in_splits"]:
        logger.warning(
            "the same file under different names, in different splits:%s",
            format_names([", ".join(names) for names in alike], rest),
        )
    if problems:
        raise DataError(_join_problems(problems, dataset.remedy()))


def _join_problems(problems: Sequence[str], remedy: str) -> str:
    """Join the problems into one text that has the remedy, if any problem names it, once and at the end."""
    text = "\n".join(problems)
    return text.replace(f"\n{remedy}", "") + (f"\n{remedy}" if remedy in text else "")


def build_table(found: dict[str, Any], task: str) -> Table:
    """Return a table of the splits with their counts; for open-ended tasks also the answers outside the vocabulary."""
    texts = "captions" if task == "retrieval" else "questions"
    answers = ["unknown answers", "ceiling %"] if task == "open_ended" else []
    shown = Table("split", texts, "clips", *answers, f"{texts} ready", "clips ready", box=SIMPLE_HEAD, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, row in found["splits"].items():
        known = [f"{row['unknown_answers']:,}", f"{100 * row['ceiling']:.1f}"] if "ceiling" in row else ["?", "?"]
        ready = [f"{row['ready'][kind]:,}" for kind in ("questions", "clips")]
        shown.add_row(name, f"{row['questions']:,}", f"{row['clips']:,}", *known[: len(answers)], *ready)
    return shown
