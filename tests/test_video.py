"""Video decoding with PyAV and decord: exact frames, sizes and crops, and named errors for invalid files."""

from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from cdc_mmpg.errors import DataError
from cdc_mmpg.media import video
from cdc_mmpg.media.frames import (
    MAX_RATIO,
    choose_candidates,
    choose_middle_candidates,
    compute_shorter_side,
    crop,
    resize,
)
from cdc_mmpg.media.video import Decoder, read_frames
from conftest import write_clip


def read_frame_numbers(path: Path, indices: list[int], decoder: Decoder = "pyav") -> list[int]:
    """Return the numbers of the decoded frames, computed from their gray level."""
    frames = read_frames(path, lambda count: indices, 32, decoder)
    return [round((float(frame.mean()) - 4) / 6) for frame in frames]


@pytest.fixture(params=["pyav", "decord"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Decoder: PyAV, and decord if it is installed."""
    return "pyav" if request.param == "pyav" else pytest.importorskip("decord").__name__


def write_timed(
    path: Path, times: Sequence[int], container_options: dict[str, str] | None = None, **options: str
) -> Path:
    """Write an H.264 clip like those of `write_clip`, with frame k at `times[k]` tenths of a second."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 + 6 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_streams(path: Path, *sources: Path, skip: int = 0, cover: bool = False) -> Path:
    """Copy the video streams of `sources` from packet `skip` on, with a larger cover picture if `cover`."""
    with av.open(str(path), "w") as container, ExitStack() as stack:
        inputs = [stack.enter_context(av.open(str(source))) for source in sources]
        streams = [container.add_stream_from_template(source.streams.video[0]) for source in inputs]
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 640, 480, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame(640, 480, "yuvj420p")))
            container.mux(picture.encode(None))
        for source, stream in zip(inputs, streams, strict=True):
            for number, packet in enumerate(source.demux(source.streams.video[0])):
                if packet.dts is not None and number >= skip:
                    packet.stream = stream
                    container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("short.mp4", "libx264", {"g": "3", "crf": "10"}),
        ("long.mp4", "libx264", {"g": "250", "bf": "3", "crf": "10"}),
        ("open.mp4", "libx264", {"g": "12", "bf": "3", "crf": "10", "x264-params": "open-gop=1:b-adapt=0"}),
        ("modern.mkv", "libx264", {"g": "250", "bf": "3", "crf": "10"}),
        ("old.avi", "mpeg4", {}),
        ("older.avi", "mpeg4", {"bf": "2"}),
        ("ancient.mkv", "mpeg4", {"bf": "2"}),
        ("web.webm", "libvpx", {"b": "4M"}),
    ],
)
def test_exact_frames_are_decoded(tmp_path, name, codec, options, decoder):
    clip = write_clip(tmp_path / name, frames=40, codec=codec, **options)
    assert read_frame_numbers(clip, list(range(40)), decoder) == list(range(40))
    assert read_frame_numbers(clip, [0, 7, 20, 39], decoder) == [0, 7, 20, 39]


def test_exact_frames_of_a_gif_are_decoded(tmp_path):
    clip = write_clip(tmp_path / "moving.gif", frames=6, codec="gif")
    with av.open(str(clip)) as container:  # GIF's palette changes the gray levels: compare with PyAV itself
        expected = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    frames = read_frames(clip, lambda count: list(range(count)), 32)
    assert len(frames) == 6
    np.testing.assert_allclose([frame.mean() for frame in frames], expected, atol=2)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_exact_frames_at_a_variable_frame_rate_are_decoded(tmp_path, kind, decoder):
    clip = write_timed(tmp_path / f"vfr.{kind}", [0, 1, 2, 3, 90, 91, 300, 301, 302, 303])
    assert read_frame_numbers(clip, list(range(10)), decoder) == list(range(10))


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_clip_with_a_late_first_timestamp_is_decoded(tmp_path, kind, decoder):
    clip = write_timed(tmp_path / f"late.{kind}", range(50, 90), bf="2")
    assert read_frame_numbers(clip, list(range(40)), decoder) == list(range(40))


@pytest.mark.parametrize(("hidden", "options"), [(7, {"bf": "3"}), (15, {"g": "12", "bf": "3"}), (1, {"g": "3"})])
def test_frames_hidden_by_an_edit_list_are_left_out(tmp_path, hidden, options, decoder):
    """Unchecked, decord repeats the last frame instead."""
    muxer = {"avoid_negative_ts": "disabled"}
    clip = write_timed(tmp_path / "cut.mp4", range(-hidden, 40 - hidden), muxer, **options)
    assert read_frame_numbers(clip, list(range(40 - hidden)), decoder) == list(range(hidden, 40))


