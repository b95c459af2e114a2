"""Which runs of a dataset a table can set side by side, and which may stand beside the paper's figures."""

from pathlib import Path

from cdc_mmpg.catalogue import BASELINE, NAMES, SESSIONS
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import NO_TEXT, CitedText, Fact, cite, escape_braces, join_texts
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import ALL_GROUPS, ALL_TYPES, Run


def load_comparable(folder: Path, may_be_empty: bool = False) -> Evidence:
    """Return the evidence of a dataset whose runs can stand side by side.

    Raises:
        ConfigError: they are on different splits, or no method has a finished run (unless `may_be_empty`).
    """
    evidence = Evidence(folder)
    runs = find_method_runs(evidence)
    kinds = {
        (run.find("protocol"), describe_domains(run), str(run.find("splits"))): run.name
        for run in runs
        if run.find("protocol")
    }
    if len(kinds) > 1:
        raise ConfigError(
            f"{folder} holds runs on different splits, which no table can set side by side: "
            + "; ".join(f"{method} on protocol {protocol}{domains}" for (protocol, domains, _), method in kinds.items())
            + ": give the runs of each protocol an OUT= of their own"
        )
    if not runs and not may_be_empty:
        raise ConfigError(f"{folder}: no finished run of {', '.join(NAMES)}; train one first (make train)")
    return evidence


def find_method_runs(evidence: Evidence) -> list[Run]:
    """Return the runs of the methods that have rows, method by method."""
    return [run for method in evidence.names for run in evidence.find_runs(method)]


def find_question_types(evidence: Evidence) -> list[str]:
    """Return the types of questions, in retrieval the recalls, that any run's first condition has."""
    runs = find_method_runs(evidence)
    groups = [run.find("accuracy", run.find_case(None) or "", evidence.group) or {} for run in runs]
    return list(dict.fromkeys(kind for group in groups for kind in group if kind != ALL_TYPES))


def describe_domains(run: Run) -> str:
    """Return what stood for devices and which of them left training; empty for real devices."""
    domains = run.find("domains")
    return f", {domains['kind']} without {', '.join(domains['held_out'])}" if domains else ""


def count_left_out(run: Run, split: str) -> int:
    """Return the number of questions whose clips are missing; a partial copy compares with no published figure."""
    return run.find("data", split, "left_out") or 0


def is_partial(runs: list[Run]) -> bool:
    """Return whether clips of the test were missing."""
    return any(count_left_out(run, ALL_GROUPS) for run in runs)


def find_unlike_published(runs: list[Run], what: str | None = None) -> list[CitedText]:
    """Return where the annotation files of these runs hold other numbers (of `what`) than the published ones."""
    differences: dict[str, CitedText] = {}
    for run in runs:
        for place, row in enumerate(run.find("published") or []):
            if not row.get("same", True) and what in (None, row.get("what")):
                facts = [
                    Fact(row[key], f"{row[key]:,}", "value", (run.locate("published", str(place), key),))
                    for key in ("here", "published")
                ]
                text = cite(f"{escape_braces(row['split'])}: {{}} of {{}} {escape_braces(row['what'])}", *facts)
                differences.setdefault(text.text, text)
    return list(differences.values())


def note_unlike_published(runs: list[Run]) -> CitedText:
    """Return a sentence on annotation files that are not the published ones; empty where they are."""
    unlike = find_unlike_published(runs)
    template = f"Not the published files, so no published figure stands beside ({'; '.join('{}' for _ in unlike)})."
    return join_texts(template, *unlike) if unlike else NO_TEXT


def is_on_published(runs: list[Run]) -> bool:
    """Return whether these runs saw the published splits, whole and as they are."""
    return not is_partial(runs) and not any(map(describe_domains, runs)) and not find_unlike_published(runs)


def is_comparable_with_paper(evidence: Evidence, runs: list[Run]) -> bool:
    """Return whether these runs answered what the paper's did: all of the test split, on the paper's protocol."""
    full = not evidence.is_retrieval or all(run.find("protocol") == "full" for run in runs)
    return full and evidence.groups == [ALL_GROUPS] and is_on_published(runs)


def find_adaptive_side(evidence: Evidence) -> Side | None:
    """Return what stands for adaptation: the session where there is one, else the paper's method or the nearest."""
    names = (*SESSIONS, "cdc_mmpg", "cdc_mmpg_frozen", "hyper_fan_in", "hyper")
    return next((Side(name) for name in names if evidence.find_runs(name)), None)


def find_static_side(evidence: Evidence) -> Side | None:
    """Return what stands for a method that does not adapt."""
    return next((Side(name) for name in (BASELINE, "linear") if evidence.find_runs(name)), None)


def describe_group(evidence: Evidence) -> str:
    """Return which questions the figures are about."""
    return "all of the test" if evidence.group == ALL_GROUPS else f"{evidence.group} devices"
