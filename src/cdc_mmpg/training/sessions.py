"""Samples with what their device uploads: the mean of the anchor features of its other, unlabelled clips."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cdc_mmpg.data.batch import SessionBatch, Split, VideoTextBatch
from cdc_mmpg.data.control_cases import SESSION_CASES, SessionCase
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
        anchors: (A, 192) what all unlabelled clips upload.
        sessions: whose they are.
        split: which samples.
        seed: of the draws.
        copies: (A, 192) each, anchors as the virtual devices of `samples.copies` see them.
        turns: (D,) each, by how many degrees these rotate the hues more than their devices.
        sets: whether batches hold the anchors themselves, too; in training `SET` of them at most.
    """

    SET = 16

    def __init__(
        self,
        samples: FeatureDataset,
        anchors: Tensor,
        sessions: Sessions,
        split: Split,
        seed: int,
        copies: Sequence[Tensor] = (),
        turns: Sequence[Sequence[float]] = (),
        sets: bool = False,
    ) -> None:
        self.samples, self.sessions = samples, sessions
        self.anchors = torch.stack([anchors, *copies])  # (1 + V, A, 192)
        self.split, self.seed, self.sets = split, seed, sets
        self.devices = sessions.devices[split]
        casts = torch.tensor(sessions.casts)
        casts = torch.deg2rad(torch.stack([casts, *(casts + torch.tensor(own) for own in turns)]))
        self.casts = torch.stack([casts.cos(), casts.sin()], dim=-1)  # (1 + V, D, 2)
        if split == "train":
            self._uploads = torch.stack([self._means_of_others(own) for own in self.anchors])  # (1 + V, N, 192)
        else:
            self.uploads, self.counts, self.members = self._fixed()

    def _means_of_others(self, anchors: Tensor) -> Tensor:
        """Return for every training sample the mean of the other clips of its device, (N, 192)."""
        totals = torch.stack([anchors[pool].sum(0) for pool in self.sessions.pools])
        own = torch.tensor(self.sessions.own[self.split])
        is_anchor = (own >= 0)[:, None]
        sizes = torch.tensor([len(pool) for pool in self.sessions.pools])
        numbers = sizes[self.devices][:, None] - is_anchor.long()
        rest = totals[self.devices] - torch.where(is_anchor, anchors[own.clamp(min=0)], 0.0)
        return torch.where(numbers > 0, rest / numbers.clamp(min=1), 0.0)

    def _fixed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return every device's uploads (D, C, 192), how many anchors each has (D, C), and which (D, C, most)."""
        devices = sorted(set(self.devices))
        drawn = shuffle_pools(self.sessions, self.seed)
        # Each borrows from the next in a random circle.
        circle = np.random.default_rng(self.seed).permutation(devices).tolist()
        lender = dict(zip(circle, [*circle[1:], *circle[:1]], strict=True))
        cases = [case for case in SESSION_CASES.values() if self.sessions.alike or not case.alike]
        uploads = torch.zeros(len(drawn), len(cases), self.anchors[0].shape[-1])
        counts = torch.zeros(len(drawn), len(cases), dtype=torch.long)
        members = torch.zeros(len(drawn), len(cases), max(case.anchors for case in cases), dtype=torch.long)
        for device in devices:
            for place, case in enumerate(cases):
                owner = lender[device] if case.shuffled else device
                chosen = torch.tensor(choose_clips(self.sessions, drawn, owner, case), dtype=torch.long)
                counts[device, place] = len(chosen)
                if len(chosen):
                    uploads[device, place] = self.anchors[0][chosen].mean(0)
                    members[device, place, : len(chosen)] = chosen
        return uploads, counts, members

    def __len__(self) -> int:
        return len(self.samples)

    def _count(self, epoch: int, index: int) -> int:
        """Return how many anchors a training sample has, all others of its device; now and then none."""
        number = len(self.sessions.pools[self.devices[index]]) - (self.sessions.own[self.split][index] >= 0)
        return 0 if np.random.default_rng((self.seed, epoch, index)).random() < WITHOUT else number

    def _draw_set(self, epoch: int, index: int) -> list[int]:
        """Draw `SET` anchors of a training sample, without its own clip."""
        others = [i for i in self.sessions.pools[self.devices[index]] if i != self.sessions.own[self.split][index]]
        chosen = np.random.default_rng((self.seed, epoch, index, self.SET)).permutation(others)[: self.SET].tolist()
        return chosen + [0] * (self.SET - len(chosen))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> SessionBatch:
        devices = torch.tensor([self.devices[i] for _, i in items])
        sets, casts = None, self.casts[0, devices]
        if self.split == "train":
            of_copy = torch.tensor(self.samples.draw_copies(items))
            casts = self.casts[of_copy, devices]
            counts = torch.tensor([[self._count(epoch, i)] for epoch, i in items])
            uploads = (self._uploads[of_copy, [i for _, i in items]] * (counts > 0)).unsqueeze(1)
            if self.sets:
                counts = counts.clamp(max=self.SET)
                members = torch.tensor([self._draw_set(epoch, i) for epoch, i in items])
                sets = self.anchors[of_copy[:, None], members].unsqueeze(1)
        else:
            uploads, counts = self.uploads[devices], self.counts[devices]
            if self.sets:
                sets = self.anchors[0][self.members[devices]]
        return SessionBatch(self.samples.__getitems__(items), uploads, counts, casts, sets)


