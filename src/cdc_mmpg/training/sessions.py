"""View of a dataset for sessions: each sample has its device's upload, the mean anchor of other, unlabelled clips."""

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

NO_ANCHORS_SHARE = 0.1  # of the training samples, so that the shared head also learns to answer alone


class SessionDataset(Dataset[SessionBatch]):
    """Samples of a split with the uploads of their devices.

    In training the upload of a sample is the mean over all other clips of its device, the best available estimate.
    Fewer clips, drawn anew every epoch, gave a worse generator, even for tests with fewer. In evaluation a device has
    one upload per case, which serves all of its questions.

    Args:
        samples: features of the split.
        anchors: (A, 192) uploads of all unlabelled clips.
        sessions: devices of the anchors and of the samples.
        split: split of the samples.
        seed: seed of the draws.
        copies: (A, 192) each, uploads of the same clips on the virtual devices of `samples.copies`.
        turns: (D,) each, additional rotation of the hues by these virtual devices, in degrees.
        sets: whether batches also have the single anchors; in training at most `SET_SIZE` of them.
    """

    SET_SIZE = 16

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
        casts = torch.deg2rad(torch.stack([casts, *(casts + torch.tensor(degrees) for degrees in turns)]))
        self.casts = torch.stack([casts.cos(), casts.sin()], dim=-1)  # (1 + V, D, 2)
        if split == "train":
            self._uploads = torch.stack([self._average_others(anchors) for anchors in self.anchors])  # (1 + V, N, 192)
        else:
            self.uploads, self.counts, self.members = self._draw_fixed_sessions()

    def _average_others(self, anchors: Tensor) -> Tensor:
        """Return the mean anchor over the other clips of each training sample's device, (N, 192)."""
        totals = torch.stack([anchors[pool].sum(0) for pool in self.sessions.pools])
        clips = torch.tensor(self.sessions.own_anchors[self.split])
        is_anchor = (clips >= 0)[:, None]
        sizes = torch.tensor([len(pool) for pool in self.sessions.pools])
        numbers = sizes[self.devices][:, None] - is_anchor.long()
        rest = totals[self.devices] - torch.where(is_anchor, anchors[clips.clamp(min=0)], 0.0)
        return torch.where(numbers > 0, rest / numbers.clamp(min=1), 0.0)

    def _draw_fixed_sessions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw every device's uploads (D, C, 192), their numbers of anchors (D, C), and the anchors (D, C, most)."""
        devices = sorted(set(self.devices))
        drawn = shuffle_pools(self.sessions, self.seed)
        # In shuffled cases each device gets the anchors of the next one in a random circle.
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

    def _count_anchors(self, epoch: int, index: int) -> int:
        """Draw the number of anchors of a training sample: all other clips of its device, or sometimes none."""
        number = len(self.sessions.pools[self.devices[index]]) - (self.sessions.own_anchors[self.split][index] >= 0)
        return 0 if np.random.default_rng((self.seed, epoch, index)).random() < NO_ANCHORS_SHARE else number

    def _draw_set(self, epoch: int, index: int) -> list[int]:
        """Draw up to `SET_SIZE` anchors of a training sample, without its clip, padded with zeros."""
        excluded = self.sessions.own_anchors[self.split][index]
        others = [anchor for anchor in self.sessions.pools[self.devices[index]] if anchor != excluded]
        generator = np.random.default_rng((self.seed, epoch, index, self.SET_SIZE))
        chosen = generator.permutation(others)[: self.SET_SIZE].tolist()
        return chosen + [0] * (self.SET_SIZE - len(chosen))

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> SessionBatch:
        devices = torch.tensor([self.devices[i] for _, i in items])
        sets, casts = None, self.casts[0, devices]
        if self.split == "train":
            copies = torch.tensor(self.samples.draw_copies(items))
            casts = self.casts[copies, devices]
            counts = torch.tensor([[self._count_anchors(epoch, i)] for epoch, i in items])
            uploads = (self._uploads[copies, [i for _, i in items]] * (counts > 0)).unsqueeze(1)
            if self.sets:
                counts = counts.clamp(max=self.SET_SIZE)
                members = torch.tensor([self._draw_set(epoch, i) for epoch, i in items])
                sets = self.anchors[copies[:, None], members].unsqueeze(1)
        else:
            uploads, counts = self.uploads[devices], self.counts[devices]
            if self.sets:
                sets = self.anchors[0][self.members[devices]]
        return SessionBatch(self.samples.__getitems__(items), uploads, counts, casts, sets)


