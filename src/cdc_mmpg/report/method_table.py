"""Table of methods: accuracies, differences to fine-tuning and costs of all methods."""

from cdc_mmpg.catalogue import Row, find_knowledge
from cdc_mmpg.evaluation.metrics import RECALLS
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Table, cite, join_texts
from cdc_mmpg.evidence.pairing import Gain, Side
from cdc_mmpg.evidence.runs import ALL_GROUPS, ALL_TYPES, Run
from cdc_mmpg.evidence.selection import (
    find_method_runs,
    find_question_types,
    is_on_published_splits,
    note_predictions,
)
from cdc_mmpg.report.cells import (
    GAIN_HEADER,
    MEDIAN_HEADERS,
    NO_BYTES,
    PaperQuotes,
    cite_recall,
    cite_result,
    compare_with_fine_tuning,
    count_seeds,
)

FLOOR_LABELS = {
    "majority": "Majority answer",
    "majority_per_type": "Majority answer per type",
    "chance": "Chance",
}
NO_ANCHORS_CASE = "n0"  # condition in which nothing is sent
KNOWLEDGE_HEADER = "knows"
COST_HEADERS = ["D-Param", "C-Param", "up, B", "down, B", "epoch", "train s", "seeds"]


def build_method_table(evidence: Evidence) -> Table:
    """Build the table with a row for every method and condition with finished runs, at least one."""
    quotes = PaperQuotes(evidence)
    types = find_question_types(evidence)
    listed = [row for row in evidence.rows if evidence.find_runs(row.method, row.condition)]
    knows = [KNOWLEDGE_HEADER] if any(map(find_knowledge, listed)) else []
    header = ["method", *_build_accuracy_header(evidence, types), *knows, "val %", *COST_HEADERS]
    runs = find_method_runs(evidence)
    rows: list[tuple[str, list[CitedText]]] = [
        (label, [*_cite_floors(evidence, runs[0], name, types), *[NO_TEXT] * (len(knows) + 1 + len(COST_HEADERS))])
        for name, label in FLOOR_LABELS.items()
        if runs[0].find("floors", name)
    ]
    gains = compare_with_fine_tuning(evidence, [Side(row.method, row.condition) for row in listed])
    for row, gain in zip(listed, gains, strict=True):
        seeds = evidence.find_runs(row.method, row.condition)
        accuracies = _build_accuracy_cells(evidence, row, seeds, gain, types, quotes)
        letters = [cite(find_knowledge(row))] if knows else []
        rows.append((row.label, [*accuracies, *letters, *_build_cost_cells(evidence, row, seeds)]))
    notes = [*quotes.write_notes(), *filter(None, [note_predictions(runs)])]
    return Table("methods", "Methods side by side", header, rows, notes)


def _build_accuracy_header(evidence: Evidence, types: list[str]) -> list[str]:
    """Return the headers of `_build_accuracy_cells`."""
    if evidence.is_retrieval:
        return [*types, GAIN_HEADER, "paper VR", "paper TR", *MEDIAN_HEADERS.values()]
    printed = ["paper %"] if evidence.groups == [ALL_GROUPS] else []
    return [*(f"{group} %" for group in evidence.groups), *printed, GAIN_HEADER, *types]


def _cite_floors(evidence: Evidence, run: Run, name: str, types: list[str]) -> list[CitedText]:
    """Return the accuracies of answers that ignore the clip; they are the same in every run."""

    def cite_floor(group: str, kind: str, interval: bool) -> CitedText:
        if not run.find("floors", name, group, kind):
            return NO_TEXT
        ends = ("value", "low", "high") if interval else ("value",)
        facts = [evidence.aggregate([run], ("floors", name, group, kind, end), times=100) for end in ends]
        return cite("{} [{}, {}]" if interval else "{}", *facts)

    by_type = [cite_floor(evidence.group, kind, False) for kind in types]
    if evidence.is_retrieval:
        return [*by_type, NO_TEXT, *[NO_TEXT] * (2 + len(MEDIAN_HEADERS))]
    printed = [NO_TEXT] if evidence.groups == [ALL_GROUPS] else []
    return [*(cite_floor(group, ALL_TYPES, True) for group in evidence.groups), *printed, NO_TEXT, *by_type]


