"""View of a dataset for encoder pretraining: its captioned clips."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import CaptionBatch, Split
from cdc_mmpg.data.interface import VideoTextData
from cdc_mmpg.data.sampling import EpochDataModule


class CaptionDataModule(EpochDataModule):
    """Captions and questions for training, and held-out ones for validation and test.

    Args:
        data: dataset with captioned clips.
    """

    def __init__(self, data: VideoTextData) -> None:
        super().__init__(data.batch_size, data.seed, data.per_device)
        self.data = data

    def prepare_data(self) -> None:
        """Prepare the dataset."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Build the splits."""
        self.data.setup(stage)
        self.captions = self.data.captions()

    def _loader(self, split: Split) -> DataLoader[CaptionBatch]:
        training = split == "train"
        dataset = self.captions.train if training else self.captions.val
        return self.batches(dataset, shuffle=training, num_workers=self.data.num_workers)

    def train_dataloader(self) -> DataLoader[CaptionBatch]:
        """Return augmented training batches, in a new order every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[CaptionBatch]:
        """Return batches of held-out clips."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[CaptionBatch]:
        """Return batches of the same held-out clips."""
        return self._loader("val")

    def labels(self, split: Split) -> Tensor:
        """Return a placeholder label for every sample of a split, (N,): the samples have none."""
        captions = self.captions.train if split == "train" else self.captions.val
        return torch.zeros(len(captions), dtype=torch.long)  # type: ignore[arg-type]  # 0 counts as known

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device as the dataset does."""
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return a digest of clips, captions, questions and labels."""
        return self.captions.fingerprint

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the numbers of clips, captions and questions that train the encoder."""
        return {"train": {"clips": self.captions.clips, "captions": self.captions.clips,
                          "questions": self.captions.questions}}  # fmt: skip
