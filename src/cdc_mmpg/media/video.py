"""Exact decoding of the frames of a clip, even if its header is wrong.

Every clip is decoded from its start, so that frame k is the k-th decoded frame: seeking by the average rate gives wrong
frames if the rate varies, and headers count frames that do not decode. Among several video streams, the one that FFmpeg
ranks best is used; rotation is applied; frames that an edit list hides are left out.

Only containers that hold their own pictures are opened (`CONTAINERS`), regardless of the file's suffix: a playlist or a
script would give another file's frames under this clip's name and digest. Cover pictures do not count as a clip, nor
does a single still with sound; a single frame without sound does.

Both decoders give the same frames of a file (their colours differ by rounding, most at sharp edges), or decord refuses
it: it silently repeats the last frame if frames are missing, and of two video streams it may use the other.
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
from cdc_mmpg.media.frames import Frames, compute_shorter_side, resize

Decoder = Literal["pyav", "decord"]

# FFmpeg's names of the supported containers: AVI, MP4 and its relatives, Matroska and WebM, GIF, MPEG program and
# transport streams, Windows Media, Flash video, Ogg. None of them refers to other files, unlike HLS and DASH playlists,
# concat scripts, image sequences and network descriptions.
CONTAINERS = ("avi", "mov", "matroska", "gif", "mpeg", "mpegts", "asf", "flv", "ogg")
OPEN_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file", "enable_drefs": "0"}
COVER_DISPOSITIONS = Disposition.attached_pic | Disposition.timed_thumbnails  # streams of still illustrations

MAX_PIXELS = 8192 * 8192  # maximum pixels of a frame: 200 MB as RGB
DECORD_FAULT_TOLERANCE = 1e-9  # share of a clip's frames that decord may invent; 0 and less means no limit


def read_frames(
    path: Path,
    choose: Callable[[int], Sequence[int]],
    image_size: int,
    decoder: Decoder = "pyav",
    side: int | None = None,
) -> Frames:
    """Read frames of a clip, resized: (K, H, W, 3) uint8 RGB.

    Args:
        path: path of the clip.
        choose: function from the number of frames in the clip (at least 1) to the K requested indices, ascending.
        image_size: side of the square that the model sees, in pixels.
        decoder: "pyav", or "decord", which is faster on some files; decord 0.6 cannot read GIF or AV1, decord 2 can.
        side: pixels to which the shorter side of a frame is resized; None is `compute_shorter_side(image_size)`.

    Raises:
        DataError: the clip is absent, empty, without video, or cannot be decoded. If only decord fails, the message
            says so; PyAV is never substituted silently. With decord also: several video streams, or missing frames.
    """
    _check_file(path)
    side = side or compute_shorter_side(image_size)
    try:
        return _read(path, choose, decoder, side)
    except DataError:
        raise
    except (av.FFmpegError, OSError, RuntimeError, ValueError, IndexError) as error:
        remedy = "fetch the clip again"
        if decoder == "decord" and _is_readable(path, choose, side):
            remedy = "PyAV reads it: use ARGS=--data.init_args.decoder=pyav"
        raise DataError(
            f"{path}: {decoder} cannot decode it ({type(error).__name__}: {str(error).partition(chr(10))[0]}); {remedy}"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse a path that is not a file with content.

    Raises:
        DataError: it is absent, empty, not a regular file, or cannot be looked up.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such clip")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: an empty file; fetch the clip again")
    except OSError as error:  # a name that is too long, a folder without read permission
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error


def _read(path: Path, choose: Callable[[int], Sequence[int]], decoder: Decoder, side: int) -> Frames:
    """Decode a clip; see `read_frames`. Errors of the decoders are passed on."""
    reformatter = VideoReformatter()
    expected, has_sound = _count_packets(path, decoder)
    while True:  # a second time if some packets are not frames
        wanted = set(choose(expected)) if expected else set()
        kept, count = {}, 0
        for item in _decode_pyav(path) if decoder == "pyav" else _decode_decord(path, side):
            if count in wanted:
                frame = item if decoder == "pyav" else _convert_decord_frame(item)
                kept[count] = np.rot90(resize(frame, side, reformatter), k=round(frame.rotation / 90) % 4)
            count += 1
        if count == 0:
            raise ValueError("none of its frames can be decoded")
        if count == 1 and has_sound:
            raise DataError(f"{path}: no video in it, only sound and one still picture")
        if count == expected:
            return _stack(path, [kept[index] for index in choose(count)])
        if decoder == "decord":  # the position of the missing frames is unknown
            raise ValueError(f"only {count} of {expected} frames are decoded")
        expected = count


def _is_readable(path: Path, choose: Callable[[int], Sequence[int]], side: int) -> bool:
    """Return whether PyAV can read a clip."""
    try:
        return len(_read(path, choose, "pyav", side)) > 0
    except (DataError, av.FFmpegError, OSError, RuntimeError, ValueError, IndexError):
        return False


def _open(path: Path) -> InputContainer:
    """Open a clip as one of `CONTAINERS`, regardless of its name.

    Raises:
        ValueError: it is another kind of file.
        av.FFmpegError: it cannot be read.
    """
    try:
        # An absolute path, because FFmpeg reads the part before a colon as a protocol ("12:30.mp4"). Titles and other
        # texts in the file may be in any encoding.
        return av.open(str(path.absolute()), options=dict(OPEN_OPTIONS), metadata_errors="replace")
    except av.error.ArgumentError as error:
        raise ValueError(f"not a supported container ({', '.join(CONTAINERS)})") from error


def _choose_stream(path: Path, container: InputContainer) -> VideoStream:
    """Choose the video stream to read: FFmpeg's best stream unless it is a cover picture.

    Raises:
        DataError: there is no such stream, or its frames are larger than `MAX_PIXELS`.
    """
    moving = [stream for stream in container.streams.video if not stream.disposition & COVER_DISPOSITIONS]
    if not moving:
        kinds = sorted({"cover picture" if stream.type == "video" else stream.type for stream in container.streams})
        raise DataError(f"{path}: no video in it, only {kinds or 'nothing'}")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    assert isinstance(stream, VideoStream)
    if (size := stream.codec_context) is not None and size.width * size.height > MAX_PIXELS:
        raise DataError(f"{path}: frames of {size.width} x {size.height} pixels, more than {MAX_PIXELS:,} in total")
    return stream


def _count_packets(path: Path, decoder: Decoder) -> tuple[int, bool]:
    """Count the packets of the video stream that no edit list hides; return also whether the file has sound.

    Packets are usually frames.

    Raises:
        DataError: there is no video.
        ValueError: decord would not decode the same frames as PyAV.
    """
    with _open(path) as container:
        stream = _choose_stream(path, container)
        moving = [other for other in container.streams.video if not other.disposition & COVER_DISPOSITIONS]
        if decoder == "decord" and len(moving) > 1:
            raise ValueError(f"{len(moving)} video streams, of which decord may use another than PyAV")
        shown, first = 0, True
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if decoder == "decord" and first and (packet.pts is None or not packet.is_keyframe):
                raise ValueError("it does not begin with a keyframe")  # decord would leave gaps and write to stderr
            shown, first = shown + (not packet.is_discard), False
        return shown, bool(container.streams.audio)


def _decode_pyav(path: Path) -> Iterator[av.VideoFrame]:
    """Yield all frames of a clip."""
    with _open(path) as container:
        stream = _choose_stream(path, container)
        if stream.codec_context is None:
            raise ValueError("FFmpeg does not know its codec")
        stream.codec_context.thread_type = "AUTO"
        yield from container.decode(stream)


NO_DECORD = (
    "decord is not installed (the packages decord and decord2 provide it; some platforms have wheels of neither): "
    "use ARGS=--data.init_args.decoder=pyav"
)


def _import_decord() -> Any:
    """Import decord, of the package decord or decord2, and silence its log.

    Raises:
        DataError: neither is installed.
    """
    try:
        import decord  # noqa: PLC0415  optional: it lacks wheels for some platforms
    except ImportError as error:
        raise DataError(NO_DECORD) from error
    decord.logging.set_level(decord.logging.QUIET)  # its FFmpeg writes to stderr what is also raised
    return decord


def _decode_decord(path: Path, side: int) -> Iterator[Any]:
    """Yield frames sequentially, up to the first that decord invents; its seeking misses frames of some streams.

    Frames whose shorter side is longer than `side` are decoded to that side: decord decodes ahead and holds all frames
    that are not read yet.
    """
    decord = _import_decord()
    try:
        size = _compute_reduced_size(path, side)
        reader = decord.VideoReader(str(path.absolute()), **size, fault_tol=DECORD_FAULT_TOLERANCE)
        while True:
            yield reader.next()
    except (StopIteration, decord.DECORDLimitReachedError):
        return
    except decord.DECORDError as error:  # it derives directly from Exception
        raise ValueError(str(error)) from error


def _compute_reduced_size(path: Path, side: int) -> dict[str, int]:
    """Return decord's arguments `width` and `height` (after rotation) for large frames; empty for small ones."""
    frame = next(_decode_pyav(path))
    width, height = frame.width, frame.height
    if round(frame.rotation / 90) % 2:
        width, height = height, width
    scale = side / min(width, height)
    return {"width": round(width * scale), "height": round(height * scale)} if scale < 1 else {}


def _convert_decord_frame(frame: Any) -> av.VideoFrame:
    """Convert a frame of decord.

    Raises:
        ValueError: the frame is damaged, as decord's very narrow frames are.
    """
    pixels = frame.asnumpy()
    if pixels.shape[-1] != 3:
        raise ValueError(f"frames of {pixels.shape[1]} x {pixels.shape[0]} pixels are too narrow for decord")
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def _stack(path: Path, frames: list[Frames]) -> Frames:
    """Stack the frames of a clip; refuse frames of different shapes."""
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path}: the frames of the clip differ in shape: {sorted({f.shape for f in frames})}")
    return np.stack(frames)
