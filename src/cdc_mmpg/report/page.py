"""The report: all results of a dataset's runs on one self-contained page, with the sources of every figure.

`cdc-mmpg report checkpoints/<dataset> [--data <dataset root>]` writes `report.html` and `report.json` there. The page
loads nothing from the network. report.json lists every figure of the page by name: its value, its printed form, how it
was computed, and its sources (see `evidence.facts`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdc_mmpg.evidence.selection import load_comparable
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import escape_controls, log_to_terminal, run_to_exit_code
from cdc_mmpg.report.chart_sections import (
    add_anchors,
    add_bytes,
    add_curves,
    add_devices,
    add_frames,
    add_history,
    add_time,
)
from cdc_mmpg.report.document import Page
from cdc_mmpg.report.examples import add_examples
from cdc_mmpg.report.sections import add_controls, add_findings, add_provenance, add_tables, add_worlds
from cdc_mmpg.results import write_json
from cdc_mmpg.training.wandb_record import Subject, start_record


def build_page(folder: Path, data: Path | None = None) -> tuple[str, dict[str, dict[str, Any]]]:
    """Build the page as HTML, and its figures by name.

    Raises:
        ConfigError: see `selection.load_comparable`.
    """
    evidence, page = load_comparable(folder), Page()
    add_worlds(page, evidence)
    for add_section in (add_findings, add_anchors, add_bytes, add_frames, add_history, add_devices):
        add_section(page, evidence)
    add_examples(page, evidence, data)
    for add_section in (add_tables, add_controls, add_curves, add_time, add_provenance):
        add_section(page, evidence)
    finished = sorted(str(run.find("finished") or "") for runs in evidence.runs.values() for run in runs)
    lead = (
        "A model that answers questions about videos runs on a device; the cloud adapts its last layer to what the "
        "device sees, without labels and without backpropagation. This page shows the gain, measured in finished runs"
        + (f" (the last on {finished[-1][:10]})." if finished[-1] else ".")
    )
    return page.render(f"CDC-MMPG on {evidence.dataset}", lead), page.entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and the sources of its figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>")
    parser.add_argument("--data", type=Path, help="the dataset's folder, for the clips of the examples")
    options = parser.parse_args(arguments)
    log_to_terminal()
    return run_to_exit_code(lambda: write_page(options.folder, options.data))


def write_page(folder: Path, root: Path | None) -> None:
    """Write report.html and report.json beside a dataset's runs, with clips from `root`; publish the page to W&B."""
    html, entries = build_page(folder, root)
    with atomic_write(folder / "report.html") as file:
        file.write(escape_controls(html).encode())
    write_json(entries, folder / "report.json")
    record = start_record(folder / "report", Subject("report", folder.absolute().name, "report"), {})
    record.summarise({name: entry["value"] for name, entry in entries.items() if isinstance(entry["value"], float)})
    record.log_page("report", html)
    record.end()
    for name in ("report.html", "report.json"):
        print(f"written: {folder / name}")
