"""Check a dataset and make its frames ready: `cdc-mmpg data OUT --config DATASET.yaml ...`.

Everything is looked at before anything is refused. What was found is printed as a table and written as `data.json`,
with the configuration, the commit and the versions; the frames go where training finds them.
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

from cdc_mmpg.errors import DataError, listing
from cdc_mmpg.program import escape_controls, exit_code, leave_on_signals, log_to_terminal
from cdc_mmpg.results import provenance, write_json
from cdc_mmpg.training.cli import check_paths

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a check; returns its exit code (see `errors`): 3 where training would refuse the dataset."""
    folder, *options = list(sys.argv[1:] if arguments is None else arguments)
    # What is said to a run about its training is nothing to its data: both take the same variables of make.
    options = [option for option in options if not option.startswith(("--model.", "--trainer."))]
    log_to_terminal()
    leave_on_signals()

    def run() -> None:
        check_paths(options)
        from cdc_mmpg.training.experiment import Experiment  # noqa: PLC0415  imports torch and Lightning: 10 s

        experiment = Experiment(options, run=False)
        prepare(experiment.dataset, experiment.settings["data"], Path(folder))

    return exit_code(run)


def prepare(dataset: Any, settings: dict[str, Any], folder: Path) -> None:
    """Check a DataModule, fill its frame cache, print what was found and write `data.json` into `folder`.

    Raises:
        DataError: training would refuse the dataset as it is; names what is wrong.
    """
    found = dataset.check()
    if not found["splits"]:
        raise DataError(_once(found["problems"], dataset.remedy()))
    write_json({**found, "configuration": settings, **provenance()}, folder / "data.json")
    console = Console(soft_wrap=True, markup=False, emoji=False)  # names of files are no markup
    console.print(table(found, dataset.task))
    for row in found["published"]:
        published = "as published" if row["same"] else f"published {row['published']:,}"
        edition = f" ({row['edition']})" if row["edition"] else ""
        console.print(f"{row['split']}: {row['here']:,} {row['what']}, {published}{edition}")
    if not all(row["same"] for row in found["published"]):
        logger.warning("these are not the published splits: no figure from them compares with published ones")
    for split, source in found["notes"].items():
        console.print(escape_controls(f"{split}: {source}"))
    cache = found["cache"]
    ready = f"{found['ready']:,} of {found['clips']:,} clips ready, {len(found['missing']):,} absent, "
    ready += f"{len(found['unreadable']):,} unreadable"
    console.print(escape_controls(f"{ready}; frames in {cache['folder']} ({decimal(cache['bytes'])})"))
    print(f"written: {folder / 'data.json'}")
    refused, rest = list(found["problems"]), ", all named in data.json"
    for pair, names in found["shared_between_splits"].items():
        refused.append(f"{pair} share {len(names)} clips:{listing(names, rest)}")
    lost = dataset.list_lost(found["missing"], found["unreadable"])
    if len(lost) > dataset.max_missing:
        refused.append(dataset.describe_lost(lost, found["clips"]))
    elif lost:
        logger.warning("left out with their questions:%s", listing(lost, rest))
    if alike := found["same_content_in_splits"]:
        logger.warning(
            "the same file under different names, in different splits:%s",
            listing([", ".join(names) for names in alike], rest),
        )
    if refused:
        raise DataError(_once(refused, dataset.remedy()))


def _once(problems: Sequence[str], remedy: str) -> str:
    """What is wrong, and the remedy at the end if it is one for any of it."""
    said = "\n".join(problems)
    return said.replace(f"\n{remedy}", "") + (f"\n{remedy}" if remedy in said else "")


def table(found: dict[str, Any], task: str) -> Table:
    """Splits with their counts; answers outside a vocabulary where there is one."""
    asked = "captions" if task == "retrieval" else "questions"
    answers = ["unknown answers", "ceiling %"] if task == "open_ended" else []
    shown = Table("split", asked, "clips", *answers, f"{asked} ready", "clips ready", box=SIMPLE_HEAD, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, row in found["splits"].items():
        known = [f"{row['unknown_answers']:,}", f"{100 * row['ceiling']:.1f}"] if "ceiling" in row else ["?", "?"]
        ready = [f"{row['ready'][what]:,}" for what in ("questions", "clips")]
        shown.add_row(name, f"{row['questions']:,}", f"{row['clips']:,}", *known[: len(answers)], *ready)
    return shown
