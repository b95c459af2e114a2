"""Selection, resizing and cropping of the frames that the model sees: the same code in training and on a device.

Deviation: of a segment the reference takes any frame in training; here one of a few evenly spaced ones, which the
frame cache holds.

Frames are uint8 RGB arrays (T, H, W, 3) until `MEAN` and `STD` normalise them next to the model.
"""

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

MEAN = (0.485, 0.456, 0.406)  # ImageNet's mean and standard deviation, as in the reference
STD = (0.229, 0.224, 0.225)
MAX_RATIO = 4  # maximum ratio of a frame's sides; the rest is cut off on both sides
CANDIDATES = 3  # default frames kept per segment of a clip: training uses any of them, evaluation the middle one


def choose_candidates(count: int, num_frames: int, candidates: int = CANDIDATES) -> list[int]:
    """Return the indices of the frames to keep of `count`: `candidates` evenly spaced ones in each of T equal segments.

    A clip with fewer frames repeats some; one with fewer than T frames repeats its last.
    """
    parts = num_frames * candidates
    return [min(int((part + 0.5) * count / parts), count - 1) for part in range(parts)]


def choose_middle_candidates(num_frames: int, candidates: int = CANDIDATES) -> list[int]:
    """Return the candidates that evaluation uses: the middle of every segment; with an even number, the later one."""
    return [segment * candidates + candidates // 2 for segment in range(num_frames)]


def compute_shorter_side(image_size: int) -> int:
    """Return the pixels to which a frame's shorter side is resized before the crop: 268 for 224, proportionally."""
    return round(image_size * 268 / 224)


def resize(frame: av.VideoFrame, side: int, reformatter: VideoReformatter) -> Frames:
    """Resize a frame such that its shorter side has `side` pixels (bilinear); return it as RGB (H, W, 3).

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
    """Return the middle part of a frame, `MAX_RATIO` times as long as it is wide."""
    pixels = frame.to_ndarray(format="rgb24")
    limit = MAX_RATIO * min(pixels.shape[:2])
    top, left = (max(0, length - limit) // 2 for length in pixels.shape[:2])
    part = pixels[top : top + limit, left : left + limit]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(part, dtype=np.uint8), format="rgb24")


def choose_crop_corner(
    height: int, width: int, image_size: int, generator: np.random.Generator | None = None
) -> tuple[int, int]:
    """Return top and left of the square to crop: the centre, or with a generator a random position."""
    spare = height - image_size, width - image_size
    if generator is None:
        return spare[0] // 2, spare[1] // 2
    return int(generator.integers(spare[0] + 1)), int(generator.integers(spare[1] + 1))


def crop(frames: Frames, image_size: int, generator: np.random.Generator | None = None) -> Frames:
    """Crop all frames to the same square, see `choose_crop_corner`: (T, H, W, 3) -> (T, S, S, 3)."""
    top, left = choose_crop_corner(frames.shape[1], frames.shape[2], image_size, generator)
    return frames[:, top : top + image_size, left : left + image_size]