def test_cover_picture_is_ignored(tmp_path, decoder):
    source = write_clip(tmp_path / "whole.mp4", frames=40, codec="libx264", bf="3", crf="10")
    clip = copy_streams(tmp_path / "cover.mp4", source, cover=True)
    assert read_frame_numbers(clip, [0, 7, 39], decoder) == [0, 7, 39]


def expect_decord_refusal(clip: Path, reason: str) -> None:
    pytest.importorskip("decord")
    with pytest.raises(DataError, match=rf"{clip.name}: .*{reason}.*decoder=pyav"):
        read_frames(clip, lambda count: [0], 32, "decord")


def test_decord_refuses_two_video_streams(tmp_path):
    brief = write_clip(tmp_path / "brief.mp4", frames=9, codec="libx264", size=(32, 24))
    clip = copy_streams(tmp_path / "two.mp4", brief, write_clip(tmp_path / "long.mp4", frames=40, codec="libx264"))
    assert read_frame_numbers(clip, [0, 8]) == [0, 8]
    expect_decord_refusal(clip, "2 video streams")


def test_decord_refuses_a_clip_that_does_not_begin_with_a_keyframe(tmp_path, capfd):
    """Such clips are cut without decoding: the frames before the first keyframe are lost."""
    options = {"g": "12", "bf": "3", "crf": "10", "x264-params": "open-gop=1:b-adapt=0"}
    source = write_clip(tmp_path / "whole.mp4", frames=40, codec="libx264", **options)
    with av.open(str(source)) as container:
        second = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe][1]
    clip = copy_streams(tmp_path / "cut.mp4", source, skip=second - 2)
    counts = []
    read_frames(clip, lambda count: (counts.append(count), range(count))[1], 32)
    numbers = read_frame_numbers(clip, list(range(counts[-1])))
    assert numbers == list(range(40 - counts[-1], 40))
    assert 20 < counts[-1] < 40 - second + 2
    expect_decord_refusal(clip, "does not begin with a keyframe")
    assert capfd.readouterr().err == ""


def test_decord_refuses_clips_with_skipped_frames(tmp_path):
    """Decord skips the first group of a transport stream and repeats the last frame instead."""
    options = {"g": "12", "bf": "3", "crf": "10", "x264-params": "open-gop=1:b-adapt=0"}
    clip = write_clip(tmp_path / "broadcast.ts", frames=40, codec="libx264", **options)
    assert read_frame_numbers(clip, list(range(40))) == list(range(40))
    expect_decord_refusal(clip, r"\d+ of 40 frames are decoded")


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (9, [1, 4, 7]), (300, [50, 150, 250])]
)
def test_evaluation_takes_the_middle_of_every_segment(count, expected):
    candidates = choose_candidates(count, 3)
    assert [candidates[place] for place in choose_middle_candidates(3)] == expected
    assert candidates == sorted(candidates)
    assert max(candidates) < count


@pytest.mark.parametrize(
    ("candidates", "expected", "middle"),
    [(1, [30, 90], [0, 1]), (2, [15, 45, 75, 105], [1, 3]), (4, [7, 22, 37, 52, 67, 82, 97, 112], [2, 6])],
)
def test_candidates_with_other_numbers_per_segment(candidates, expected, middle):
    assert choose_candidates(120, 2, candidates) == expected
    assert choose_middle_candidates(2, candidates) == middle


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_repeat_frames(tmp_path, frames):
    clip = write_clip(tmp_path / "brief.mp4", frames=frames, codec="libx264")
    assert len(read_frames(clip, lambda count: choose_candidates(count, 3), 32)) == 9


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 50), (66, 50), (140, 40)])
def test_the_shorter_side_decides_the_size(tmp_path, size):
    clip = write_clip(tmp_path / "clip.mp4", frames=2, size=size, codec="libx264")
    frames = read_frames(clip, lambda count: [0], 32)
    assert min(frames.shape[1:3]) == compute_shorter_side(32) == 38
    assert (frames.shape[1] < frames.shape[2]) == (size[1] < size[0])
    longer = min(max(size), 4 * min(size))  # longer frames are cropped to their center
    assert max(frames.shape[1:3]) == round(longer * 38 / min(size))
    assert crop(frames, 32).shape == (1, 32, 32, 3)


