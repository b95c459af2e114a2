"""CDC-MMPG: adapting a device's video-language model by generating its last layer in the cloud."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdc_mmpg.training.finished import FinishedRun

__all__ = ["load"]


def load(run: str | PathLike[str], vocab: str | PathLike[str] | None = None) -> "FinishedRun":
    """Load a finished run: its configuration, results, model, answers and layers.

    Torch is imported when the model is first used; its weights are read then, too.

    Args:
        run: folder of the run, such as "checkpoints/synthetic/cdc_mmpg_session/seed0".
        vocab: path of `vocab.txt`, if it has moved since training.

    Raises:
        CheckpointError: the run is not finished, or damaged; names the finished runs of the dataset.
    """
    from cdc_mmpg.training.finished import FinishedRun  # noqa: PLC0415  not needed on a device

    return FinishedRun(run, vocab)
