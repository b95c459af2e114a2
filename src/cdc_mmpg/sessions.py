"""Samples with what their device uploads: the mean of the anchor features of its other, unlabelled clips."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cdc_mmpg.batch import CASES, SessionBatch, Sessions, Split
from cdc_mmpg.errors import DataError
from cdc_mmpg.features import FeatureDataModule, Features

TRAINED_ON = (4, 8, 16)  # numbers of anchors, one drawn for every sample
WITHOUT = 0.1  # share of the training samples without anchors: the shared head must answer alone, too


class SessionDataset(Dataset[SessionBatch]):
    """A split with its uploads: drawn anew for every sample and epoch in training, one for all of a device after it.

    Args:
        features: (N, T, 192) of the samples.
        labels: (N,).
        anchors: (A, 192) anchor features of all unlabelled clips.
        sessions: whose they are.
        split: which samples.
        seed: of the draws.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, anchors: Tensor, sessions: Sessions, split: Split, seed: int
    ) -> None:
        self.features, self.labels, self.anchors, self.sessions = features, labels, anchors, sessions
        self.split, self.seed = split, seed
        self.devices = sessions.devices[split]
        casts = torch.deg2rad(torch.tensor(sessions.casts))
        self.casts = torch.stack([casts.cos(), casts.sin()], dim=-1).nan_to_num()  # (D, 2)
        if split != "train":
            self.uploads, self.counts = self._fixed()

    def _fixed(self) -> tuple[Tensor, Tensor]:
        """Every device's uploads (D, C, 192) with their numbers of anchors (D, C)."""
        devices = sorted(set(self.devices))
        drawn = [
            np.random.default_rng((self.seed, device)).permutation(pool)
            for device, pool in enumerate(self.sessions.pools)
        ]
        # Each borrows from the next in a random circle.
        circle = np.random.default_rng(self.seed).permutation(devices).tolist()
        lender = dict(zip(circle, [*circle[1:], *circle[:1]], strict=True))
        uploads = torch.zeros(len(drawn), len(CASES), self.anchors.shape[-1])
        counts = torch.zeros(len(drawn), len(CASES), dtype=torch.long)
        for device in devices:
            for place, case in enumerate(CASES.values()):
                chosen = drawn[lender[device] if case.shuffled else device][: case.anchors]
                counts[device, place] = len(chosen)
                if len(chosen):
                    uploads[device, place] = self.anchors[chosen].mean(0)
        return uploads, counts

    def __len__(self) -> int:
        return len(self.labels)

    def _draw(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """A training sample's upload (192,) and its number of anchors; its own clip is not among them."""
        generator = np.random.default_rng((self.seed, epoch, index))
        own = self.sessions.own[self.split][index]
        pool = [anchor for anchor in self.sessions.pools[self.devices[index]] if anchor != own]
        number = min(int(generator.choice(TRAINED_ON)), len(pool))
        if not number or generator.random() < WITHOUT:
            return torch.zeros(self.anchors.shape[-1]), 0
        return self.anchors[generator.choice(pool, number, replace=False)].mean(0), number

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> SessionBatch:
        index = torch.tensor([index for _, index in items])
        devices = torch.tensor([self.devices[i] for _, i in items])
        if self.split == "train":
            drawn = [self._draw(epoch, i) for epoch, i in items]
            uploads = torch.stack([upload for upload, _ in drawn])[:, None]
            counts = torch.tensor([[number] for _, number in drawn])
        else:
            uploads, counts = self.uploads[devices], self.counts[devices]
        return SessionBatch(
            self.features[index], uploads, counts, self.casts[devices], self.labels[index], index
        )  # fmt: skip


class SessionDataModule(FeatureDataModule):
    """A dataset with devices as a frozen encoder sees it: samples, and anchors from a neutral prompt and one frame.

    Args:
        data, encoder, head: see `FeatureDataModule`.
    """

    def setup(self, stage: str) -> None:
        """Load or compute the features of samples and anchors.

        Raises:
            DataError: the dataset has no unlabelled clips.
        """
        if self._splits:
            return
        self.data.setup(stage)
        sessions = self.data.sessions()
        if not any(sessions.pools):
            raise DataError("no device has an unlabelled clip: there is nothing to draw sessions from")
        middle = self.encoder.num_frames // 2
        features = self.features("anchors", sessions.anchors, sessions.fingerprint, middle)["frame_features"]
        with torch.no_grad():
            device = next(self.encoder.parameters()).device
            self._anchors = self.encoder.pool(features[:, 0].to(device)).cpu()
        self._sessions = sessions
        super().setup(stage)

    def view(self, split: Split, features: Features) -> SessionDataset:
        """A split with its features and its uploads."""
        return SessionDataset(
            features["frame_features"], self.data.labels(split), self._anchors, self._sessions, split, self.seed
        )
