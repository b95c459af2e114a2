"""The table: the methods of a dataset side by side, from their results.json files, beside the paper's figures."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cdc_mmpg.errors import CDCError, ConfigError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.results import RESULTS, read_results

Results = dict[str, Any]
Accuracies = dict[str, dict[str, dict[str, float]]]  # group of devices -> type of question -> value, low, high

PRETRAINING = "encoder_pretraining"  # the run that makes the encoder and answers nothing
ALL_GROUPS, ALL_TYPES = "test", "all"  # hold everything


class Row(NamedTuple):
    """A line of the table: a method as it is, or under another condition."""

    label: str  # "· ..." for a control of the row above
    method: str
    condition: str | None = None  # None: the first of its results, with which it was trained and is compared


# In the order of the paper's tables, then what is not in them; phase one answers nothing and has no row.
ROWS = (
    Row("F-linear", "linear"),
    Row("Fine-tuning", "fine_tuning"),
    Row("F-hyper", "hyper"),
    Row("F-hyper, hyperfan-in", "hyper_fan_in"),
    Row("CDC-MMPG", "cdc_mmpg"),
    Row("· another sample's anchor", "cdc_mmpg", "shuffled"),
    Row("· ADR bypassed", "cdc_mmpg", "bypassed"),
    Row("CDC-MMPG, frozen", "cdc_mmpg_frozen"),
    Row("Session, n = 1", "cdc_mmpg_session", "n1"),
    Row("Session, n = 4", "cdc_mmpg_session", "n4"),
    Row("Session, n = 8", "cdc_mmpg_session", "n8"),
    Row("Session, n = 16", "cdc_mmpg_session"),
    Row("· no anchors: the static head", "cdc_mmpg_session", "n0"),
    Row("· another device's 8 anchors", "cdc_mmpg_session", "shuffled_n8"),
    Row("· another device's 16 anchors", "cdc_mmpg_session", "shuffled_n16"),
    Row("Session, full layer", "cdc_mmpg_session_full"),
    Row("Concatenated, n = 16", "session_concatenated"),
    Row("Oracle: the true cast", "session_oracle"),
)
NAMES = {row.method: row.label for row in ROWS if row.condition is None}
FLOORS = {
    "majority": "Majority answer",
    "majority_per_type": "Majority answer per question type",
    "chance": "Chance",
}
STATIC = "n0"  # the condition in which nothing is sent

# Accuracy in %, tables 1, 2 and 5 of the paper.
PAPER = {
    "msrvtt": {"linear": 13.6, "fine_tuning": 36.7, "hyper": 11.1, "cdc_mmpg": 37.1},
    "msvd": {"linear": 17.3, "fine_tuning": 34.3, "hyper": 6.34, "cdc_mmpg": 35.4},
    "tgif": {"linear": 27.3, "fine_tuning": 54.7, "hyper": 19.6, "cdc_mmpg": 55.2},
    "msrvtt_choice": {"linear": 3.58, "fine_tuning": 75.6, "hyper": 46.0, "cdc_mmpg": 77.0},
}
# Recalls at 1 / 5 / 10 in %, table 3.
PAPER_RECALLS = {
    "linear": ("2.0 / 7.7 / 14.1", "3.1 / 10.1 / 16.9"),
    "fine_tuning": ("4.8 / 17.6 / 27.9", "6.2 / 20.7 / 31.8"),
    "hyper": ("2.6 / 8.6 / 14.7", "2.7 / 11.4 / 17.6"),
    "cdc_mmpg": ("6.6 / 21.3 / 33.8", "5.6 / 21.2 / 33.3"),
}
MEDIANS = {"VR": "VR median", "TR": "TR median"}  # ranks

COSTS = ("D-Param", "C-Param", "bytes up", "bytes down", "best/epochs", "train s", "seeds")


def finished_runs(folder: Path, method: str = "*") -> list[Results]:
    """The results of all seeds of a method, or of all methods."""
    return [results for _, results in _finished(folder, method)]


def _finished(folder: Path, method: str) -> Iterator[tuple[Path, Results]]:
    """With the folders of the runs."""
    for path in sorted(folder.glob(f"{method}/seed*/{RESULTS}")):
        if results := read_results(path.parent):
            yield path.parent, results


def answering_runs(folder: Path) -> dict[str, list[Results]]:
    """The results of all seeds of the methods that answer, by method.

    Raises:
        ConfigError: there are none, or one has no accuracies by condition.
    """
    found: dict[str, list[Results]] = {}
    for method in NAMES:
        for run, results in _finished(folder, method):
            if not results.get("accuracy") or "monitor" not in results:
                raise ConfigError(
                    f'{run / RESULTS} has no "accuracy" by condition: the run is of an earlier version; '
                    f"delete {run} and train anew"
                )
            found.setdefault(method, []).append(results)
    kinds = {(run["protocol"], str(run["splits"])): run["method"] for runs in found.values() for run in runs}
    if len(kinds) > 1:
        raise ConfigError(
            f"{folder} holds runs on different splits, which no table can set side by side: "
            + "; ".join(f"{method} on protocol {protocol}" for (protocol, _), method in kinds.items())
            + ": give the runs of each protocol an OUT= of their own"
        )
    if not found:
        raise ConfigError(f"{folder}: no finished run of {', '.join(NAMES)}; train one first (make train)")
    return found


class Layout(NamedTuple):
    """Which accuracies, or recalls, the table shows."""

    groups: list[str]  # a column with interval each
    types: list[str]  # a column each, of the first group; in retrieval recalls, with intervals
    overall: bool  # whether there is one figure over all types

    @classmethod
    def of(cls, found: dict[str, list[Results]]) -> "Layout":
        """Of a dataset with devices: those that nothing was trained on come first."""
        main = [_under(run, None) for runs in found.values() for run in runs]
        groups = [group for group in ("unseen", "seen") if any(group in each for each in main)] or [ALL_GROUPS]
        types = dict.fromkeys(kind for each in main for kind in each.get(groups[0], {}) if kind != ALL_TYPES)
        return cls(groups, list(types), any(ALL_TYPES in each.get(groups[0], {}) for each in main))


def columns(folder: Path) -> list[str]:
    """The header of the table."""
    groups, types, overall = Layout.of(answering_runs(folder))
    if not overall:
        return ["method", *types, "paper VR", "paper TR", *MEDIANS.values(), "val %", *COSTS]
    paper = ["paper %"] if groups == [ALL_GROUPS] else []
    return ["method", *(f"{group} %" for group in groups), *paper, *types, "val %", *COSTS]


def rows(folder: Path) -> list[list[str]]:
    """A row for every method and condition with finished runs below `folder` (`checkpoints/<dataset>`).

    Raises:
        ConfigError: see `answering_runs`.
    """
    found = answering_runs(folder)
    layout = Layout.of(found)
    first = next(runs[0] for runs in found.values())
    floors = first.get("floors", {})
    table = [
        [label, *_accuracy_cells([floors[name]], layout, None), *_rank_cells(None, [], layout), "", *[""] * len(COSTS)]
        for name, label in FLOORS.items()
        if name in floors
    ]
    for row in ROWS:
        runs = [run for run in found.get(row.method, []) if _under(run, row.condition)]
        if runs:
            whole = row.condition is None and not any(_left_out(run, "test") for run in runs)
            published = PAPER.get(first["dataset"], {}).get(row.method) if whole else None
            accuracies = _accuracy_cells([_under(run, row.condition) for run in runs], layout, published)
            table.append([row.label, *accuracies, *_rank_cells(row, runs, layout), *_cost_cells(row, runs)])
    return table


def _left_out(run: Results, split: str) -> int:
    """Questions whose clips were not there: of a partial copy, beside which no published figure may stand."""
    return run["data"].get(split, {}).get("left_out", 0)


def _asked(run: Results, split: str) -> str:
    """Questions of a split, of how many where some were left out."""
    number, left_out = run["questions"][split], _left_out(run, split)
    return f"{number:,} of {number + left_out:,}" if left_out else str(number)


def _under(run: Results, condition: str | None) -> Accuracies:
    """A run's accuracies under a condition, none where it was not tested so."""
    accuracy = run["accuracy"]
    return accuracy[next(iter(accuracy))] if condition is None else accuracy.get(condition, {})


