"""Inspection of a checkpoint: which of its weights the encoder loads, drops, lacks or resizes."""

import argparse
from collections.abc import Sequence

from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.program import log_to_terminal, run_to_exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what `AllInOne.load_reference` would do with a file; return the exit code, 4 if it would be refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="All-in-One-Ti, DeiT-Tiny or an encoder.safetensors; see CHECKPOINT=")
    file = parser.parse_args(arguments).file
    log_to_terminal()

    def run() -> None:
        if not file:
            raise CheckpointError("no checkpoint: name one (FILE=)")
        inspect(file)

    return run_to_exit_code(run)


def inspect(file: str) -> None:
    """Print every key of a checkpoint, grouped by how it is handled.

    Raises:
        CheckpointError: the file is not a checkpoint, or not one of this encoder.
    """
    from cdc_mmpg.models.all_in_one import AllInOne  # noqa: PLC0415  imports torch and timm: seconds

    encoder = AllInOne()
    weights = encoder.state_dict()
    taken, report = encoder.map_keys(file)
    resized = {key: value.shape for key, value in taken.items() if value.shape != weights[key].shape}
    for name, keys, meaning in (
        ("used", report.used, "the encoder's weights"),
        ("dropped", report.dropped, "heads of the pretraining"),
        ("unexpected", report.unexpected, "neither the encoder's nor a known head's"),
        ("missing", report.missing, "left at random values"),
    ):
        print(f"{name} {len(keys)}: {meaning}")
        for key in keys:
            shapes = f"  {tuple(resized[key])}, here {tuple(weights[key].shape)}" if key in resized else ""
            print(f"  {key}{shapes}")
    encoder.load_mapped(taken, report, file)  # raises CheckpointError if the checkpoint cannot be used
    print(f"{sum(v.numel() for v in taken.values()):,} of {sum(v.numel() for v in weights.values()):,} values taken")
