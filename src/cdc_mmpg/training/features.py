"""Features of a frozen encoder, computed once and cached, so that epochs take seconds."""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from cdc_mmpg.progress import track
from cdc_mmpg.training.matmul import exact_matmul

logger = logging.getLogger(__name__)

# Features of a split, by field of `FeatureBatch`: "frame_features", for retrieval also "texts" and "there".
SplitFeatures = dict[str, Tensor]


class FeatureDataset(Dataset[FeatureBatch]):
    """Features (N, ...) with their labels (N,).

    Args:
        features: features of the samples.
        labels: labels of the samples.
        draw: whether to draw one of several captions, a new one every epoch.
        seed: seed of the draws.
        copies: features of the same samples on virtual devices; training draws from these and `features`.
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
        # (1 + V, N, ...) each; without virtual devices a view, since features may be large.
        self.features = {
            name: torch.stack([values, *(copy[name] for copy in copies)]) if copies else values.unsqueeze(0)
            for name, values in features.items()
        }

    def __len__(self) -> int:
        return len(self.labels)

    def draw_copies(self, items: Sequence[tuple[int, int]]) -> list[int]:
        """Draw the copy of every item for its epoch; 0 is the sample itself."""
        return [draw_copy(self.seed, epoch, index, self.copies) for epoch, index in items]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> FeatureBatch:
        index = torch.tensor([index for _, index in items])
        drawn = torch.tensor(self.draw_copies(items))
        parts = {name: values[drawn, index] for name, values in self.features.items()}
        batch = FeatureBatch(parts["frame_features"], self.labels[index], index, parts.get("texts"), parts.get("there"))
        if not self.draw or batch.texts is None or batch.there is None:
            return batch
        chosen = torch.tensor([
            draw_text(self.seed, epoch, i, number)
            for (epoch, i), number in zip(items, batch.there.sum(1).tolist(), strict=True)
        ])  # fmt: skip
        texts = batch.texts[torch.arange(len(chosen)), chosen]
        return batch._replace(texts=texts[:, None], there=torch.ones(len(chosen), 1, dtype=torch.bool))


class FeatureDataModule(EpochDataModule):
    """View of a dataset as features of a frozen encoder, from frames without augmentation.

    Deviation: methods with a frozen encoder train without augmentation, since their features are computed once; the
    paper does not say whether its frozen baselines do.

    The features are cached in the dataset's `cache_dir`, by a digest of the encoder's weights and of the samples, so
    that runs with the same encoder share them. They are computed in float32, without TensorFloat-32, so that runs on a
    CPU and on a GPU share them, too.

    Args:
        data: dataset whose samples are encoded.
        encoder: frozen encoder.
        head: head of the task, which knows how to encode a batch.
        virtual: number of virtual devices for every training device: all of its hues are rotated by an additional cast,
            the same for all of its clips.
        jitters: whether virtual devices jitter colours, as augmentation usually does, instead of rotating hues.
    """

    def __init__(
        self, data: VideoTextData, encoder: AllInOne, head: Head, virtual: int = 0, jitters: bool = False
    ) -> None:
        super().__init__(data.batch_size, data.seed)  # features are small: each device has one batch a step
        self.data, self.encoder, self.head = data, encoder, head
        self.virtual, self.jitters = virtual, jitters
        self.even = data.even
        self._splits: dict[Split, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        """Prepare the dataset."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Load the features of all splits; missing ones are computed by all processes together."""
        if self._splits:
            return
        self.data.setup(stage)
        for split in SPLITS:
            features = self.features(split, self.data.dataset(split, augment=False), self.data.fingerprint(split, True))
            self._splits[split] = self.build_view(split, features)

    def origins(self, split: Split) -> list[SampleOrigin]:
        """Return the origins of the dataset's samples."""
        return self.data.origins(split)

    def build_view(self, split: Split, features: SplitFeatures) -> Any:
        """Build a split from its features; for training also load the features of its virtual devices."""
        copies: list[SplitFeatures] = []
        if split == "train":
            dataset, devices = self.data.dataset(split, augment=False), [o.device for o in self.data.origins(split)]
            copies = [self.features(split, *self.make_virtual(dataset, devices, n)) for n in range(self.virtual)]
        return FeatureDataset(features, self.data.labels(split), draw=split == "train", seed=self.seed, copies=copies)

    def draw_turn(self, device: str, number: int) -> float:
        """Draw the rotation of hues of a device's virtual device number `number`, in degrees."""
        return draw_jitter(device, number).hue if self.jitters else draw_cast(device, number)

    def make_virtual(self, dataset: Any, devices: Sequence[str], number: int) -> tuple[Dataset[VideoTextBatch], str]:
        """Return a dataset as virtual device `number` of each sample's device records it, and its digest."""
        if self.jitters:
            return self.data.jitter(dataset, [draw_jitter(device, number) for device in devices])
        return self.data.rotate(dataset, [draw_cast(device, number) for device in devices])

    def features(
        self, name: str, dataset: Dataset[VideoTextBatch], fingerprint: str, frame: int | None = None
    ) -> SplitFeatures:
        """Return the features of a dataset from the cache; compute and cache them if they are missing.

        Args:
            name: first part of the file name.
            dataset: samples to encode.
            fingerprint: digest of the samples.
            frame: index of the only frame to encode; None for all frames.

        Raises:
            DataError: the cached file cannot be read, as when the machines of the run do not share the folder.
        """
        key = hashlib.sha256(f"{self.head.task} {self._weights} {fingerprint} {frame}".encode()).hexdigest()
        path = self.data.cache_dir / "features" / f"{name}.{key[:16]}.safetensors"
        assert self.trainer is not None
        if self.trainer.strategy.broadcast(self._read(path) is None):
            self._write_features(name, dataset, frame, path)
        features = self._read(path)
        if features is None:
            raise DataError(
                f"{path} cannot be read, though the first process has written or read it: check the disk; the machines "
                "of a run must share this folder (CACHE=)"
            )
        return features

    @cached_property
    def _weights(self) -> str:
        """Digest of the encoder's weights."""
        digest = hashlib.sha256()
        for name, value in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _read(self, path: Path) -> SplitFeatures | None:
        """Read the features in a file; None if it is missing or incomplete."""
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            return None

    def _write_features(self, name: str, dataset: Dataset[VideoTextBatch], frame: int | None, path: Path) -> None:
        """Compute features and write them to `path`: every process computes a share, the first one joins the shares."""
        trainer = self.trainer
        assert trainer is not None
        world = trainer.world_size
        remove_leftovers(path.parent)
        if world == 1:  # no part files: parallel runs may do the same, and the files are equal
            save_safetensors(self._compute(name, dataset, frame), path)
            return
        parts = [path.with_suffix(f".{rank}of{world}.safetensors") for rank in range(world)]
        save_safetensors(self._compute(name, dataset, frame), parts[trainer.global_rank])
        trainer.strategy.barrier("parts")
        if trainer.global_rank == 0:
            shares = [load_file(part) for part in parts]
            save_safetensors({name: _interleave_shares([share[name] for share in shares]) for name in shares[0]}, path)
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
        computed: dict[str, list[Tensor]] = {}
        for batch in track(batches, description=f"features of {name}"):
            clips = batch if frame is None else batch._replace(frames=batch.frames[:, frame : frame + 1])
            encoded = self.head.encode(encoder, self.data.transfer_batch_to_device(clips, device, 0))
            for part in ("frame_features", "texts", "there"):
                if (values := getattr(encoded, part)) is not None:
                    computed.setdefault(part, []).append(values.cpu())
        return {part: torch.cat(_pad_texts(values)) for part, values in computed.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return training batches in a new order every epoch."""
        return self.batches(self._splits["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches in the order of the annotations."""
        return self.batches(self._splits["val"], shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches in the order of the annotations."""
        return self.batches(self._splits["test"], shuffle=False)

    def labels(self, split: Split) -> Tensor:
        """Return the labels of the dataset."""
        return self.data.labels(split)

    def fingerprint(self, split: Split, frames: bool) -> str:
        """Return the fingerprint of the dataset."""
        return self.data.fingerprint(split, frames)


def _interleave_shares(shares: Sequence[Tensor]) -> Tensor:
    """Join the processes' shares in the order of the samples, the inverse of how `EpochBatches` divides them."""
    shares = _pad_texts(shares)
    joined = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        joined[rank :: len(shares)] = share
    return joined


def _pad_texts(parts: Sequence[Tensor]) -> list[Tensor]:
    """Pad parts along dimension 1, the captions, with zeros to the same length."""
    most = max(part.shape[1] for part in parts)
    return [F.pad(part, (0, 0) * (part.dim() - 2) + (0, most - part.shape[1])) for part in parts]
