"""Decoding: the exact frames of a clip, whatever its header says.

Every clip is decoded from its start, so that frame k is the k-th frame that comes out: seeking by the average rate
picks wrong frames where the rate varies, and headers count frames that do not decode. Of several video streams the
one that FFmpeg holds best is taken; rotation is applied; what an edit list hides is left out.

Only containers that hold their own pictures are opened (`CONTAINERS`), whatever a file's name ends in: a playlist or a
script would show another file's frames under this clip's name and digest. Cover pictures are no clip, and neither is a
single still beside sound; a single frame without sound is one.

Both decoders give the same frames of a file (their colours differ by rounding, most at sharp edges), or decord refuses
it: with frames missing it repeats the last one in silence, and of two video streams it may take the other.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from cdc_mmpg.errors import DataError
from cdc_mmpg.media.frames import Frames, resize, shorter_side

Decoder = Literal["pyav", "decord"]

# FFmpeg's names of the containers that are read: AVI, MP4 and its relatives, Matroska and WebM, GIF, MPEG program and
# transport streams, Windows Media, Flash video, Ogg. None of them leads to other files, which is what HLS and DASH
# playlists, concat scripts, image sequences and network descriptions are for.
CONTAINERS = ("avi", "mov", "matroska", "gif", "mpeg", "mpegts", "asf", "flv", "ogg")
OPEN_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file", "enable_drefs": "0"}
COVER = Disposition.attached_pic | Disposition.timed_thumbnails  # of streams that only illustrate

MAX_PIXELS = 8192 * 8192  # of a frame: 200 MB as RGB
LEAST_TOLERANCE = 1e-9  # of a clip's frames that decord may make up; 0 and less is any number of them


def read_frames(
    path: Path,
    choose: Callable[[int], Sequence[int]],
    image_size: int,
    decoder: Decoder = "pyav",
    side: int | None = None,
) -> Frames:
    """Return frames of a clip, resized: (K, H, W, 3) uint8 RGB.

    Args:
        path: the clip.
        choose: from the number of frames in the clip (at least 1) to the K indices wanted, in ascending order.
        image_size: pixels of a side of what the model sees.
        side: pixels to which the shorter side of a frame is resized; None is `shorter_side(image_size)`.
        decoder: "pyav", or "decord", which cannot read GIF or AV1 but is faster on some files.

    Raises:
        DataError: absent, empty, no video in it, or not decodable. Where decord fails on what PyAV reads, the message
            says so; PyAV is never taken in silence. Of decord also: several video streams, or fewer frames than there
            are.
    """
    _check_file(path)
    side = side or shorter_side(image_size)
    try:
        return _read(path, choose, decoder, side)
    except DataError:
        raise
    except (av.FFmpegError, OSError, RuntimeError, ValueError, IndexError) as error:
        remedy = "fetch the clip again"
        if decoder == "decord" and _is_readable(path, choose, side):
            remedy = "PyAV reads it: use --data.init_args.decoder=pyav"
        raise DataError(
            f"{path}: {decoder} cannot decode it ({type(error).__name__}: {str(error).partition(chr(10))[0]}); {remedy}"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse what is not a file with content.

    Raises:
        DataError: it is absent, empty, no regular file, or its name cannot be looked up.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such clip")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: an empty file; fetch the clip again")
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error


def _read(path: Path, choose: Callable[[int], Sequence[int]], decoder: Decoder, side: int) -> Frames:
    """Decode a clip; see `read_frames`. Errors of the decoders pass through."""
    reformatter = VideoReformatter()
    expected, sound = _count_packets(path, decoder)
    while True:  # once, and once more where some packets are no frames
        wanted = set(choose(expected)) if expected else set()
        kept, count = {}, 0
        for item in _decode_pyav(path) if decoder == "pyav" else _decode_decord(path, side):
            if count in wanted:
                frame = item if decoder == "pyav" else _from_decord(item)
                kept[count] = np.rot90(resize(frame, side, reformatter), k=round(frame.rotation / 90) % 4)
            count += 1
        if count == 0:
            raise ValueError("no frame in it can be decoded")
        if count == 1 and sound:
            raise DataError(f"{path}: no video in it, only sound and one still picture")
        if count == expected:
            return _stack(path, [kept[index] for index in choose(count)])
        if decoder == "decord":  # the missing ones may be any
            raise ValueError(f"{count} of {expected} frames come out")
        expected = count


def _is_readable(path: Path, choose: Callable[[int], Sequence[int]], side: int) -> bool:
    """Return whether PyAV reads a clip."""
    try:
        return len(_read(path, choose, "pyav", side)) > 0
    except (DataError, av.FFmpegError, OSError, RuntimeError, ValueError, IndexError):
        return False


def _open(path: Path) -> InputContainer:
    """Open a clip as a file, whatever its name looks like, if it is one of `CONTAINERS`.

    Raises:
        ValueError: it is another kind of file.
        av.FFmpegError: it cannot be read.
    """
    try:
        # An absolute path, since FFmpeg takes what stands before a colon for a protocol ("12:30.mp4"). Titles and other
        # texts in the file may be in any encoding.
        return av.open(str(path.absolute()), options=dict(OPEN_OPTIONS), metadata_errors="replace")
    except av.error.ArgumentError as error:
        raise ValueError(f"no container that holds its own pictures: {', '.join(CONTAINERS)}") from error


def _choose_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the video stream to read: FFmpeg's choice among those that are more than a cover.

    Raises:
        DataError: there is none, or its frames are larger than `MAX_PIXELS`.
    """
    moving = [stream for stream in container.streams.video if not stream.disposition & COVER]
    if not moving:
        kinds = sorted({"cover picture" if stream.type == "video" else stream.type for stream in container.streams})
        raise DataError(f"{path}: no video in it, only {kinds or 'nothing'}")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    assert isinstance(stream, VideoStream)
    if (size := stream.codec_context) is not None and size.width * size.height > MAX_PIXELS:
        raise DataError(f"{path}: frames of {size.width} x {size.height} pixels, more than {MAX_PIXELS:,} in all")
    return stream


