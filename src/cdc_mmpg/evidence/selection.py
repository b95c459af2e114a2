"""Selection of runs that a table can compare with each other, or with the paper's figures."""

from pathlib import Path

from cdc_mmpg.catalogue import BASELINE, SESSION_METHODS
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, cite, escape_braces, join_texts
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import ALL_GROUPS, ALL_TYPES, Run


def load_comparable(folder: Path, may_be_empty: bool = False, quoted_from: Path | None = None) -> Evidence:
    """Return the evidence of a dataset whose runs can be compared.

    Raises:
        ConfigError: runs are on different splits, or no method has a finished run (unless `may_be_empty`).
    """
    evidence = Evidence(folder, quoted_from)
    runs = find_method_runs(evidence)
    kinds = {
        (run.find("protocol"), describe_domains(run), str(run.find("splits"))): run.name
        for run in runs
        if run.find("protocol")
    }
    if len(kinds) > 1:
        raise ConfigError(
            f"{folder} holds runs on different splits, which one table cannot compare: "
            + "; ".join(f"{method} on protocol {protocol}{domains}" for (protocol, domains, _), method in kinds.items())
            + ": write the runs of each protocol to a separate folder with OUT="
        )
    if not runs and not may_be_empty:
        raise ConfigError(f"{folder}: no finished run that answers questions; train one first (make train)")
    return evidence


def find_method_runs(evidence: Evidence) -> list[Run]:
    """Return the runs of all methods that have rows, in the order of the methods."""
    return [run for method in evidence.names for run in evidence.find_runs(method)]


def find_question_types(evidence: Evidence) -> list[str]:
    """Return the question types (in retrieval: the recalls) in the first condition of any run."""
    runs = find_method_runs(evidence)
    groups = [run.find("accuracy", run.find_case(None) or "", evidence.group) or {} for run in runs]
    return list(dict.fromkeys(kind for group in groups for kind in group if kind != ALL_TYPES))


def describe_domains(run: Run) -> str:
    """Return the kind of domains used as devices and those held out of training; empty for real devices."""
    domains = run.find("domains")
    return f", {domains['kind']} without {', '.join(domains['held_out'])}" if domains else ""


def count_left_out(run: Run, split: str) -> int:
    """Return the number of questions whose clips are missing: a partial copy has no comparable published figure."""
    return run.find("data", split, "left_out") or 0


def is_partial(runs: list[Run]) -> bool:
    """Return whether clips of the test split were missing."""
    return any(count_left_out(run, ALL_GROUPS) for run in runs)


def find_unpublished_counts(runs: list[Run], kind: str | None = None) -> list[CitedText]:
    """Return the counts (of `kind`; None: all) in which annotation files of these runs differ from published ones."""
    differences: dict[str, CitedText] = {}
    for run in runs:
        for place, row in enumerate(run.find("published") or []):
            if not row.get("same", True) and kind in (None, row.get("what")):
                facts = [
                    Fact(row[key], f"{row[key]:,}", "value", (run.locate("published", str(place), key),))
                    for key in ("here", "published")
                ]
                text = cite(f"{escape_braces(row['split'])}: {{}} of {{}} {escape_braces(row['what'])}", *facts)
                differences.setdefault(text.text, text)
    return list(differences.values())


def note_unpublished_counts(runs: list[Run]) -> CitedText:
    """Return a note on annotation files that are not the published ones; empty if they are."""
    counts = find_unpublished_counts(runs)
    template = f"Not the published files ({'; '.join('{}' for _ in counts)}), so published figures are left out."
    return join_texts(template, *counts) if counts else NO_TEXT


def note_predictions(runs: list[Run]) -> CitedText:
    """Return a note on rows whose answers are from predictions files, with unanswered questions; empty without any."""
    counts = []
    for run in runs:
        if run.is_external:
            name = escape_braces(run.find("predictions", "file"))
            keys = [("predictions", "unanswered"), ("questions", ALL_GROUPS)]
            facts = [Fact(run.find(*key), f"{run.find(*key):,}", "value", (run.locate(*key),)) for key in keys]
            counts.append(cite(f"{name}: {{}} of {{}} questions unanswered", *facts))
    if not counts:
        return NO_TEXT
    listed = "; ".join("{}" for _ in counts)
    return join_texts(
        f"Predictions of other models ({listed}): right if equal to the annotated answer but for case, repeated blanks "
        "and a final full stop; unanswered questions count as wrong, and answers outside the vocabulary can be right.",
        *counts,
    )


def is_on_published_splits(runs: list[Run]) -> bool:
    """Return whether these runs used the published splits, complete and unchanged."""
    return not is_partial(runs) and not any(map(describe_domains, runs)) and not find_unpublished_counts(runs)


def is_comparable_with_paper(evidence: Evidence, runs: list[Run]) -> bool:
    """Return whether these runs answered the paper's questions: the full test split, on the paper's protocol."""
    is_full = not evidence.is_retrieval or all(run.find("protocol") == "full" for run in runs)
    return is_full and evidence.groups == [ALL_GROUPS] and is_on_published_splits(runs)


def find_adaptive_side(evidence: Evidence) -> Side | None:
    """Return the side that represents adaptation: a session if there is one, else the paper's method or the closest."""
    names = (*SESSION_METHODS, "cdc_mmpg", "cdc_mmpg_frozen", "hyper_fan_in", "hyper")
    return next((Side(name) for name in names if evidence.find_runs(name)), None)


def find_static_side(evidence: Evidence) -> Side | None:
    """Return the side that represents a method without adaptation: fine-tuning, else F-linear."""
    return next((Side(name) for name in (BASELINE, "linear") if evidence.find_runs(name)), None)


def describe_group(evidence: Evidence) -> str:
    """Return the name of the questions that the figures are about."""
    return "all test questions" if evidence.group == ALL_GROUPS else f"{evidence.group} devices"
