"""Decoding: the exact frames, from either decoder, and a named error for what is not a clip."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cdc_mmpg.errors import DataError
from cdc_mmpg.frames import candidate_indices, crop, middle_candidates, shorter_side
from cdc_mmpg.video import Decoder, read_frames
from conftest import write_clip


def numbers(path: Path, indices: list[int], decoder: Decoder = "pyav") -> list[int]:
    """Which frames came back, read off their grey."""
    frames = read_frames(path, lambda count: indices, 32, decoder)
    return [round((float(frame.mean()) - 4) / 6) for frame in frames]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("short.mp4", "libx264", {"g": "3", "crf": "10"}),
        ("long.mp4", "libx264", {"g": "250", "bf": "3", "crf": "10"}),
        ("old.avi", "mpeg4", {}),
        ("ancient.mkv", "mpeg4", {"bf": "2"}),
    ],
)
def test_exact_frames(tmp_path, name, codec, options, decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    clip = write_clip(tmp_path / name, frames=40, codec=codec, **options)
    assert numbers(clip, [0, 7, 20, 39], decoder) == [0, 7, 20, 39]


def test_exact_frames_of_a_gif(tmp_path):
    clip = write_clip(tmp_path / "moving.gif", frames=6, codec="gif")
    with av.open(str(clip)) as container:  # GIF's palette moves greys: compare with a plain decode
        plain = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    frames = read_frames(clip, lambda count: list(range(count)), 32)
    assert len(frames) == 6
    np.testing.assert_allclose([frame.mean() for frame in frames], plain, atol=2)


def test_exact_frames_where_the_rate_varies(tmp_path):
    path = tmp_path / "vfr.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, time in enumerate([0, 1, 2, 3, 90, 91, 300, 301, 302, 303]):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 + 6 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert numbers(path, list(range(10))) == list(range(10))


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (9, [1, 4, 7]), (300, [50, 150, 250])]
)
def test_evaluation_takes_the_middle_of_every_segment(count, expected):
    candidates = candidate_indices(count, 3)
    assert [candidates[place] for place in middle_candidates(3)] == expected
    assert candidates == sorted(candidates)
    assert max(candidates) < count


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_clips_shorter_than_the_model_wants(tmp_path, frames):
    clip = write_clip(tmp_path / "brief.mp4", frames=frames, codec="libx264")
    assert len(read_frames(clip, lambda count: candidate_indices(count, 3), 32)) == 9


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 50), (66, 50), (200, 18)])
def test_the_shorter_side_decides_the_size(tmp_path, size):
    clip = write_clip(tmp_path / "clip.mp4", frames=2, size=size, codec="libx264")
    frames = read_frames(clip, lambda count: [0], 32)
    assert min(frames.shape[1:3]) == shorter_side(32) == 38
    assert (frames.shape[1] < frames.shape[2]) == (size[1] < size[0])
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


def test_shorter_side_of_the_paper():
    assert shorter_side(224) == 268


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "cannot decode"),
        (b"\0" * 5000, "cannot decode"),
        (None, "no such clip"),
    ],
)
def test_what_is_no_clip_is_refused_by_name(tmp_path, content, reason, decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    path = tmp_path / "fake.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"fake\.mp4.*{reason}") as error:
        read_frames(path, lambda count: [0], 32, decoder)
    if reason == "cannot decode":
        assert f"decoder={'decord' if decoder == 'pyav' else 'pyav'}" in str(error.value)


def test_audio_alone_is_refused(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"song\.mp4: no video in it, only \['audio'\]"):
        read_frames(path, lambda count: [0], 32)


def test_a_clip_cut_at_any_point_gives_its_frames_or_a_named_error(tmp_path):
    whole = write_clip(tmp_path / "whole.avi", frames=30).read_bytes()
    for end in range(50, len(whole), len(whole) // 25):
        cut = tmp_path / "cut.avi"
        cut.write_bytes(whole[:end])
        try:
            seen = numbers(cut, [0])
        except DataError as error:
            assert "cut.avi" in str(error)  # noqa: PT017  either outcome is right
        else:
            assert seen == [0]


def test_rotation_is_applied(real):
    for name, shape in (("decord_video_90.mov", (476, 268)), ("decord_video_180.mov", (268, 476))):
        frames = read_frames(real / "odd" / name, lambda count: [0], 224)
        assert frames.shape[1:3] == shape
        other = read_frames(real / "odd" / name, lambda count: [0], 224, "decord")
        assert np.abs(frames.astype(int) - other).mean() < 3


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_every_odd_file_gives_frames_or_a_named_error(real, decoder):
    outcomes = {}
    for path in sorted((real / "odd").iterdir()):
        try:
            outcomes[path.name] = len(read_frames(path, lambda count: candidate_indices(count, 3), 224, decoder))
        except DataError as error:
            assert path.name in str(error)  # noqa: PT017
            outcomes[path.name] = 0
    refused = {name for name, frames in outcomes.items() if not frames}
    never = {"decord_corrupted.mp4", "mp4parse_chunk_out_of_range.mp4", "mp4parse_opus_audioinit.mp4"}
    assert never <= refused
    if decoder == "pyav":
        assert refused <= never | {"mp4parse_no_timescale.mp4"}
    assert set(outcomes.values()) <= {0, 9}


def test_a_header_that_counts_too_many_frames(real):
    """It says 347 and 283 decode: the segments are those of what is there."""
    counts = []
    read_frames(real / "odd" / "video12727.mp4", lambda count: (counts.append(count), [count - 1])[1], 224)
    assert counts[-1] == 283
