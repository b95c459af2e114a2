"""Figures as PNG: the method, the synthetic dataset, and accuracy on unseen devices against the number of anchors.

`cdc-mmpg figures checkpoints/<dataset> [--data <dataset root>]`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.program import log_to_terminal, run_to_exit_code
from cdc_mmpg.report.anchor_chart import draw_anchors
from cdc_mmpg.report.dataset_figure import draw_dataset
from cdc_mmpg.report.method_figure import draw_method


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures to a folder beside the runs and print their paths; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>")
    parser.add_argument("--data", type=Path, help="the synthetic dataset's folder, for data.png")
    options = parser.parse_args(arguments)

    def write(name: str, content: bytes) -> None:
        with atomic_write(options.folder / "figures" / name) as file:
            file.write(content)
        print(f"written: {options.folder / 'figures' / name}")

    def draw_all() -> None:
        if not options.folder.is_dir():
            raise ConfigError(f"{options.folder}: no such folder; train first (make train)")
        write("method.png", draw_method())
        if options.data is None:
            print("skipped: data.png, which needs --data <dataset root>")
        elif not (options.data / "devices.json").is_file():
            print(f"skipped: data.png, because {options.data} has no devices.json")
        else:
            write("data.png", draw_dataset(options.data))
        write("anchors.png", draw_anchors(options.folder))

    log_to_terminal()
    return run_to_exit_code(draw_all)
