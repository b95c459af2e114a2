"""Which frames of a clip the model sees, and in which form: the same code in training and on a device.

Deviation: of a segment the reference takes any frame in training; here one of a few evenly spaced ones, which the
frame cache holds.

Frames travel as uint8 (T, H, W, 3) arrays, RGB, until `MEAN` and `STD` normalise them beside the model.
"""

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as the reference's
STD = (0.229, 0.224, 0.225)
MAX_RATIO = 4  # of a frame's longer side to its shorter one; what is beyond it on either side is left out
CANDIDATES = (
    3  # frames kept of each segment of a clip, unless told: training takes any of them, evaluation the middle one
)


def candidate_indices(count: int, num_frames: int, candidates: int = CANDIDATES) -> list[int]:
    """Indices of the frames to keep of a clip of `count`: `candidates` evenly spaced ones in each of T equal segments.

    A clip with fewer frames than that repeats some; one with fewer than T repeats its last.
    """
    parts = num_frames * candidates
    return [min(int((part + 0.5) * count / parts), count - 1) for part in range(parts)]


def middle_candidates(num_frames: int, candidates: int = CANDIDATES) -> list[int]:
    """Which of the candidates evaluation takes: the middle of every segment; of an even number, the one right of it."""
    return [segment * candidates + candidates // 2 for segment in range(num_frames)]


def shorter_side(image_size: int) -> int:
    """Pixels to which a frame's shorter side is resized before the crop: 268 for 224, and in proportion."""
    return round(image_size * 268 / 224)


def resize(frame: av.VideoFrame, side: int, reformatter: VideoReformatter) -> Frames:
    """Return one frame, its shorter side resized to `side` pixels (bilinear), as RGB (H, W, 3).

    Deviation: of a frame that is more than `MAX_RATIO` times as long as it is wide only the middle part is kept, so
    that a small file cannot ask for gigabytes. Evaluation, which sees the middle square, sees the same.

    A clip's frames share a reformatter: setting one up costs more than a small frame.
    """
    if max(frame.width, frame.height) > MAX_RATIO * min(frame.width, frame.height):
        frame = _middle_part(frame)
    scale = side / min(frame.width, frame.height)
    width, height = max(side, round(frame.width * scale)), max(side, round(frame.height * scale))
    resized = reformatter.reformat(frame, width, height, format="rgb24", interpolation="BILINEAR")
    return resized.to_ndarray().astype(np.uint8, copy=False)


def _middle_part(frame: av.VideoFrame) -> av.VideoFrame:
    """Return the middle of a frame, `MAX_RATIO` times as long as it is wide."""
    pixels = frame.to_ndarray(format="rgb24")
    limit = MAX_RATIO * min(pixels.shape[:2])
    top, left = (max(0, length - limit) // 2 for length in pixels.shape[:2])
    part = pixels[top : top + limit, left : left + limit]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(part, dtype=np.uint8), format="rgb24")


def crop_place(
    height: int, width: int, image_size: int, generator: np.random.Generator | None = None
) -> tuple[int, int]:
    """Return row and column where the square begins that a frame is cropped to: the centre's, or drawn ones."""
    spare = height - image_size, width - image_size
    if generator is None:
        return spare[0] // 2, spare[1] // 2
    return int(generator.integers(spare[0] + 1)), int(generator.integers(spare[1] + 1))


def crop(frames: Frames, image_size: int, generator: np.random.Generator | None = None) -> Frames:
    """The same square of all frames, see `crop_place`. (T, H, W, 3) -> (T, S, S, 3)."""
    top, left = crop_place(frames.shape[1], frames.shape[2], image_size, generator)
    return frames[:, top : top + image_size, left : left + image_size]
