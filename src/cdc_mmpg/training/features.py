"""Features of a frozen encoder, computed once and kept: epochs on them take seconds."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdc_mmpg.data.batch import SPLITS, FeatureBatch, Split, VideoTextBatch
from cdc_mmpg.data.interface import SampleOrigin, VideoTextData
from cdc_mmpg.data.sampling import EpochDataModule, draw_cast, draw_copy, draw_jitter, draw_text
from cdc_mmpg.errors import DataError
from cdc_mmpg.files import remove_leftovers
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head
from cdc_mmpg.models.weights import save_safetensors
from cdc_mmpg.training.matmul import exact_matmul

logger = logging.getLogger(__name__)


SplitFeatures = dict[str, Tensor]  # of a split: "frame_features", and in retrieval "texts" and "there" (`FeatureBatch`)


class FeatureDataset(Dataset[FeatureBatch]):
    """Features (N, ...) with their labels (N,).

    Args:
        features: of the samples.
        labels: theirs.
        draw: of several captions take one, another every epoch.
        seed: of the draws.
        copies: features of the same samples as virtual devices see them; training takes any of these, or the samples'
            own.
    """

    def __init__(
        self,
        features: SplitFeatures,
        labels: Tensor,
        draw: bool = False,
        seed: int = 0,
        copies: Sequence[SplitFeatures] = (),
    ) -> None:
        self.labels, self.draw, self.seed = labels, draw, seed
        self.copies = 1 + len(copies)
        # (1 + V, N, ...) each; without copies as they are, since there may be many
        self.features = {
            name: torch.stack([values, *(copy[name] for copy in copies)]) if copies else values.unsqueeze(0)
            for name, values in features.items()
        }

    def __len__(self) -> int:
        return len(self.labels)

    def draw_copies(self, items: Sequence[tuple[int, int]]) -> list[int]:
        """Draw for every item which of the copies is its turn in this epoch."""
        return [draw_copy(self.seed, epoch, index, self.copies) for epoch, index in items]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> FeatureBatch:
        index = torch.tensor([index for _, index in items])
        drawn = torch.tensor(self.draw_copies(items))
        own = {name: values[drawn, index] for name, values in self.features.items()}
        batch = FeatureBatch(own["frame_features"], self.labels[index], index, own.get("texts"), own.get("there"))
        if not self.draw or batch.texts is None or batch.there is None:
            return batch
        chosen = torch.tensor([
            draw_text(self.seed, epoch, i, number)
            for (epoch, i), number in zip(items, batch.there.sum(1).tolist(), strict=True)
        ])  # fmt: skip
        texts = batch.texts[torch.arange(len(chosen)), chosen]
        return batch._replace(texts=texts[:, None], there=torch.ones(len(chosen), 1, dtype=torch.bool))


class FeatureDataModule(EpochDataModule):
    """Another dataset as a frozen encoder sees it: every sample's frames are the evaluation's, without augmentation.

    Deviation: methods with a frozen encoder train without augmentation, since their features are computed once; the
    paper does not say whether its frozen baselines do.

    The features lie below the dataset's `cache_dir`, under a digest of the encoder's weights and of the samples, so
    that runs with the same encoder share them. They are computed in float32, without TensorFloat-32, so that a CPU
    and a GPU share them, too.

    Args:
        data: the dataset.
        encoder: frozen.
        head: the task.
        virtual: how many virtual devices every device that trains becomes, beside itself: all of its hues rotated by a
            cast more, the same for all of its clips.
        jitters: whether they jitter colours, as augmentation usually does, in place of that.
    """

    def __init__(
        self, data: VideoTextData, encoder: AllInOne, head: Head, virtual: int = 0, jitters: bool = False
    ) -> None:
        super().__init__(data.batch_size, data.seed)  # kept features are small: a device holds its whole share at once
        self.data, self.encoder, self.head = data, encoder, head
        self.virtual, self.jitters = virtual, jitters
        self.even = data.even
        self._splits: dict[Split, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        """Prepare the dataset."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Load the features, after all processes together have computed those that are not there."""
        if self._splits:
            return
        self.data.setup(stage)
        for split in SPLITS:
            features = self.features(split, self.data.dataset(split, augment=False), self.data.fingerprint(split, True))
            self._splits[split] = self.view(split, features)

    def origins(self, split: Split) -> list[SampleOrigin]:
        """Return the dataset's own."""
        return self.data.origins(split)

    def view(self, split: Split, features: SplitFeatures) -> Any:
        """Return a split with its features."""
        copies: list[SplitFeatures] = []
        if split == "train":
            dataset, devices = self.data.dataset(split, augment=False), [o.device for o in self.data.origins(split)]
            copies = [self.features(split, *self.as_virtual(dataset, devices, n)) for n in range(self.virtual)]
        return FeatureDataset(features, self.data.labels(split), draw=split == "train", seed=self.seed, copies=copies)

    def draw_turn(self, device: str, number: int) -> float:
        """Return by how many degrees a device's virtual device of that number rotates hues."""
        return draw_jitter(device, number).hue if self.jitters else draw_cast(device, number)

    def as_virtual(self, dataset: Any, devices: Sequence[str], number: int) -> tuple[Dataset[VideoTextBatch], str]:
        """Return a dataset as each sample's device's virtual device of that number sees it, and a digest of it."""
        if self.jitters:
            return self.data.jitter(dataset, [draw_jitter(device, number) for device in devices])
        return self.data.rotate(dataset, [draw_cast(device, number) for device in devices])

    def features(
        self, name: str, dataset: Dataset[VideoTextBatch], fingerprint: str, frame: int | None = None
    ) -> SplitFeatures:
        """Return the features of a dataset as they are kept, or are from now on.

        Args:
            name: of the file.
            dataset: its samples.
            fingerprint: of its samples.
            frame: the only frame that the encoder is to see; None is all.
        """
        key = hashlib.sha256(f"{self.head.task} {self._weights} {fingerprint} {frame}".encode()).hexdigest()
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

    def _read(self, path: Path) -> SplitFeatures | None:
        """Read the features of a file, None where there is no whole one."""
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            return None

    def _make(self, name: str, dataset: Dataset[VideoTextBatch], frame: int | None, path: Path) -> None:
        """Compute features: every process its share; the first one joins them."""
        trainer = self.trainer
        assert trainer is not None
        world = trainer.world_size
        remove_leftovers(path.parent)
        if world == 1:  # in one go: two runs side by side may do the same, and either's file is right
            save_safetensors(self._compute(name, dataset, frame), path)
            return
        parts = [path.with_suffix(f".{rank}of{world}.safetensors") for rank in range(world)]
        save_safetensors(self._compute(name, dataset, frame), parts[trainer.global_rank])
        trainer.strategy.barrier("parts")
        if trainer.global_rank == 0:
            shares = [load_file(part) for part in parts]
            save_safetensors({name: _join([share[name] for share in shares]) for name in shares[0]}, path)
            for part in parts:
                part.unlink()
        trainer.strategy.barrier("whole")

    @torch.no_grad()
    @exact_matmul()
    def _compute(self, name: str, dataset: Dataset[VideoTextBatch], frame: int | None) -> SplitFeatures:
        """Compute the features of this process's share of a dataset, in order."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        encoder = self.encoder.to(device).eval()
        batches = self.batches(dataset, False, self.data.num_workers, self.data.per_device)
        found: dict[str, list[Tensor]] = {}
        for batch in track(batches, description=f"features of {name}"):
            seen = batch if frame is None else batch._replace(frames=batch.frames[:, frame : frame + 1])
            encoded = self.head.encode(encoder, self.data.transfer_batch_to_device(seen, device, 0))
            for part in ("frame_features", "texts", "there"):
                if (values := getattr(encoded, part)) is not None:
                    found.setdefault(part, []).append(values.cpu())
        return {part: torch.cat(_alike(values)) for part, values in found.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return training batches in a new order every epoch."""
        return self.batches(self._splits["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches, as annotated."""
        return self.batches(self._splits["val"], shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches, as annotated."""
        return self.batches(self._splits["test"], shuffle=False)

    def labels(self, split: Split) -> Tensor:
        """Return the dataset's own."""
        return self.data.labels(split)

    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return the dataset's own."""
        return self.data.fingerprint(split, frames)


def _join(shares: Sequence[Tensor]) -> Tensor:
    """Join the processes' shares in the samples' order: as `EpochBatches` shares out."""
    shares = _alike(shares)
    whole = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def _alike(parts: Sequence[Tensor]) -> list[Tensor]:
    """Pad parts to as many captions each, with zeros where there are fewer."""
    most = max(part.shape[1] for part in parts)
    return [F.pad(part, (0, 0) * (part.dim() - 2) + (0, most - part.shape[1])) for part in parts]
