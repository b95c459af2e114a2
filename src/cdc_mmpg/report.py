"""The table: the methods of a dataset side by side, from their results.json files, beside the paper's figures."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.results import RESULTS, read_results

# In the order of the paper's tables; phase one answers nothing and has no row.
NAMES = {
    "linear": "F-linear",
    "fine_tuning": "Fine-tuning",
    "hyper": "F-hyper",
    "hyper_fan_in": "F-hyper, hyperfan-in",
    "cdc_mmpg": "CDC-MMPG",
    "cdc_mmpg_frozen": "CDC-MMPG, frozen",
}

# Accuracy in %, tables 1 and 2 of the paper.
PAPER = {
    "msrvtt": {"linear": 13.6, "fine_tuning": 36.7, "hyper": 11.1, "cdc_mmpg": 37.1},
    "msvd": {"linear": 17.3, "fine_tuning": 34.3, "hyper": 6.34, "cdc_mmpg": 35.4},
    "tgif": {"linear": 27.3, "fine_tuning": 54.7, "hyper": 19.6, "cdc_mmpg": 55.2},
}

COLUMNS = ("method", "test accuracy %", "paper %", "val %", "D-Param", "C-Param", "trained", "bytes up", "bytes down",
           "epochs", "best", "train s", "seeds")  # fmt: skip


def finished_runs(folder: Path, method: str = "*") -> list[dict[str, Any]]:
    """The results of all seeds of a method, or of all methods."""
    found = (read_results(path.parent) for path in sorted(folder.glob(f"{method}/seed*/{RESULTS}")))
    return [results for results in found if results]


def rows(folder: Path) -> list[list[str]]:
    """A row for every method with finished runs below `folder` (`checkpoints/<dataset>`), means over its seeds."""
    table = []
    for method, name in NAMES.items():
        runs = finished_runs(folder, method)
        if not runs:
            continue
        first = runs[0]
        published = PAPER.get(first["dataset"], {}).get(method)
        table.append(
            [
                name,
                _percent([run["metrics"]["test/accuracy"] for run in runs]),
                f"{published:g}" if published else "",
                _percent([run["metrics"]["val/accuracy"] for run in runs]),
                *(f"{first['parameters'][place]:,}" for place in ("device", "cloud", "trained")),
                *(f"{first['bytes'][way]:,}" for way in ("up", "down")),
                _same([run["epochs"] for run in runs]),
                _same([run["best_epoch"] + 1 for run in runs]),
                f"{mean(run['seconds']['train'] for run in runs):.1f}",
                str(len(runs)),
            ]
        )
    if not table:
        raise ConfigError(f"{folder}: no finished run of {', '.join(NAMES)}; train one first (make train)")
    return table


def caption(folder: Path) -> str:
    """What the figures were obtained on, and by which commits."""
    runs = [run for method in NAMES for run in finished_runs(folder, method)]

    def each(values: list[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    ceilings = [f"{100 * run['data']['test']['ceiling']:.1f} %" for run in runs]
    commits = [run["commit"][:8] + run["commit"][40:] for run in runs]
    return (
        f"{folder.name}: {each([run['questions']['test'] for run in runs])} test questions, "
        f"{each([run['questions']['train'] for run in runs])} for training; no method can exceed "
        f"{each(ceilings)} (answers outside the vocabulary). "
        f"Encoder from: {each([run['encoder'] or 'random weights' for run in runs])}. "
        f"Best epoch by validation accuracy, tested once. Commit {each(commits)}."
    )


def markdown(folder: Path) -> str:
    """The table with its caption."""
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows(folder)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption(folder)}\n"


def _percent(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _same(values: list[int]) -> str:
    return "/".join(str(value) for value in dict.fromkeys(values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it as `table.md` beside the runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>")
    folder = parser.parse_args(arguments).folder
    try:
        table = Table(*COLUMNS, caption=caption(folder), caption_justify="left")
        for row in rows(folder):
            table.add_row(*row)
    except CDCError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    Console(width=max(Console().width, 200)).print(table)  # wide enough for any figure; a narrow terminal wraps it
    with atomic_write(folder / "table.md") as file:
        file.write(markdown(folder).encode())
    print(f"written: {folder / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
