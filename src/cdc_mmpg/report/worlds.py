"""The worlds of the embedded dataset side by side: what each kind of adaptation is worth in each, in one table.

`cdc-mmpg worlds checkpoints` prints it and writes `worlds.md`; `make train` and `make tables` end with it.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cdc_mmpg.catalogue import BASELINE, KNOWLEDGE, ROWS, SESSION, WORLDS, Row, knowledge_of
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, Table, cite, join_texts
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.selection import load_comparable
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import escape_controls, exit_code, log_to_terminal
from cdc_mmpg.report.caption import shorten_commit
from cdc_mmpg.report.cells import cite_result
from cdc_mmpg.report.rendering import print_table, render_markdown

SIDES = (
    Side(BASELINE),
    Side("on_device", "t3a"),
    Side("mean_anchor_virtual"),
    Side("in_context_virtual"),
    Side("on_device", "labels_15"),
    Side("cdc_mmpg"),
    Side(SESSION),
    Side("corrected_grey_world"),
    Side("corrected_true_cast"),
)


def build_worlds_table(worlds: Sequence[Evidence]) -> Table:
    """Return a row for each of `SIDES` that some world has runs of; each world has a column of accuracies."""
    labels = {Side(row.method, row.condition): row.label for row in ROWS}
    names = [WORLDS[world.dataset] for world in worlds]
    rows = []
    for side in SIDES:
        runs = [world.find_runs(*side) for world in worlds]
        if not any(runs):
            continue
        first = next(number for number, own in enumerate(runs) if own)
        gains = [world.compare(Side(SESSION), side) if side.name != SESSION else None for world in worlds]
        missing = cite("–")
        over = [gain.format() if gain else missing for gain in gains]
        rows.append((labels[side], [
            cite(knowledge_of(Row("", *side))),
            cite_result(worlds[first], runs[first][0], "bytes", "down"),
            *(world.cite_accuracy(side) or NO_TEXT for world in worlds),
            join_texts(" / ".join("{}" for _ in over), *over) if any(gains) else NO_TEXT,
        ]))  # fmt: skip
    header = ["method", "knows", "down, B", *(f"{name}: unseen %" for name in names),
              f"session minus it, points: {' / '.join(names)}"]  # fmt: skip
    return Table("worlds", "Worlds side by side", header, rows)


def write_worlds_caption(worlds: Sequence[Evidence]) -> str:
    """Return how to read the table, and by which commits its runs are."""
    runs = [run for world in worlds for side in SIDES for run in world.find_runs(*side)]
    seeds = max(len(world.find_runs(BASELINE)) for world in worlds)
    commits = dict.fromkeys(shorten_commit(commit) for run in runs if (commit := run.find("commit")))
    spread = (
        f"±: standard deviation over {seeds} pairs of world and pretraining; in brackets: 95 % interval, pairs, then "
        "devices, then clips resampled."
        if seeds > 1
        else "One world of each kind and one pretraining; in brackets: 95 % interval, devices, then clips resampled."
    )
    known = {letter for side in SIDES for letter in knowledge_of(Row("", *side))}
    knows = "; ".join(f"{letter} {meaning}" for letter, meaning in KNOWLEDGE.items() if letter in known)
    return f"Accuracy on devices that nothing was trained on. {spread} Knows: {knows}. Commit {', '.join(commits)}."


def show_worlds(folder: Path) -> None:
    """Print the table of the worlds that have runs below a folder, and write it to worlds.md."""
    worlds: list[Evidence] = [load_comparable(folder / name, may_be_empty=True) for name in WORLDS]
    worlds = [world for world in worlds if any(world.find_runs(*side) for side in SIDES)]
    if not worlds:
        print(f"{folder}: no finished run of the embedded dataset to set side by side")
        return
    table, caption = build_worlds_table(worlds), write_worlds_caption(worlds)
    path = folder / "worlds.md"
    with atomic_write(path) as file:
        file.write(escape_controls(f"{render_markdown(table)}\n\n{caption}\n").encode())
    print_table(table, caption)
    print(escape_controls(f"written: {path}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it beside the datasets; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return exit_code(partial(show_worlds, options.folder))
