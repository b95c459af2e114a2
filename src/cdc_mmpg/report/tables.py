"""Tables from the results of runs: the methods of a dataset, and the paper's tables with its figures and ours.

`cdc-mmpg table checkpoints/<dataset>` prints the methods and writes `table.md`. With `--paper` it also prints the
tables of the paper and the commands for missing runs, and writes `tables.md`; given `checkpoints`, for all datasets in
it.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.facts import Table
from cdc_mmpg.evidence.findings import list_findings
from cdc_mmpg.evidence.selection import find_method_runs, load_comparable
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import escape_controls, log_to_terminal, run_to_exit_code
from cdc_mmpg.report.caption import write_caption
from cdc_mmpg.report.method_table import build_method_table
from cdc_mmpg.report.missing import find_missing
from cdc_mmpg.report.paper_tables import build_delay_table, build_frames_table, build_paper_table
from cdc_mmpg.report.rendering import print_table, render_bullets, render_markdown
from cdc_mmpg.report.study_tables import (
    build_payload_table,
    build_privacy_table,
    build_reasoner_table,
    build_spread_table,
    build_variants_table,
)
from cdc_mmpg.results import find_results


def build_all_tables(evidence: Evidence) -> list[Table]:
    """Build all tables that have data."""
    builders: list[Callable[[Evidence], Table | None]] = [build_paper_table, build_frames_table, build_delay_table]
    builders += [build_method_table] if find_method_runs(evidence) else []
    builders += [build_spread_table, build_variants_table, build_payload_table, build_reasoner_table]
    builders += [build_privacy_table]
    return [table for build in builders if (table := build(evidence))]


def render_method_page(evidence: Evidence) -> str:
    """Render the table of methods as Markdown, with its caption, footnotes and findings."""
    table = build_method_table(evidence)
    notes = " ".join(note.text for note in table.notes)
    findings = render_bullets([finding.text for finding in list_findings(evidence)])
    parts = [render_markdown(table), write_caption(evidence), notes, findings]
    return "\n\n".join(filter(None, parts)) + "\n"


def render_all_tables(evidence: Evidence) -> str:
    """Render all tables as Markdown, with the findings and the commands for missing runs."""
    parts = [f"# {evidence.dataset}"]
    for table in build_all_tables(evidence):
        parts += [f"## {table.title}", render_markdown(table), " ".join(note.text for note in table.notes)]
        parts += [write_caption(evidence)] if table.name == "methods" else []
    if sentences := [finding.text for finding in list_findings(evidence)]:
        parts += ["## Findings", render_bullets(sentences)]
    if missing := find_missing(evidence):
        parts.append("## What is missing")
        for table_name, commands in missing:
            parts += [f"{table_name[0].upper()}{table_name[1:]}:", "```sh\n" + "\n".join(commands) + "\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _print_escaped(*lines: str) -> None:
    for line in lines:
        print(escape_controls(line))


def _write_escaped(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(escape_controls(text).encode())


def show_method_table(folder: Path) -> None:
    """Print the table of methods and write it to table.md."""
    evidence = load_comparable(folder)
    table = build_method_table(evidence)
    try:  # print even if writing fails, and write before printing: a reader may close the pipe
        _write_escaped(folder / "table.md", render_method_page(evidence))
    finally:
        print_table(table, " ".join([write_caption(evidence), *(note.text for note in table.notes)]))
        _print_escaped(*(f"- {finding.text}" for finding in list_findings(evidence)))
    _print_escaped(f"written: {folder / 'table.md'}")


def show_all_tables(folder: Path) -> None:
    """Print all tables and write them to tables.md, for one dataset or for all datasets in a folder.

    For a known dataset without runs, print the commands for the missing runs.
    """
    datasets = sorted({path.parents[2] for path in find_results(folder, "*/*/seed*")})
    if find_results(folder, "*/seed*") or not datasets:
        datasets = [folder]
    for dataset in datasets:
        known = Path("experiments", "datasets", f"{dataset.absolute().name}.yaml").is_file()
        evidence = load_comparable(dataset, may_be_empty=known)
        try:  # see `show_method_table`
            _write_escaped(dataset / "tables.md", render_all_tables(evidence))
        finally:
            for table in build_all_tables(evidence):
                notes = [note.text for note in table.notes]
                above = [write_caption(evidence)] if table.name == "methods" else []
                print_table(table, " ".join(above + notes), table.title)
                print()
            _print_escaped(*(f"- {finding.text}" for finding in list_findings(evidence)))
            for table_name, commands in find_missing(evidence):
                _print_escaped(f"\nmissing runs, {table_name}:", *(f"  {line}" for line in commands))
        _print_escaped(f"written: {dataset / 'tables.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write them to the folder of the runs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>; with --paper also checkpoints")
    parser.add_argument("--paper", action="store_true", help="all tables, and the commands for missing runs")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run_to_exit_code(partial(show_all_tables if options.paper else show_method_table, options.folder))
