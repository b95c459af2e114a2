"""Samples with what their device uploads: the mean of the anchor features of its other, unlabelled clips."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cdc_mmpg.data.batch import SessionBatch, Split
from cdc_mmpg.data.control_cases import SESSION_CASES
from cdc_mmpg.data.interface import Sessions, VideoTextData
from cdc_mmpg.errors import DataError
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head
from cdc_mmpg.training.features import FeatureDataModule, FeatureDataset, SplitFeatures

WITHOUT = 0.1  # share of the training samples without anchors: the shared head must answer alone, too


class SessionDataset(Dataset[SessionBatch]):
    """A split with its uploads.

    In training a sample's is the mean of all other clips of its device, the best estimate there is: with fewer, drawn
    anew every epoch, a generator answers worse, and also where it is then used with fewer. After training a device has
    one upload of so many clips for all of its questions.

    Args:
        samples: the split as the encoder sees it.
        anchors: (A, 192) anchor features of all unlabelled clips.
        sessions: whose they are.
        split: which samples.
        seed: of the draws.
    """

    def __init__(self, samples: FeatureDataset, anchors: Tensor, sessions: Sessions, split: Split, seed: int) -> None:
        self.samples, self.anchors, self.sessions = samples, anchors, sessions
        self.split, self.seed = split, seed
        self.devices = sessions.devices[split]
        casts = torch.deg2rad(torch.tensor(sessions.casts))
        self.casts = torch.stack([casts.cos(), casts.sin()], dim=-1)  # (D, 2)
        if split == "train":
            self._totals = torch.stack([anchors[pool].sum(0) for pool in sessions.pools])
        else:
            self.uploads, self.counts = self._fixed()

    def _fixed(self) -> tuple[Tensor, Tensor]:
        """Return every device's uploads (D, C, 192) with their numbers of anchors (D, C)."""
        devices = sorted(set(self.devices))
        drawn = [
            np.random.default_rng((self.seed, device)).permutation(pool)
            for device, pool in enumerate(self.sessions.pools)
        ]
        # Each borrows from the next in a random circle.
        circle = np.random.default_rng(self.seed).permutation(devices).tolist()
        lender = dict(zip(circle, [*circle[1:], *circle[:1]], strict=True))
        uploads = torch.zeros(len(drawn), len(SESSION_CASES), self.anchors.shape[-1])
        counts = torch.zeros(len(drawn), len(SESSION_CASES), dtype=torch.long)
        for device in devices:
            for place, case in enumerate(SESSION_CASES.values()):
                chosen = drawn[lender[device] if case.shuffled else device][: case.anchors]
                counts[device, place] = len(chosen)
                if len(chosen):
                    uploads[device, place] = self.anchors[chosen].mean(0)
        return uploads, counts

    def __len__(self) -> int:
        return len(self.samples)

    def _rest(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """Return a training sample's upload (192,) and its number of anchors; its own clip is not among them."""
        own, pool = self.sessions.own[self.split][index], self.sessions.pools[self.devices[index]]
        number = len(pool) - (own >= 0)
        if not number or np.random.default_rng((self.seed, epoch, index)).random() < WITHOUT:
            return torch.zeros(self.anchors.shape[-1]), 0
        total = self._totals[self.devices[index]]
        return (total - self.anchors[own] if own >= 0 else total) / number, number

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> SessionBatch:
        devices = torch.tensor([self.devices[i] for _, i in items])
        if self.split == "train":
            drawn = [self._rest(epoch, i) for epoch, i in items]
            uploads = torch.stack([upload for upload, _ in drawn])[:, None]
            counts = torch.tensor([[number] for _, number in drawn])
        else:
            uploads, counts = self.uploads[devices], self.counts[devices]
        return SessionBatch(self.samples.__getitems__(items), uploads, counts, self.casts[devices])


class SessionDataModule(FeatureDataModule):
    """A dataset with devices as a frozen encoder sees it: samples, and anchors from a neutral prompt and one frame.

    Args:
        data, encoder, head: see `FeatureDataModule`.
        casts: refuse a dataset that does not know the true hue casts of its devices.
    """

    def __init__(self, data: VideoTextData, encoder: AllInOne, head: Head, casts: bool = False) -> None:
        super().__init__(data, encoder, head)
        self.casts = casts

    def setup(self, stage: str) -> None:
        """Load or compute the features of samples and anchors.

        Raises:
            DataError: the dataset has no unlabelled clips, or does not know the casts that are asked for.
        """
        if self._splits:
            return
        self.data.setup(stage)
        sessions = self.data.sessions()
        if not any(sessions.pools):
            raise DataError("no device has an unlabelled clip: there is nothing to draw sessions from")
        if self.casts and np.isnan(sessions.casts).any():
            raise DataError(
                f"nobody knows the hue casts of these devices (domains: {self.data.domains}), and the oracle is told "
                "them: take domains whose casts are known (ARGS=--data.init_args.domains=casts), or another method "
                "(METHOD=)"
            )
        self._anchors, self._sessions = self.anchors(sessions), sessions
        super().setup(stage)

    def anchors(self, sessions: Sessions) -> Tensor:
        """Return the anchor features of all unlabelled clips, (A, 192), loaded or computed."""
        middle = self.encoder.num_frames // 2
        features = self.features("anchors", sessions.anchors, sessions.fingerprint, middle)["frame_features"]
        with torch.no_grad():
            device = next(self.encoder.parameters()).device
            return self.encoder.pool(features.flatten(1, -2)[:, 0].to(device)).cpu()

    def history(self) -> tuple[Tensor, list[list[int]]]:
        """Return the anchor features (A, 192), and which of them each device that trains has."""
        return self._anchors, [self._sessions.pools[device] for device in sorted(set(self._sessions.devices["train"]))]

    def view(self, split: Split, features: SplitFeatures) -> SessionDataset:
        """Return a split with its features and its uploads."""
        return SessionDataset(super().view(split, features), self._anchors, self._sessions, split, self.seed)
