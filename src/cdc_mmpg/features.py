"""Features of a frozen encoder, computed once and kept: epochs on them take seconds."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdc_mmpg.batch import (
    SPLITS,
    EpochDataModule,
    Example,
    FeatureBatch,
    Origin,
    Split,
    VideoTextBatch,
    VideoTextData,
    normalise,
)
from cdc_mmpg.errors import DataError
from cdc_mmpg.files import remove_leftovers
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.weights import save_safetensors

logger = logging.getLogger(__name__)


class FeatureDataset(Dataset[FeatureBatch]):
    """Frame features (N, T, 192) with their labels (N,)."""

    def __init__(self, frame_features: Tensor, labels: Tensor) -> None:
        self.frame_features, self.labels = frame_features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> FeatureBatch:
        index = torch.tensor([index for _, index in items])
        return FeatureBatch(self.frame_features[index], self.labels[index], index)


class FeatureDataModule(EpochDataModule):
    """Another dataset as a frozen encoder sees it: every sample's frames are the evaluation's, without augmentation.

    The features lie below the dataset's `cache_dir`, under a digest of the encoder's weights and of the samples, so
    that runs with the same encoder share them. They are computed in float32.

    Args:
        data: the dataset.
        encoder: frozen.
    """

    def __init__(self, data: VideoTextData, encoder: AllInOne) -> None:
        super().__init__(data.batch_size, data.seed)
        self.data, self.encoder = data, encoder
        self._splits: dict[Split, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        """The dataset's own."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Load the features, after all processes together have computed those that are not there."""
        if self._splits:
            return
        self.data.setup(stage)
        for split in SPLITS:
            features = self.features(split, self.data.dataset(split, augment=False), self.data.fingerprint(split, True))
            self._splits[split] = self.view(split, features)

    def view(self, split: Split, features: Tensor) -> Dataset[Any]:
        """A split with its features (N, T, 192)."""
        return FeatureDataset(features, self.data.labels(split))

    def features(
        self, name: str, dataset: Dataset[VideoTextBatch], fingerprint: str, frame: int | None = None
    ) -> Tensor:
        """The features (N, T, 192) of a dataset as they are kept, or are from now on.

        Args:
            name: of the file.
            dataset: its samples.
            fingerprint: of its samples.
            frame: the only frame that the encoder is to see; None is all.
        """
        key = hashlib.sha256(f"{self._weights} {fingerprint} {frame}".encode()).hexdigest()
        path = self.data.cache_dir / "features" / f"{name}.{key[:16]}.safetensors"
        assert self.trainer is not None
        if self.trainer.strategy.broadcast(self._read(path) is None):
            self._make(name, dataset, frame, path)
        features = self._read(path)
        if features is None:
            raise DataError(
                f"{path} is not there, though the first process has made it: all machines must share the folder"
            )
        return features

    @cached_property
    def _weights(self) -> str:
        """A digest of the encoder's."""
        digest = hashlib.sha256()
        for name, value in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _read(self, path: Path) -> Tensor | None:
        """(N, T, 192) of a file, None where there is no whole one."""
        try:
            return load_file(path)["frame_features"]
        except (OSError, SafetensorError, KeyError):
            return None

    def _make(self, name: str, dataset: Dataset[VideoTextBatch], frame: int | None, path: Path) -> None:
        """Every process computes its share; the first one joins them."""
        trainer = self.trainer
        assert trainer is not None
        world = trainer.world_size
        remove_leftovers(path.parent)
        if world == 1:  # in one go: two runs side by side may do the same, and either's file is right
            save_safetensors({"frame_features": self._compute(name, dataset, frame)}, path)
            return
        parts = [path.with_suffix(f".{rank}of{world}.safetensors") for rank in range(world)]
        save_safetensors({"frame_features": self._compute(name, dataset, frame)}, parts[trainer.global_rank])
        trainer.strategy.barrier("parts")
        if trainer.global_rank == 0:
            shares = [load_file(part)["frame_features"] for part in parts]
            whole = torch.empty(sum(map(len, shares)), *shares[0].shape[1:])
            for rank, share in enumerate(shares):
                whole[rank::world] = share  # as `EpochSampler` shares out
            save_safetensors({"frame_features": whole}, path)
            for part in parts:
                part.unlink()
        trainer.strategy.barrier("whole")

    @torch.no_grad()
    def _compute(self, name: str, dataset: Dataset[VideoTextBatch], frame: int | None) -> Tensor:
        """(n, T, 192) of this process's share of a dataset, in order."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        encoder = self.encoder.to(device).eval()
        batches = self.batches(dataset, shuffle=False, num_workers=self.data.num_workers)
        features = []
        for batch in track(batches, description=f"features of {name}"):
            frames = batch.frames if frame is None else batch.frames[:, frame : frame + 1]
            video = normalise(frames.to(device))
            features.append(encoder(video, batch.text_ids.to(device), batch.text_mask.to(device)).frame_features.cpu())
        return torch.cat(features)

    def train_dataloader(self) -> DataLoader[Any]:
        """In a new order every epoch."""
        return self.batches(self._splits["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """As annotated."""
        return self.batches(self._splits["val"], shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """As annotated."""
        return self.batches(self._splits["test"], shuffle=False)

    def fingerprint(self, split: Split, frames: bool) -> str:
        """The dataset's own."""
        return self.data.fingerprint(split, frames)

    def summary(self) -> dict[str, dict[str, float]]:
        """The dataset's own."""
        return self.data.summary()

    def example(self, split: Split, index: int) -> Example:
        """The dataset's own."""
        return self.data.example(split, index)

    def answers(self) -> list[str]:
        """The dataset's own."""
        return self.data.answers()

    def labels(self, split: Split) -> Tensor:
        """The dataset's own."""
        return self.data.labels(split)

    def origins(self, split: Split) -> list[Origin]:
        """The dataset's own."""
        return self.data.origins(split)