def test_random_crops_stay_inside_and_are_the_same_for_all_frames():
    frames = np.arange(2 * 40 * 50 * 3).reshape(2, 40, 50, 3)
    corners = set()
    for seed in range(200):
        out = crop(frames, 32, np.random.default_rng(seed))
        assert out.shape == (2, 32, 32, 3)
        assert (out[1] - out[0] == 40 * 50 * 3).all()
        corners.add(int(out[0, 0, 0, 0]))
    assert len(corners) > 50


def test_crops_are_central_or_uniformly_random():
    coordinates = np.stack(np.meshgrid(np.arange(40), np.arange(50), indexing="ij"), -1)[
        None
    ]  # every pixel holds its coordinates
    assert crop(coordinates, 32)[0, 0, 0].tolist() == [4, 9]
    assert crop(coordinates, 32)[0, -1, -1].tolist() == [35, 40]
    corners = np.array([crop(coordinates, 32, np.random.default_rng(seed))[0, 0, 0] for seed in range(300)])
    assert sorted(set(corners[:, 0])) == list(range(9))
    assert sorted(set(corners[:, 1])) == list(range(19))
    assert crop(coordinates, 40, np.random.default_rng(0))[0, 0, 0, 0] == 0  # the crop has the full height


def test_shorter_side_at_the_papers_size():
    assert compute_shorter_side(224) == 268


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "cannot decode"),
        (b"\0" * 5000, "cannot decode"),
        (None, "no such clip"),
    ],
)
def test_files_that_are_not_clips_are_refused_by_name(tmp_path, content, reason, decoder):
    path = tmp_path / "fake.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"fake\.mp4.*{reason}") as error:
        read_frames(path, lambda count: [0], 32, decoder)
    assert "decoder=" not in str(error.value), "the other decoder cannot decode it either"
    if reason == "cannot decode":
        assert "fetch the clip again" in str(error.value)


def test_audio_alone_is_refused(tmp_path, decoder):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"song\.mp4: no video in it, only \['audio'\]"):
        read_frames(path, lambda count: [0], 32, decoder)