def _accuracy_cells(seeds: list[Accuracies], layout: Layout, published: float | None) -> list[str]:
    """By group, the paper's where there are no devices, then by type."""

    def cells(group: str, kind: str) -> list[dict[str, float]]:
        return [seed[group][kind] for seed in seeds if kind in seed.get(group, {})]

    if not layout.overall:  # intervals would make it twice as wide
        return [_spread([cell["value"] for cell in cells(layout.groups[0], kind)]) for kind in layout.types]
    paper = [f"{published:g}" if published else ""] if layout.groups == [ALL_GROUPS] else []
    by_type = ([cell["value"] for cell in cells(layout.groups[0], kind)] for kind in layout.types)
    return [
        *(_with_interval(cells(group, ALL_TYPES)) for group in layout.groups),
        *paper,
        *(f"{100 * mean(values):.1f}" if values else "" for values in by_type),
    ]


def _rank_cells(row: Row | None, runs: list[Results], layout: Layout) -> list[str]:
    """In retrieval the paper's recalls, and median ranks; of a floor, without a row, nothing."""
    if layout.overall:
        return []
    if row is None:
        return [""] * (2 + len(MEDIANS))
    own = row.condition is None and runs[0]["protocol"] == "full" and not any(_left_out(run, "test") for run in runs)
    published = PAPER_RECALLS.get(row.method, ("", "")) if own else ("", "")
    found = [run["median_rank"][row.condition or next(iter(run["median_rank"]))] for run in runs]
    return [*published, *(f"{mean(each[way] for each in found):g}" for way in MEDIANS)]