def _count_packets(path: Path, decoder: Decoder) -> tuple[int, bool]:
    """Return the number of packets of the video stream that no edit list hides, and whether there is sound beside it.

    Packets are, as a rule, frames.

    Raises:
        DataError, ValueError: no video, or nothing that decord decodes as PyAV does.
    """
    with _open(path) as container:
        stream = _choose_stream(path, container)
        moving = [other for other in container.streams.video if not other.disposition & COVER]
        if decoder == "decord" and len(moving) > 1:
            raise ValueError(f"{len(moving)} video streams, of which decord may take another than PyAV does")
        shown, first = 0, True
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if decoder == "decord" and first and (packet.pts is None or not packet.is_keyframe):
                raise ValueError("it does not begin with a whole picture")  # decord would, on stderr and with gaps
            shown, first = shown + (not packet.is_discard), False
        return shown, bool(container.streams.audio)


def _decode_pyav(path: Path) -> Iterator[av.VideoFrame]:
    with _open(path) as container:
        stream = _choose_stream(path, container)
        if stream.codec_context is None:
            raise ValueError("a codec that FFmpeg does not know")
        stream.codec_context.thread_type = "AUTO"
        yield from container.decode(stream)


def _decord() -> Any:
    try:
        import decord  # noqa: PLC0415  no wheels for every platform
    except ImportError as error:
        raise DataError(
            "decord is not installed here (it has no wheels for this platform): use decoder pyav"
        ) from error
    decord.logging.set_level(decord.logging.QUIET)  # its FFmpeg writes to stderr; errors are raised, too
    return decord


def _decode_decord(path: Path, side: int) -> Iterator[Any]:
    """Yield one frame after the other, up to the first that decord makes up: its seeking misses frames of some streams.

    Frames with a shorter side of more than `side` come with that side: decord decodes ahead of its reader, and keeps
    all frames that are not yet read.
    """
    decord = _decord()
    try:
        reader = decord.VideoReader(str(path.absolute()), **_reduced_size(path, side), fault_tol=LEAST_TOLERANCE)
        while True:
            yield reader.next()
    except (StopIteration, decord.DECORDLimitReachedError):
        return
    except decord.DECORDError as error:  # of no common family
        raise ValueError(str(error)) from error


def _reduced_size(path: Path, side: int) -> dict[str, int]:
    """Return decord's arguments for a clip with large frames: the width and height to decode to, after rotation."""
    frame = next(_decode_pyav(path))
    width, height = frame.width, frame.height
    if round(frame.rotation / 90) % 2:
        width, height = height, width
    scale = side / min(width, height)
    return {"width": round(width * scale), "height": round(height * scale)} if scale < 1 else {}


def _from_decord(frame: Any) -> av.VideoFrame:
    """Convert a frame of decord's.

    Raises:
        ValueError: it is damaged, as decord makes very narrow frames.
    """
    pixels = frame.asnumpy()
    if pixels.shape[-1] != 3:
        raise ValueError(f"frames of {pixels.shape[1]} x {pixels.shape[0]} pixels are too narrow for it")
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def _stack(path: Path, frames: list[Frames]) -> Frames:
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path}: the picture changes its shape within the clip: {sorted({f.shape for f in frames})}")
    return np.stack(frames)