def shuffle_pools(sessions: Sessions, seed: int) -> list[NDArray[np.int64]]:
    """Return every device's unlabelled clips in the order in which they make a session: n clips are the first n."""
    return [np.random.default_rng((seed, device)).permutation(pool) for device, pool in enumerate(sessions.pools)]


def choose_clips(
    sessions: Sessions, drawn: Sequence[NDArray[np.int64]], device: int, case: SessionCase
) -> Sequence[int]:
    """Return the clips of a device that make its session in a case.

    Args:
        sessions: whose clips are alike, too, where the case needs that.
        drawn: of `shuffle_pools`.
        device, case: which.
    """
    if case.alike:
        assert sessions.alike
        return sessions.alike[device][: case.anchors]
    return drawn[device][: case.anchors].tolist()


def read_sessions(data: VideoTextData, casts: bool) -> Sessions:
    """Return a dataset's unlabelled clips by device.

    Args:
        data: set up.
        casts: refuse a dataset that does not know the true hue casts of its devices.

    Raises:
        DataError: it has no unlabelled clips, or does not know the casts.
    """
    sessions = data.sessions()
    if not any(sessions.pools):
        raise DataError("no device has an unlabelled clip: there is nothing to draw sessions from")
    if casts and np.isnan(sessions.casts).any():
        raise DataError(
            f"nobody knows the hue casts of these devices (domains: {data.domains}), and this method is told them: "
            "take domains whose casts are known (ARGS=--data.init_args.domains=casts), or another method (METHOD=)"
        )
    return sessions


class Part(Dataset[VideoTextBatch]):
    """Some samples of a dataset.

    Args:
        dataset: which.
        places: of its samples.
    """

    def __init__(self, dataset: Any, places: Sequence[int]) -> None:
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> VideoTextBatch:
        found: VideoTextBatch = self.dataset.__getitems__([(epoch, self.places[index]) for epoch, index in items])
        return found


class SessionDataModule(FeatureDataModule):
    """A dataset with devices as a frozen encoder sees it: samples, and anchors from a neutral prompt and one frame.

    Args:
        data, encoder, head, virtual, jitters: see `FeatureDataModule`.
        upload: what a clip's frame features (A, 1, 192) upload, (A, 192).
        casts: refuse a dataset that does not know the true hue casts of its devices.
        sets: see `SessionDataset`.
    """

    def __init__(
        self,
        data: VideoTextData,
        encoder: AllInOne,
        head: Head,
        upload: Callable[[Tensor], Tensor],
        virtual: int = 0,
        casts: bool = False,
        sets: bool = False,
        jitters: bool = False,
    ) -> None:
        super().__init__(data, encoder, head, virtual, jitters)
        self.upload, self.casts, self.sets = upload, casts, sets

    def setup(self, stage: str) -> None:
        """Load or compute the features of samples and anchors; see `read_sessions`."""
        if self._splits:
            return
        self.data.setup(stage)
        self._sessions = sessions = read_sessions(self.data, self.casts)
        self._anchors = self.anchors("anchors", sessions.anchors, sessions.fingerprint)
        names = dict(zip(sessions.devices["train"], (o.device for o in self.data.origins("train")), strict=True))
        self._turns = [
            [self.draw_turn(names[device], number) if device in names else 0.0 for device in range(len(sessions.pools))]
            for number in range(self.virtual)
        ]
        self._copies = [self._anchors_of_virtual(sessions, number, names) for number in range(self.virtual)]
        super().setup(stage)

    def anchors(self, name: str, clips: Dataset[VideoTextBatch], fingerprint: str) -> Tensor:
        """Return what unlabelled clips upload, (A, 192), from features that are loaded or computed."""
        middle = self.encoder.num_frames // 2
        features = self.features(name, clips, fingerprint, middle)["frame_features"].flatten(1, -2)[:, :1]
        with torch.no_grad():
            return self.upload(features.to(next(self.encoder.parameters()).device)).cpu()

    def _anchors_of_virtual(self, sessions: Sessions, number: int, names: Mapping[int, str]) -> Tensor:
        """Return what the clips of devices that train upload as virtual devices see them, (A, 192); zeros elsewhere."""
        device_of = {place: name for device, name in names.items() for place in sessions.pools[device]}
        devices = [device_of.get(place, "") for place in range(len(self._anchors))]
        rotated, fingerprint = self.as_virtual(sessions.anchors, devices, number)
        copy, places = torch.zeros_like(self._anchors), sorted(device_of)
        copy[places] = self.anchors("anchors", Part(rotated, places), f"{fingerprint} {places}")
        return copy

    def history(self) -> tuple[Tensor, list[list[int]]]:
        """Return the anchor features (A, 192), and which of them each device that trains has."""
        return self._anchors, [self._sessions.pools[device] for device in sorted(set(self._sessions.devices["train"]))]

    def view(self, split: Split, features: SplitFeatures) -> SessionDataset:
        """Return a split with its features and its uploads."""
        samples = super().view(split, features)
        copies, turns = (self._copies, self._turns) if split == "train" else ([], [])
        return SessionDataset(samples, self._anchors, self._sessions, split, self.seed, copies, turns, self.sets)
