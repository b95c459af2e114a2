"""Decoding: the exact frames of a clip, whatever its header says.

Every clip is decoded from its start, so that frame k is the k-th frame that comes out: seeking by the average rate
picks wrong frames where the rate varies, and headers count frames that do not decode. Of several video streams the
one that FFmpeg holds best is taken; rotation is applied; what an edit list hides is left out.

Both decoders give the same frames of a file (their colours differ by rounding, most at sharp edges), or decord refuses
it: with frames missing it repeats the last one in silence, and of two video streams it may take the other.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from cdc_mmpg.errors import DataError
from cdc_mmpg.frames import Frames, resize, shorter_side

Decoder = Literal["pyav", "decord"]

LEAST_TOLERANCE = 1e-9  # of a clip's frames that decord may make up; 0 and less is any number of them


def read_frames(
    path: Path,
    choose: Callable[[int], Sequence[int]],
    image_size: int,
    decoder: Decoder = "pyav",
    side: int | None = None,
) -> Frames:
    """Frames of a clip, resized: (K, H, W, 3) uint8 RGB.

    Args:
        path: the clip.
        choose: from the number of frames in the clip (at least 1) to the K indices wanted, in ascending order.
        image_size: pixels of a side of what the model sees.
        side: pixels to which the shorter side of a frame is resized; None is `shorter_side(image_size)`.
        decoder: "pyav", or "decord", which cannot read GIF or AV1 but is faster on some files.

    Raises:
        DataError: absent, empty, no video in it, or not decodable; it names the other decoder, which is never
            taken in silence. Of decord also: several video streams, or fewer frames than there are.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such clip")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: an empty file; fetch the clip again")
    decode = _decode_pyav if decoder == "pyav" else _decode_decord
    side, reformatter = side or shorter_side(image_size), VideoReformatter()
    try:
        expected = _packets(path, decoder)
        while True:  # once, and once more where some packets are no frames
            wanted = set(choose(expected)) if expected else set()
            kept, count = {}, 0
            for frame in decode(path):
                if count in wanted:
                    kept[count] = np.rot90(resize(frame, side, reformatter), k=round(frame.rotation / 90) % 4)
                count += 1
            if count == 0:
                raise ValueError("no frame in it can be decoded")
            if count == expected:
                return _stack(path, [kept[index] for index in choose(count)])
            if decoder == "decord":  # the missing ones may be any
                raise ValueError(f"{count} of {expected} frames come out")
            expected = count
    except DataError:
        raise
    except (av.FFmpegError, OSError, RuntimeError, ValueError, IndexError) as error:
        other = "decord" if decoder == "pyav" else "pyav"
        raise DataError(
            f"{path}: {decoder} cannot decode it ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
            f"fetch the clip again, or try --data.init_args.decoder={other}"
        ) from error


def _packets(path: Path, decoder: Decoder) -> int:
    """Packets of the video stream that are not hidden by an edit list: as a rule, its frames.

    Raises:
        DataError, ValueError: no video, or nothing that decord decodes as PyAV does.
    """
    with av.open(str(path)) as container:
        if (stream := container.streams.best("video")) is None:
            raise DataError(f"{path}: no video in it, only {[s.type for s in container.streams] or 'nothing'}")
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if decoder == "decord" and len(moving) > 1:
            raise DataError(
                f"{path}: {len(moving)} video streams, of which decord may take another than PyAV does: "
                "use --data.init_args.decoder=pyav"
            )
        shown, first = 0, True
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if decoder == "decord" and first and (packet.pts is None or not packet.is_keyframe):
                raise ValueError("it does not begin with a whole picture")  # decord would, on stderr and with gaps
            shown, first = shown + (not packet.is_discard), False
        return shown


def _decode_pyav(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("a codec that FFmpeg does not know")
        stream.codec_context.thread_type = "AUTO"
        yield from container.decode(stream)  # type: ignore[misc]  # of a video stream, video frames


def _decord() -> Any:
    try:
        import decord  # noqa: PLC0415  no wheels for every platform
    except ImportError as error:
        raise DataError(
            "decord is not installed here (it has no wheels for this platform): use decoder pyav"
        ) from error
    decord.logging.set_level(decord.logging.QUIET)  # its FFmpeg writes to stderr; errors are raised, too
    return decord


def _decode_decord(path: Path) -> Iterator[av.VideoFrame]:
    """One frame after the other, up to the first that decord makes up: its seeking misses frames of some streams."""
    decord = _decord()
    try:
        reader = decord.VideoReader(str(path), fault_tol=LEAST_TOLERANCE)
        while True:
            yield av.VideoFrame.from_ndarray(reader.next().asnumpy(), format="rgb24")
    except (StopIteration, decord.DECORDLimitReachedError):
        return
    except decord.DECORDError as error:  # of no common family
        raise ValueError(str(error)) from error


def _stack(path: Path, frames: list[Frames]) -> Frames:
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path}: the picture changes its shape within the clip: {sorted({f.shape for f in frames})}")
    return np.stack(frames)