def _build_accuracy_cells(
    evidence: Evidence, row: Row, runs: list[Run], gain: Gain | None, types: list[str], quotes: PaperQuotes
) -> list[CitedText]:
    """Return accuracies by group, the paper's (without devices), the difference to fine-tuning, and by type."""
    side = Side(row.method, row.condition)
    published = row.condition is None and is_on_published_splits(runs)
    difference = gain.format() if gain else NO_TEXT
    if evidence.is_retrieval:
        recalls = [cite_recall(evidence, side, kind) for kind in types]
        printed = [NO_TEXT, NO_TEXT]
        if published and runs[0].find("protocol") == "full":
            printed = [
                join_texts("{} / {} / {}", *recalled) if all(recalled) else NO_TEXT
                for way in MEDIAN_HEADERS
                for recalled in ([quotes.cite(row.method, f"{way}@{k}") for k in RECALLS],)
            ]
        case = runs[0].find_case(row.condition) or ""
        ranked = [run for run in runs if run.find("median_rank", case)]
        medians = [
            cite("{}", evidence.aggregate(ranked, ("median_rank", case, way), form="{:g}")) if ranked else NO_TEXT
            for way in MEDIAN_HEADERS
        ]
        return [*recalls, difference, *printed, *medians]
    quoted = quotes.cite(row.method, "accuracy") if published else NO_TEXT
    return [
        *(evidence.cite_accuracy(side, group) for group in evidence.groups),
        *([quoted] if evidence.groups == [ALL_GROUPS] else []),
        difference,
        *(evidence.cite_accuracy(side, kind=kind, interval=False) for kind in types),
    ]


def _build_cost_cells(evidence: Evidence, row: Row, runs: list[Run]) -> list[CitedText]:
    """Return a row's validation accuracy and costs; a condition has only those that differ from its method's."""
    is_method, is_control = row.condition is None, row.label.startswith("·")
    size = traffic = [NO_TEXT, NO_TEXT]
    if not is_control:
        size = [cite_result(evidence, runs[0], "parameters", key) for key in ("device", "cloud")]
        traffic = [cite_result(evidence, runs[0], "bytes", key) for key in ("up", "down")]
    if row.condition == NO_ANCHORS_CASE:
        traffic = [cite("{}", NO_BYTES)] * 2
    validated = [run for run in runs if run.find("metrics", run.find("monitor") or "") is not None]
    validation = NO_TEXT
    if is_method and validated:
        keys = ("metrics", validated[0].results["monitor"])
        hows = ("mean", "stdev") if len(validated) > 1 else ("mean",)
        validation = cite(
            " ± ".join("{}" for _ in hows), *(evidence.aggregate(validated, keys, how, times=100) for how in hows)
        )
    timed = [run for run in runs if run.find("seconds", "train") is not None] if is_method else []
    return [
        validation,
        *size,
        *traffic,
        _build_epoch_cell(evidence, runs),
        cite("{}", evidence.aggregate(timed, ("seconds", "train"))) if timed else NO_TEXT,
        count_seeds(runs),
    ]


def _build_epoch_cell(evidence: Evidence, runs: list[Run]) -> CitedText:
    """Return the best epoch, counted from 1, and the number of epochs."""
    runs = [run for run in runs if run.find("best_epoch") is not None and run.find("epochs") is not None]
    if not runs:
        return NO_TEXT
    parts = []
    for key, plus in (("best_epoch", 1), ("epochs", 0)):
        least, most = (evidence.aggregate(runs, (key,), how, "{:.0f}", plus=plus) for how in ("least", "most"))
        parts.append(cite("{}", least) if least.value == most.value else cite("{}–{}", least, most))
    return join_texts("{}/{}", *parts)
