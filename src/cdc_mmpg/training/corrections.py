"""Opponents by hand: a device estimates its cast from pixels, and its frames are rotated back before the encoder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cdc_mmpg.data.batch import SPLITS
from cdc_mmpg.data.control_cases import CORRECTION_CASES, Correction
from cdc_mmpg.data.interface import Sessions, VideoTextData
from cdc_mmpg.media.frames import Frames
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head
from cdc_mmpg.training.features import FeatureDataModule
from cdc_mmpg.training.sessions import choose_clips, read_sessions, shuffle_pools

CLIPS_AT_ONCE = 64
HUE_BINS = 72  # of a histogram: 5 degrees each
LEAST_CHROMA = 0.05  # of a pixel with a hue, where pure colours have 1


class CorrectedDataModule(FeatureDataModule):
    """A dataset with devices as a frozen encoder sees it, all hues of a device rotated back by its estimated cast.

    A device estimates once, from the n unlabelled clips that a session of n would average, and corrects all of its
    clips; a test has the features of several n, (N, C, T, 192), and training those of the first.

    Args:
        data, encoder, head: see `FeatureDataModule`.
        correction: "grey_world" (Buchsbaum 1980, "A spatial processor model for object colour perception") takes the
            direction of the mean chroma, "hue_mode" that of the most frequent hues of the frames, "true_cast" is told.
    """

    def __init__(self, data: VideoTextData, encoder: AllInOne, head: Head, correction: Correction) -> None:
        super().__init__(data, encoder, head)
        self.correction = correction

    def setup(self, stage: str) -> None:
        """Estimate, then load or compute the features; see `read_sessions`."""
        if self._splits:
            return
        self.data.setup(stage)
        sessions = read_sessions(self.data, casts=self.correction == "true_cast")
        estimates = self.estimate(sessions)
        for split in SPLITS:
            devices, found = sessions.devices[split], []
            for casts in estimates if split == "test" else estimates[:1]:
                rotated = self.data.rotate(self.data.dataset(split, augment=False), (-casts[devices]).tolist())
                found.append(self.features(split, *rotated)["frame_features"])
            self._splits[split] = self.view(split, {"frame_features": torch.stack(found, dim=1)})

    def estimate(self, sessions: Sessions) -> NDArray[np.float64]:
        """Return every device's cast in degrees, (C, D), a row a case; 0 where a device has no clips."""
        if self.correction == "true_cast":
            return np.array([sessions.casts])
        directions = np.concatenate([
            point_at_hue(frames) if self.correction == "hue_mode" else average_chroma(frames)
            for frames in self._middle_frames(sessions)
        ])  # fmt: skip
        cases = [case for case in CORRECTION_CASES.values() if sessions.alike or not case.alike]
        casts, drawn = np.zeros((len(cases), len(sessions.pools))), shuffle_pools(sessions, self.seed)
        for place, case in enumerate(cases):
            for device in range(len(drawn)):
                across, up = directions[choose_clips(sessions, drawn, device, case)].sum(0)
                casts[place, device] = np.degrees(np.arctan2(up, across))
        return casts

    def _middle_frames(self, sessions: Sessions) -> Iterator[Frames]:
        """Yield the frames that anchors are made of, (B, H, W, 3); every process reads all of them."""
        clips: Any = sessions.anchors
        for places in np.array_split(np.arange(len(clips)), 1 + len(clips) // CLIPS_AT_ONCE):
            frames = clips.__getitems__([(0, place) for place in places.tolist()]).frames
            yield frames[:, frames.shape[1] // 2].numpy()


def measure_chroma(frames: Frames) -> NDArray[np.float64]:
    """Return every pixel's place in the plane of hues, (B, H W, 2), of frames (B, H, W, 3).

    Red lies at 0 degrees, green at 120; what is grey lies at the origin, and pure colours about 1 away from it.
    """
    red, green, blue = np.moveaxis(frames.reshape(len(frames), -1, 3) / 255, -1, 0)
    return np.stack([red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)], axis=-1)


def average_chroma(frames: Frames) -> NDArray[np.float64]:
    """Return each frame's mean chroma, (B, 2), of frames (B, H, W, 3)."""
    return measure_chroma(frames).mean(1)


def point_at_hue(frames: Frames) -> NDArray[np.float64]:
    """Return the direction of each frame's most frequent hue, (B, 2) of length 1, of frames (B, H, W, 3).

    A pixel counts with its chroma; what is nearly grey has no hue.
    """
    chroma = measure_chroma(frames)
    size = np.hypot(chroma[..., 0], chroma[..., 1])
    bins = (np.arctan2(chroma[..., 1], chroma[..., 0]) / (2 * np.pi) % 1 * HUE_BINS).astype(int) % HUE_BINS
    places = np.arange(len(frames))[:, None] * HUE_BINS + bins
    weights = np.where(size > LEAST_CHROMA, size, 0)
    histogram = np.bincount(places.ravel(), weights.ravel(), len(frames) * HUE_BINS).reshape(len(frames), -1)
    hue = 2 * np.pi * (histogram.argmax(1) + 0.5) / HUE_BINS
    return np.stack([np.cos(hue), np.sin(hue)], axis=-1)
