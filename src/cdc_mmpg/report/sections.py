"""Sections of the page without charts: findings, controls, tables, provenance of the runs."""

from cdc_mmpg.catalogue import BASELINE, COMPARED_WORLDS, METHOD_LABELS, SESSION
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import CitedText, Table, cite
from cdc_mmpg.evidence.findings import (
    compare_unless_guessing,
    find_equal_payloads,
    list_claims,
    list_control_findings,
)
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.evidence.runs import ALL_GROUPS, Run
from cdc_mmpg.evidence.selection import describe_group, find_static_side
from cdc_mmpg.report.caption import shorten_commit
from cdc_mmpg.report.cells import cite_or_empty
from cdc_mmpg.report.document import Card, Cards, CodeBlock, Heading, Page, Paragraph
from cdc_mmpg.report.missing import find_missing, format_command
from cdc_mmpg.report.tables import build_all_tables
from cdc_mmpg.report.worlds import build_worlds_table, load_worlds, write_worlds_caption


def add_worlds(page: Page, evidence: Evidence) -> None:
    """Add the README's table, if the page is about one of the compared worlds."""
    if evidence.dataset in COMPARED_WORLDS and (worlds := load_worlds(evidence.folder.absolute().parent, evidence)):
        page.begin("worlds", "What adaptation is worth")
        page.add_table(build_worlds_table(worlds))
        page.add_paragraph(write_worlds_caption(worlds), is_note=True)


def add_findings(page: Page, evidence: Evidence) -> None:
    """Add the key figures and all finding sentences."""
    page.begin("findings", "Findings")
    session, baseline = Side(SESSION), Side(BASELINE)
    gain = compare_unless_guessing(evidence, session, baseline)
    if gain:
        seeds = evidence.compare_by_seed(session, baseline)
        more = {
            **gain.value.more, "low": gain.low.value, "high": gain.high.value,
            "seeds": {str(seed): fact.value for seed, fact in seeds.items()},
        }  # fmt: skip
        page.keep("session_gain_points", gain.value._replace(more=more))
        page.keep("session_gain_points/low", gain.low)
        page.keep("session_gain_points/high", gain.high)
        for seed, fact in seeds.items():
            page.keep(f"session_gain_points/seed{seed}", fact)
    equal = find_equal_payloads(evidence)
    if equal:
        least, best = equal
        more = {
            "label": least.label, "accuracy": least.accuracy.value,
            "best": {"label": best.label, "bytes": best.bytes.value, "accuracy": best.accuracy.value},
        }  # fmt: skip
        page.keep("bytes_at_equal_accuracy", least.bytes._replace(more=more))
        page.keep("bytes_at_equal_accuracy/accuracy", least.accuracy)
        page.keep("bytes_at_equal_accuracy/best/bytes", best.bytes)
        page.keep("bytes_at_equal_accuracy/best/accuracy", best.accuracy)
    cards = [
        (name, cite("{}", shown.value), cite("points, 95 % interval {} to {}", shown.low, shown.high))
        for name, shown in (
            ("Session of 16 clips vs fine-tuning", gain),
            ("Per-sample adaptation vs fine-tuning", compare_unless_guessing(evidence, Side("cdc_mmpg"), baseline)),
        )
        if shown
    ]
    if equal:
        least, best = equal
        cards.append(("Smallest sufficient head of a session", cite("{} B", least.bytes),
                      cite("{} % accuracy, best head {} %", least.accuracy, best.accuracy)))  # fmt: skip
    static = find_static_side(evidence) or session
    if accuracy := evidence.cite_accuracy(static):
        name = f"{METHOD_LABELS[static.name]}, {describe_group(evidence)}"
        cards.append((name, cite("{} %", accuracy.facts[0]), CitedText("of the questions answered correctly")))
    marked = [
        Card(name, page.mark(f"cards/{name}", large), page.mark(f"cards/{name}/more", small))
        for name, large, small in cards
    ]
    page.add(Cards(marked))
    page.add_sentences("findings", list_claims(evidence), "No two runs can be compared yet.")


def add_controls(page: Page, evidence: Evidence) -> None:
    """Add the sentences on whether the adaptive methods use what they adapt to."""
    page.begin("controls", "Controls: is the adaptation used?")
    page.add_paragraph("Accuracy of a method minus that of its control, in points, paired by question; 95 % interval.")
    page.add_sentences("controls", list_control_findings(evidence), "No adaptive method was run.")


def add_tables(page: Page, evidence: Evidence) -> None:
    """Add all tables that have data, those of the paper first."""
    resampled = "clips" if evidence.group == ALL_GROUPS else "devices, then their clips"
    page.begin("tables", "Tables")
    page.add_paragraph(
        f"Accuracies in %. One seed: 95 % bootstrap interval in brackets (resampling {resampled}). Several: mean ± "
        "standard deviation. “vs fine-tuning”: difference in percentage points with its 95 % interval, paired by "
        "question and averaged over the seeds of both. Rows with a dot are controls of the method above.",
        is_note=True,
    )
    for table in build_all_tables(evidence):
        page.add_table(table)


def add_provenance(page: Page, evidence: Evidence) -> None:
    """Add commits, machines, seeds, versions and commands of the runs, and the missing runs."""
    page.begin("made", "How the results were produced")
    runs = [run for seeds in evidence.runs.values() for run in seeds]
    rows = []
    for run in runs:
        facts = [evidence.cite_value(run, key) for key in ("seed", "finished", "machine", "devices", "commit")]
        if commit := facts[-1]:
            facts[-1] = commit._replace(shown=shorten_commit(commit.shown))
        rows.append((f"{run.name}/{run.path.name}", [cite_or_empty(fact) for fact in facts]))
    page.add_table(Table("made", "Runs", ["run", "seed", "finished", "machine", "processors", "commit"], rows))
    main = [run for name in evidence.names for run in evidence.find_runs(name)]  # pretraining uses other clips
    counted = next((run for run in main if run.find("questions", "test") is not None), None)
    if counted:
        facts = [evidence.cite_value(counted, "questions", split) for split in ("train", "val", "test")]
        counted_facts = [fact for fact in facts if fact]
        if len(counted_facts) == len(facts):
            counts = cite("Questions: {} for training, {} for validation, {} for testing.", *counted_facts)
            page.add(Paragraph(page.mark("made/questions", counts)))
    versions: dict[str, list[Run]] = {}
    for run in runs:
        known = run.find("versions") or {}
        versions.setdefault(", ".join(f"{name} {number}" for name, number in known.items()), []).append(run)
    for text, group in versions.items():
        count = "" if len(versions) == 1 else f" ({len(group)} runs)"
        if text:
            page.add_paragraph(f"Versions{count}: {text}.")
    page.add(Heading("Commands"))
    page.add_paragraph("Each command trains a method, and first the runs that it depends on, or scores predictions.")
    page.add(CodeBlock([
        format_command(evidence, name, [run.seed for run in seeds]) for name, seeds in evidence.runs.items()
    ]))  # fmt: skip
    page.add_paragraph(
        "report.json lists every figure on this page, with its sources in the runs' files and how it was computed "
        "from them."
    )
    if missing := find_missing(evidence):
        page.begin("missing", "What is missing")
        for table, commands in missing:
            page.add(Heading(table[0].upper() + table[1:]))
            page.add(CodeBlock(commands))
