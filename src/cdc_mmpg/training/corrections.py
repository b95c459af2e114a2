"""Hand-made baselines: a device estimates its cast from pixels; its frames are rotated back before the encoder."""

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

CLIPS_AT_ONCE = 64  # clips whose frames are read together
HUE_BINS = 72  # bins of a hue histogram: 5 degrees each
MIN_CHROMA = 0.05  # of a pixel whose hue counts; pure colours have 1


class CorrectedDataModule(FeatureDataModule):
    """Features of a frozen encoder, with all hues of a device rotated back by the cast that is estimated for it.

    A device estimates its cast once, from the n unlabelled clips that a session of n would average, and corrects all of
    its clips. The test split has the features of several n, (N, C, T, 192), the other splits those of the first n.

    Args:
        data, encoder, head: see `FeatureDataModule`.
        correction: source of the cast: "grey_world" (Buchsbaum 1980, "A spatial processor model for object colour
            perception"), the direction of the mean chroma; "hue_mode", that of the most frequent hue; "true_cast".
    """

    def __init__(self, data: VideoTextData, encoder: AllInOne, head: Head, correction: Correction) -> None:
        super().__init__(data, encoder, head)
        self.correction = correction

    def setup(self, stage: str) -> None:
        """Estimate the casts, then load or compute the features; see `read_sessions` for the exceptions."""
        if self._splits:
            return
        self.data.setup(stage)
        sessions = read_sessions(self.data, casts=self.correction == "true_cast")
        estimates = self.estimate(sessions)
        for split in SPLITS:
            devices, by_case = sessions.devices[split], []
            for casts in estimates if split == "test" else estimates[:1]:
                rotated = self.data.rotate(self.data.dataset(split, augment=False), (-casts[devices]).tolist())
                by_case.append(self.features(split, *rotated)["frame_features"])
            self._splits[split] = self.build_view(split, {"frame_features": torch.stack(by_case, dim=1)})

    def estimate(self, sessions: Sessions) -> NDArray[np.float64]:
        """Return every device's cast in degrees, (C, D), one row for each case; 0 for a device without clips."""
        if self.correction == "true_cast":
            return np.array([sessions.casts])
        directions = np.concatenate([
            point_at_hue(frames) if self.correction == "hue_mode" else average_chroma(frames)
            for frames in self._middle_frames(sessions)
        ])  # fmt: skip
        cases = [case for case in CORRECTION_CASES.values() if sessions.alike or not case.alike]
        casts, drawn = np.zeros((len(cases), len(sessions.pools))), shuffle_pools(sessions, self.seed)
        for row, case in enumerate(cases):
            for device in range(len(drawn)):
                across, up = directions[choose_clips(sessions, drawn, device, case)].sum(0)
                casts[row, device] = np.degrees(np.arctan2(up, across))
        return casts

    def _middle_frames(self, sessions: Sessions) -> Iterator[Frames]:
        """Yield the middle frames of the clips, as for anchors, (B, H, W, 3); every process reads them all."""
        clips: Any = sessions.anchors
        for indices in np.array_split(np.arange(len(clips)), 1 + len(clips) // CLIPS_AT_ONCE):
            frames = clips.__getitems__([(0, index) for index in indices.tolist()]).frames
            yield frames[:, frames.shape[1] // 2].numpy()


def measure_chroma(frames: Frames) -> NDArray[np.float64]:
    """Return every pixel's chroma vector, (B, H W, 2), of frames (B, H, W, 3).

    Its direction is the hue, red at 0 degrees and green at 120. Grey is the origin; pure colours have a length near 1.
    """
    red, green, blue = np.moveaxis(frames.reshape(len(frames), -1, 3) / 255, -1, 0)
    return np.stack([red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)], axis=-1)


def average_chroma(frames: Frames) -> NDArray[np.float64]:
    """Return each frame's mean chroma, (B, 2), of frames (B, H, W, 3)."""
    return measure_chroma(frames).mean(1)


def point_at_hue(frames: Frames) -> NDArray[np.float64]:
    """Return the direction of each frame's most frequent hue, (B, 2) of length 1, of frames (B, H, W, 3).

    Pixels are weighted by their chroma; nearly grey pixels are ignored.
    """
    chroma = measure_chroma(frames)
    size = np.hypot(chroma[..., 0], chroma[..., 1])
    bins = (np.arctan2(chroma[..., 1], chroma[..., 0]) / (2 * np.pi) % 1 * HUE_BINS).astype(int) % HUE_BINS
    places = np.arange(len(frames))[:, None] * HUE_BINS + bins
    weights = np.where(size > MIN_CHROMA, size, 0)
    histogram = np.bincount(places.ravel(), weights.ravel(), len(frames) * HUE_BINS).reshape(len(frames), -1)
    hue = 2 * np.pi * (histogram.argmax(1) + 0.5) / HUE_BINS
    return np.stack([np.cos(hue), np.sin(hue)], axis=-1)