def write_song(path: Path, stills: int, cover: bool) -> Path:
    """Write an MP4 file with audio and `stills` pictures, as a cover or as a video stream."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        pictures = container.add_stream("mjpeg", rate=1)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuvj420p"
        if cover:
            pictures.disposition = Disposition.attached_pic
        for _ in range(stills):
            container.mux(pictures.encode(av.VideoFrame(64, 48, "yuvj420p")))
        container.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def test_audio_with_a_cover_picture_is_refused(tmp_path, decoder):
    song = write_song(tmp_path / "song.mp4", 1, cover=True)
    with pytest.raises(DataError, match=r"song\.mp4: no video in it, only \['audio', 'cover picture'\]"):
        read_frames(song, lambda count: [0], 32, decoder)


def test_audio_with_one_still_picture_is_refused(tmp_path, decoder):
    song = write_song(tmp_path / "song.mp4", 1, cover=False)
    with pytest.raises(DataError, match=r"song\.mp4: no video in it, only sound and one still picture"):
        read_frames(song, lambda count: [0], 32, decoder)
    assert len(read_frames(write_song(tmp_path / "film.mp4", 2, cover=False), lambda count: [0, 1], 32, decoder)) == 2


def test_single_frame_without_audio_is_a_clip(tmp_path, decoder):
    assert read_frame_numbers(write_clip(tmp_path / "brief.mp4", frames=1, codec="libx264"), [0], decoder) == [0]
    assert len(read_frames(write_clip(tmp_path / "still.gif", frames=1, codec="gif"), lambda count: [0], 32)) == 1


REFERENCES = {  # files that refer to another file, or a picture without a container
    "concat script": b"ffconcat version 1.0\nfile other.ts\n",
    "concat script without a version": b"file 'other.ts'\nfile 'other.ts'\n",
    "HLS playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4.0,\nother.ts\n#EXT-X-ENDLIST\n",
    "DASH manifest": b'<?xml version="1.0"?><MPD><Period><AdaptationSet mimeType="video/mp4"><Representation id="1">'
    b"<BaseURL>other.ts</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "session description": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "subtitles": b"1\n00:00:00,000 --> 00:00:02,000\nother.ts\n",
    "picture": None,
}


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_playlists_manifests_and_pictures_are_refused(kind, suffix, tmp_path, decoder):
    write_clip(tmp_path / "other.ts", codec="libx264")
    path = tmp_path / f"clip.{suffix}"
    if REFERENCES[kind] is None:
        with av.open(str(tmp_path / "picture.png"), "w") as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
            container.mux(stream.encode(av.VideoFrame(64, 48, "rgb24")))
        (tmp_path / "picture.png").rename(path)
    else:
        path.write_bytes(REFERENCES[kind])
    with pytest.raises(DataError, match=rf"{path.name}: {decoder} cannot decode it .*; fetch the clip again"):
        read_frames(path, lambda count: [0], 32, decoder)


@pytest.mark.parametrize("name", ["12:30.mp4", "-a.mp4", "file:x.mp4", "concat:a|b.mp4", "clip%03d.mp4", "é ü.mp4"])
def test_file_names_that_look_like_urls_or_options_are_opened(name, tmp_path, monkeypatch, decoder):
    write_clip(tmp_path / "plain.mp4", codec="libx264").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert read_frame_numbers(Path(name), [0, 7], decoder) == [0, 7]


def test_too_long_file_name_is_refused(tmp_path, decoder):
    with pytest.raises(DataError, match=r"x\.mp4: cannot be opened \(File name too long\)"):
        read_frames(tmp_path / f"{'x' * 300}.mp4", lambda count: [0], 32, decoder)


def test_title_in_another_encoding_is_ignored(tmp_path, decoder):
    clip = write_clip(tmp_path / "titled.avi", title="CAFEE")
    content = clip.read_bytes()
    assert content.count(b"CAFEE") == 1
    clip.write_bytes(content.replace(b"CAFEE", b"CAF\xc9E"))
    assert read_frame_numbers(clip, [0, 7], decoder) == [0, 7]


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1000, 100)])
def test_long_narrow_frames_are_cropped_to_a_maximum_ratio(size, tmp_path):
    """A GIF is used because other codecs do not support a side of one pixel."""
    clip = write_clip(tmp_path / "narrow.gif", frames=3, size=size, codec="gif")
    frames = read_frames(clip, lambda count: [0, 1, 2], 32)
    width, height = (38 if length == min(size) else MAX_RATIO * 38 for length in size)
    assert frames.shape == (3, height, width, 3)
    assert crop(frames, 32).shape == (3, 32, 32, 3)


def test_long_frames_are_cropped_to_their_center(tmp_path):
    picture = np.zeros((40, 600, 3), np.uint8)
    picture[:, 260:340], picture[:, 340:] = 120, 250
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frames = resize(frame, 38, VideoReformatter())[None]
    assert frames.shape == (1, 38, 4 * 38, 3)
    assert (crop(frames, 32) == 120).all()
    assert frames[0, 0, 0, 0] == 0
    assert frames[0, 0, -1, 0] == 250


def test_frames_with_too_many_pixels_are_refused(tmp_path, decoder, monkeypatch):
    clip = write_clip(tmp_path / "large.mp4", codec="libx264")
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match=r"large\.mp4: frames of 64 x 48 pixels"):
        read_frames(clip, lambda count: [0], 32, decoder)


@pytest.mark.parametrize(("size", "decoded"), [((320, 240), (38, 51, 3)), ((32, 24), (24, 32, 3))])
def test_decord_decodes_large_frames_at_the_requested_size(size, decoded, tmp_path):
    """Decord decodes ahead of its reader: 150 frames of 2048 x 1810 took 1.1 GB at full size."""
    pytest.importorskip("decord")
    clip = write_clip(tmp_path / "large.mp4", codec="libx264", size=size)
    assert next(video._decode_decord(clip, 38)).shape == decoded
    pyav_frames, decord_frames = (read_frames(clip, range, 32, decoder) for decoder in ("pyav", "decord"))
    assert np.abs(pyav_frames.astype(int) - decord_frames).max() < 3


def test_decord_refuses_too_narrow_frames(tmp_path):
    clip = write_clip(tmp_path / "tiny.mp4", codec="libx264", size=(2, 2))
    assert read_frame_numbers(clip, [0, 7]) == [0, 7]
    expect_decord_refusal(clip, "frames of 2 x 2 pixels are too narrow for decord")


def test_an_unknown_codec_is_refused(tmp_path, decoder):
    clip = write_clip(tmp_path / "future.mp4", codec="libx264")
    clip.write_bytes(clip.read_bytes().replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    with pytest.raises(DataError, match=rf"future\.mp4: {decoder} cannot decode it"):
        read_frames(clip, lambda count: [0], 32, decoder)


def test_truncated_clip_gives_exact_frames_or_a_named_error(tmp_path, decoder):
    content = write_clip(tmp_path / "whole.avi", frames=30).read_bytes()
    for end in range(50, len(content), len(content) // 25):
        cut = tmp_path / "cut.avi"
        cut.write_bytes(content[:end])
        try:
            numbers = read_frame_numbers(cut, [0], decoder)
        except DataError as error:
            assert "cut.avi" in str(error)  # noqa: PT017  either outcome is right
        else:
            assert numbers == [0]


def test_rotation_is_applied(real):
    for name, shape in (("decord_video_90.mov", (476, 268)), ("decord_video_180.mov", (268, 476))):
        frames = read_frames(real / "odd" / name, lambda count: [0], 224)
        assert frames.shape[1:3] == shape
        decord_frames = read_frames(real / "odd" / name, lambda count: [0], 224, "decord")
        assert np.abs(frames.astype(int) - decord_frames).mean() < 3


ODD_FILE_FRAMES = {  # number of frames from PyAV and from decord; 0 means a named error
    "decord_corrupted.mp4": (0, 0),
    "decord_unordered.mov": (4, 4),
    "decord_video_180.mov": (3, 3),
    "decord_video_90.mov": (3, 3),
    "flipping_a_pancake.mkv": (310, 310),
    "hf_test_video_66x50.mov": (82, 82),  # 87 packets, 5 of them hidden by an edit list
    "imageio_imageio_issue245.gif": (1, 0),
    "imageio_newtonscradle.gif": (36, 0),
    "imageio_realshort.mp4": (36, 36),
    "mp4parse_chunk_out_of_range.mp4": (0, 0),
    "mp4parse_hevc_white_frame.mp4": (1, 1),
    "mp4parse_no_timescale.mp4": (0, 0),
    "mp4parse_opus_audioinit.mp4": (0, 0),  # audio only
    "mp4parse_tiny_av1.mp4": (1, 0),
    "torchcodec_h264_10bits.mp4": (30, 30),
    "torchcodec_nasa_13013.mp4": (390, 0),  # two video streams
    "video12727.mp4": (283, 0),  # does not begin with a keyframe
}
DECORD_2_FRAMES = {  # files that decord 0.6 refuses
    "imageio_imageio_issue245.gif": 1, "imageio_newtonscradle.gif": 36, "mp4parse_tiny_av1.mp4": 1,
}  # fmt: skip


def test_every_odd_file_gives_frames_or_a_named_error(real, decoder, capfd):
    outcomes = {}
    for path in sorted((real / "odd").iterdir()):
        counts: list[int] = []

        def choose(count, counts=counts):
            counts.append(count)
            return choose_candidates(count, 3)

        try:
            assert len(read_frames(path, choose, 224, decoder)) == 9
            outcomes[path.name] = counts[-1]
        except DataError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            outcomes[path.name] = 0
    expected = {name: counts[decoder == "decord"] for name, counts in ODD_FILE_FRAMES.items()}
    if decoder == "decord" and pytest.importorskip("decord").__version__ >= "2":
        expected |= DECORD_2_FRAMES
    assert outcomes == expected
    assert capfd.readouterr().err == ""


def test_both_decoders_give_the_same_frames(real):
    """Colors differ by rounding, and at sharp edges by chroma scaling."""
    pytest.importorskip("decord")
    odd_files = [real / "odd" / name for name, counts in ODD_FILE_FRAMES.items() if all(counts)]
    folders = real / "msvd" / "YouTubeClips", real / "msrvtt" / "videos"
    for path in odd_files + [path for folder in folders for path in sorted(folder.iterdir())[:3]]:
        pyav_frames, decord_frames = (
            read_frames(path, lambda count: choose_candidates(count, 3), 224, decoder) for decoder in ("pyav", "decord")
        )
        assert pyav_frames.shape == decord_frames.shape
        assert np.abs(pyav_frames.astype(int) - decord_frames).mean((1, 2, 3)).max() < 5, path


def test_frame_count_is_that_of_the_decoded_frames_not_of_the_header(real):
    """The header says 347 frames, 283 are decoded: segments are computed from the latter."""
    counts = []
    read_frames(real / "odd" / "video12727.mp4", lambda count: (counts.append(count), [count - 1])[1], 224)
    assert counts[-1] == 283