def shuffle_pools(sessions: Sessions, seed: int) -> list[NDArray[np.int64]]:
    """Shuffle every device's unlabelled clips; a session of n clips has the first n."""
    return [np.random.default_rng((seed, device)).permutation(pool) for device, pool in enumerate(sessions.pools)]


def choose_clips(
    sessions: Sessions, drawn: Sequence[NDArray[np.int64]], device: int, case: SessionCase
) -> Sequence[int]:
    """Choose the clips of a device for its session in a case.

    Args:
        sessions: sessions of the dataset, with clips with the most similar backgrounds if the case needs them.
        drawn: clips of every device, from `shuffle_pools`.
        device: index of the device.
        case: case of the session.
    """
    if case.alike:
        assert sessions.alike
        return sessions.alike[device][: case.anchors]
    return drawn[device][: case.anchors].tolist()


def read_sessions(data: VideoTextData, casts: bool) -> Sessions:
    """Return a dataset's unlabelled clips by device.

    Args:
        data: dataset that has been set up.
        casts: whether to refuse a dataset without the true hue casts of its devices.

    Raises:
        DataError: the dataset has no unlabelled clips, or lacks the casts.
    """
    sessions = data.sessions()
    if not any(sessions.pools):
        raise DataError("no device has an unlabelled clip to draw sessions from")
    if casts and np.isnan(sessions.casts).any():
        raise DataError(
            f"the hue casts of these devices are unknown (domains: {data.domains}), and this method needs them: "
            "use domains with known casts (ARGS=--data.init_args.domains=casts), or another method (METHOD=)"
        )
    return sessions


class DatasetPart(Dataset[VideoTextBatch]):
    """Subset of a dataset.

    Args:
        dataset: dataset of the samples.
        places: indices of the samples.
    """

    def __init__(self, dataset: Any, places: Sequence[int]) -> None:
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> VideoTextBatch:
        batch: VideoTextBatch = self.dataset.__getitems__([(epoch, self.places[index]) for epoch, index in items])
        return batch


class SessionDataModule(FeatureDataModule):
    """View of a dataset with devices as features of a frozen encoder: samples, and anchors of one frame each.

    Args:
        data, encoder, head, virtual, jitters: see `FeatureDataModule`.
        upload: function from the clips' features (A, 1, 192), with a neutral prompt, to their uploads (A, 192).
        casts: whether to refuse a dataset without the true hue casts of its devices.
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
        """Load or compute the features of samples and anchors; see `read_sessions` for the exceptions."""
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
        """Return the uploads of unlabelled clips, (A, 192), from features that are loaded or computed."""
        middle = self.encoder.num_frames // 2
        features = self.features(name, clips, fingerprint, middle)["frame_features"].flatten(1, -2)[:, :1]
        with torch.no_grad():
            return self.upload(features.to(next(self.encoder.parameters()).device)).cpu()

    def _anchors_of_virtual(self, sessions: Sessions, number: int, names: Mapping[int, str]) -> Tensor:
        """Return the uploads of training devices' clips on virtual devices, (A, 192); zeros for other clips."""
        device_of = {place: name for device, name in names.items() for place in sessions.pools[device]}
        devices = [device_of.get(place, "") for place in range(len(self._anchors))]
        rotated, fingerprint = self.make_virtual(sessions.anchors, devices, number)
        copy, places = torch.zeros_like(self._anchors), sorted(device_of)
        copy[places] = self.anchors("anchors", DatasetPart(rotated, places), f"{fingerprint} {places}")
        return copy

    def history(self) -> tuple[Tensor, list[list[int]]]:
        """Return the anchor features (A, 192), and the indices of those of each training device."""
        return self._anchors, [self._sessions.pools[device] for device in sorted(set(self._sessions.devices["train"]))]

    def build_view(self, split: Split, features: SplitFeatures) -> SessionDataset:
        """Build a split from its features and its devices' uploads."""
        samples = super().build_view(split, features)
        copies, turns = (self._copies, self._turns) if split == "train" else ([], [])
        return SessionDataset(samples, self._anchors, self._sessions, split, self.seed, copies, turns, self.sets)