def _cost_cells(row: Row, runs: list[Results]) -> list[str]:
    """What a row took, and its validation accuracy; a condition gives what is not the method's own."""
    parameters, sent = runs[0]["parameters"], runs[0]["bytes"]
    own, control = row.condition is None, row.label.startswith("·")
    size = ["", ""] if control else [f"{parameters[place]:,}" for place in ("device", "cloud")]
    traffic = ["", ""] if control else [f"{sent[way]:,}" for way in ("up", "down")]
    return [
        _spread([run["metrics"][run["monitor"]] for run in runs]) if own else "",
        *size,
        *(["0", "0"] if row.condition == STATIC else traffic),
        f"{_range([run['best_epoch'] + 1 for run in runs])}/{_range([run['epochs'] for run in runs])}",
        f"{mean(run['seconds']['train'] for run in runs):.1f}" if own else "",
        str(len(runs)),
    ]


def _with_interval(cells: list[dict[str, float]]) -> str:
    """Of one seed, the interval; of several, their spread."""
    if len(cells) != 1:
        return _spread([cell["value"] for cell in cells])
    value, low, high = (100 * cells[0][name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _spread(values: list[float]) -> str:
    """In %."""
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _range(values: list[int]) -> str:
    return "–".join(str(value) for value in dict.fromkeys((min(values), max(values))))


def caption(folder: Path) -> str:
    """What the figures were obtained on, how to read them, and by which commits.

    Raises:
        ConfigError: see `answering_runs`.
    """
    found = answering_runs(folder)
    runs = [run for seeds in found.values() for run in seeds]
    groups, types, overall = Layout.of(found)
    asked = "questions" if overall else "captions"

    def each(values: list[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values))

    cells = [cell for row in rows(folder) for cell in row]
    ceilings = each([f"{100 * run['data']['test']['ceiling']:.1f} %" for run in runs])
    beyond = "" if ceilings == "100.0 %" else f"; no method can exceed {ceilings} (answers outside the vocabulary)"
    resampled = "clips" if groups == [ALL_GROUPS] else "devices and then their clips"
    splits = dict.fromkeys(f"{split}: {source}" for run in runs for split, source in run["splits"].items())
    machines = [run["machine"] for run in runs if "machine" in run]
    commits = [run["commit"][:8] + run["commit"][40:] for run in runs]
    sentences = [
        f"{folder.absolute().name}: {each([_asked(run, 'test') for run in runs])} test {asked}, "
        f"{each([_asked(run, 'train') for run in runs])} for training{beyond}.",
        "A partial copy: clips are missing, so nothing here compares with published figures."
        if any(_left_out(run, "test") for run in runs)
        else "",
        f"In brackets: 95 % interval, {resampled} resampled." if any("[" in cell for cell in cells) else "",
        "±: standard deviation over seeds." if any("±" in cell for cell in cells) else "",
        f"By question type ({', '.join(types)}): % on unseen devices." if types and groups != [ALL_GROUPS] else "",
        ""
        if overall
        else "VR@K, in %: a clip asks for its captions, of which the best placed counts; TR@K: a caption "
        "asks for its clip. Ties count against us.",
        f"Splits: {'; '.join(splits)}." if splits else "",
        f"Encoder from: {each([_inside(folder, run) or run['encoder'] or 'random weights' for run in runs])}.",
        _pretraining(folder, runs),
        f"Best epoch by {each([run['monitor'].replace('val/', 'validation ') for run in runs])}, tested once.",
        f"Machine: {each(machines)}." if machines else "",
        f"Commit {each(commits)}.",
    ]
    return " ".join(filter(None, sentences))


def _inside(folder: Path, run: Results) -> Path | None:
    """Where in `folder` a run's encoder came from."""
    if not run["encoder"]:
        return None
    path = Path(run["encoder"]).resolve()
    return path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else None


def _pretraining(folder: Path, runs: list[Results]) -> str:
    """On what the encoder was pretrained, where that is a run below `folder`, too."""
    places = {place.parent for run in runs if (place := _inside(folder, run)) and place.parts[0] == PRETRAINING}
    found = [results for place in sorted(places) if (results := read_results(folder / place)) and "labels" in results]
    if not found:
        return ""
    labels = found[0]["labels"]
    return (
        f"Encoder pretrained in this run on {labels['captions']:,} captions and {labels['questions']:,} questions of "
        f"{labels['clips']:,} other clips ({_range([round(run['seconds']['train']) for run in found])} s)."
    )


def markdown(folder: Path) -> str:
    """The table with its caption."""
    header = columns(folder)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows(folder)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption(folder)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it as `table.md` beside the runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>")
    folder = parser.parse_args(arguments).folder
    try:
        table = Table(
            collapse_padding=True,
            pad_edge=False,
            box=SIMPLE_HEAD,
            caption=Text(caption(folder)),
            caption_justify="left",
        )
        for name in columns(folder):
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for row in rows(folder):
            table.add_row(*(Text(cell) for cell in row))  # brackets are no markup
        Console(width=1000).print(table)  # as wide as its figures, below 200 columns; a narrower terminal wraps it
        with atomic_write(folder / "table.md") as file:
            file.write(markdown(folder).encode())
    except CDCError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written: {folder / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
