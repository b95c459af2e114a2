"""Look into a checkpoint: which of its weights the encoder takes, drops, lacks or fits to its own size."""

import argparse
from collections.abc import Sequence

from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.program import exit_code, log_to_terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what `AllInOne.load_reference` would do with a file; returns the exit code: 4 where it would refuse it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="All-in-One-Ti, DeiT-Tiny or an encoder.safetensors; see CHECKPOINT=")
    file = parser.parse_args(arguments).file
    log_to_terminal()

    def run() -> None:
        if not file:
            raise CheckpointError("no checkpoint: name one (FILE=)")
        inspect(file)

    return exit_code(run)


def inspect(file: str) -> None:
    """Print every key of a checkpoint under what becomes of it.

    Raises:
        CheckpointError: not a checkpoint, or not this encoder's.
    """
    from cdc_mmpg.models.all_in_one import AllInOne  # noqa: PLC0415  imports torch and timm: seconds

    encoder = AllInOne()
    own = encoder.state_dict()
    taken, report = encoder.compare(file)
    others = {key: value.shape for key, value in taken.items() if value.shape != own[key].shape}
    for name, keys, meaning in (
        ("used", report.used, "the encoder's weights"),
        ("dropped", report.dropped, "heads of the pretraining"),
        ("unexpected", report.unexpected, "neither the encoder's nor a known head's"),
        ("missing", report.missing, "left at random values"),
    ):
        print(f"{name} {len(keys)}: {meaning}")
        for key in keys:
            fitted = f"  {tuple(others[key])}, here {tuple(own[key].shape)}" if key in others else ""
            print(f"  {key}{fitted}")
    encoder.take(taken, report, file)  # refuses what cannot be used
    print(
        f"{sum(value.numel() for value in taken.values()):,} of {sum(v.numel() for v in own.values()):,} values taken"
    )
