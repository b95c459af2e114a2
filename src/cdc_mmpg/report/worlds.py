"""Table of the worlds of the synthetic dataset: accuracy of each kind of adaptation in each world.

`cdc-mmpg worlds checkpoints` prints it and writes `worlds.md`; `make train` and `make tables` end with it.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cdc_mmpg.catalogue import BASELINE, COMPARED_WORLDS, KNOWLEDGE, ROWS, SESSION, WORLDS, Row, find_knowledge
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, Table, cite, join_texts
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.selection import load_comparable
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import escape_controls, log_to_terminal, run_to_exit_code
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
    """Build a table with a row for each of `SIDES` with runs in any world, and a column of accuracies per world."""
    labels = {Side(row.method, row.condition): row.label for row in ROWS}
    names = [WORLDS[world.dataset] for world in worlds]
    rows = []
    for side in SIDES:
        runs = [world.find_runs(*side) for world in worlds]
        if not any(runs):
            continue
        first = next(number for number, seeds in enumerate(runs) if seeds)
        gains = [world.compare(Side(SESSION), side) if side.name != SESSION else None for world in worlds]
        over = [gain.format() if gain else cite("–") for gain in gains]
        rows.append((labels[side], [
            cite(find_knowledge(Row("", *side))),
            cite_result(worlds[first], runs[first][0], "bytes", "down"),
            *(world.cite_accuracy(side) or NO_TEXT for world in worlds),
            join_texts(" / ".join("{}" for _ in over), *over) if any(gains) else NO_TEXT,
        ]))  # fmt: skip
    header = ["method", "knows", "down, B", *(f"{name}: unseen %" for name in names),
              f"session minus this, points: {' / '.join(names)}"]  # fmt: skip
    return Table("worlds", "Comparison of the worlds", header, rows)


def write_worlds_caption(worlds: Sequence[Evidence]) -> str:
    """Return the caption: how to read the table, and the commits of its runs."""
    runs = [run for world in worlds for side in SIDES for run in world.find_runs(*side)]
    seeds = max(len(world.find_runs(BASELINE)) for world in worlds)
    commits = dict.fromkeys(shorten_commit(commit) for run in runs if (commit := run.find("commit")))
    spread = (
        f"±: standard deviation over {seeds} seeds, each with its own world and pretraining; in brackets: 95 % "
        "interval, of differences paired by question (resampling seeds, then devices, then clips)."
        if seeds > 1
        else "One world of each kind and one pretraining; in brackets: 95 % interval, of differences paired by "
        "question (resampling devices, then clips)."
    )
    known = {letter for side in SIDES for letter in find_knowledge(Row("", *side))}
    knows = "; ".join(f"{letter} = {meaning}" for letter, meaning in KNOWLEDGE.items() if letter in known)
    knows = f"Knows (beyond the training questions and answers): {knows}."
    setting = (
        "Accuracy on devices unseen in training. Down: payload of a layer, for every question of CDC-MMPG and once for "
        "a session. The session, in-context and grey-world rows use 16 unlabelled clips of the device (n = 16)."
    )
    sentences = (setting, spread, knows, describe_headroom(worlds), f"Commit {', '.join(commits)}.")
    return " ".join(filter(None, sentences))


def describe_headroom(worlds: Sequence[Evidence]) -> str:
    """Return a sentence on how much of the ceiling's gain over the baseline the session reaches; "" without runs."""
    shares = []
    for world in worlds:
        baseline, session, ceiling = (
            world.cite_mean_accuracy(side) for side in (Side(BASELINE), Side(SESSION), Side("corrected_true_cast"))
        )
        if baseline and session and ceiling and ceiling.amount > baseline.amount:
            share = (session.amount - baseline.amount) / (ceiling.amount - baseline.amount)
            shares.append(f"{100 * share:.0f} % in {WORLDS[world.dataset]}")
    if not shares:
        return ""
    return f"Of what the ceiling gains over fine-tuning, the session gains {' and '.join(shares)}."


def load_worlds(folder: Path, loaded: Evidence | None = None) -> list[Evidence]:
    """Load the worlds that have runs of the table.

    Args:
        folder: folder of the datasets, `checkpoints`.
        loaded: world that is loaded already, whose folder the sources of the others are relative to.
    """
    origin = loaded.folder if loaded else None
    worlds = [
        loaded if loaded and loaded.dataset == name else load_comparable(folder / name, True, origin)
        for name in COMPARED_WORLDS
    ]
    return [world for world in worlds if any(world.find_runs(*side) for side in SIDES)]


def show_worlds(folder: Path) -> None:
    """Print the table of all worlds with runs below a folder, and write it to worlds.md."""
    worlds = load_worlds(folder)
    if not worlds:
        print(f"{folder}: no finished run of the synthetic dataset to compare")
        return
    table, caption = build_worlds_table(worlds), write_worlds_caption(worlds)
    path = folder / "worlds.md"
    with atomic_write(path) as file:
        file.write(escape_controls(f"{render_markdown(table)}\n\n{caption}\n").encode())
    print_table(table, caption)
    print(escape_controls(f"written: {path}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it to the folder of the datasets; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run_to_exit_code(partial(show_worlds, options.folder))
