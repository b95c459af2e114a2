"""Generator of the synthetic dataset: colour constancy with real video files in MSVD-QA's layout.

`cdc-mmpg clips <folder>` renders it, resumes where it was stopped, or checks a finished dataset;
`--size toy` renders a small one, `--size wide` one with more devices. `data_modules.synthetic.Synthetic` describes the
files. This module does not import torch.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import av
import numpy as np
from numpy.typing import NDArray
from tokenizers.implementations import BertWordPieceTokenizer  # type: ignore[attr-defined]

from cdc_mmpg.errors import CDCError, DataError
from cdc_mmpg.files import atomic_write
from cdc_mmpg.media.frames import Frames
from cdc_mmpg.processors import count_processors
from cdc_mmpg.program import exit_on_signals, hold_signals, log_to_terminal, run_to_exit_code
from cdc_mmpg.progress import track

logger = logging.getLogger(__name__)

COLOR_NAMES = ("red", "yellow", "green", "cyan", "blue", "magenta")  # 60 degrees of hue apart
HUES = ("red", "orange", "yellow", "lime", "green", "teal", "cyan", "azure", "blue", "violet", "magenta", "pink")
SHAPES = ("disk", "ring", "bar", "pole")
SIZES = ("small", "big")
SIDES = ("left", "right")
COUNTS = ("one", "two")
ANSWER_WORDS = (*COLOR_NAMES, *SHAPES, *SIZES, *SIDES, *COUNTS)
BACKGROUND_WORD = " on "  # precedes the background's hue in a caption
QUESTION_SHARES = {"color": 0.40, "shape": 0.12, "size": 0.16, "side": 0.16, "count": 0.16}  # share of the questions

DIGESTS = "digests.json"  # written last
EDITION = 2  # version of the files; in version 1, pretraining questions had six colours

FRAME_PIXELS = 64  # side of a frame, the size that the model sees: nothing is resampled
CLIP_FRAMES = 6
HUE_JITTER = 8.0  # maximum deviation of an object's hue from its colour, uniform, in degrees

# The hues that reveal a cast, because they are the same for all cameras: mean and standard deviation in degrees.
World = Literal["sky", "memory", "rooms"]
SKY_HUE = (240.0, 50.0)  # hue of the backgrounds in the world "sky"
ROOM_DEVIATION = 20.0  # of the mean hue of a device's backgrounds in the world "rooms", which is "sky" in all else
MEMORY_SHAPE = ("pole", 120.0, 20.0)  # a shape and its hue in the world "memory", whose backgrounds have any hue


class DatasetCounts(NamedTuple):
    """Numbers of devices and clips."""

    seen: int = 96  # devices that train
    unseen: int = 48  # devices in the test only
    val: int = 24  # validation devices
    labelled: int = 8  # clips with questions of a seen device
    history: int = 16  # clips without questions of a seen device; other devices have labelled + history of them
    test_seen: int = 6  # test clips of a seen device
    test: int = 10  # test clips of an unseen device, validation clips of a validation device
    captioned: int = 6016  # clips for pretraining, each of a different camera
    questions: int = 3  # questions about a clip


# Datasets by `--size`: the full one; one that shows in minutes that training works, but not how good a method is; one
# with four times as many training devices.
DATASET_SIZES = {
    "full": DatasetCounts(),
    "toy": DatasetCounts(seen=16, unseen=8, val=6, captioned=480),
    "wide": DatasetCounts(seen=384),
}


class Camera(NamedTuple):
    """The properties of a device's camera."""

    cast: float  # rotation of all hues in degrees
    gain: float
    gamma: float
    noise: float
    blur: float
    zoom: float
    speed: float


class Thing(NamedTuple):
    """An object of a scene."""

    shape: str
    color: str
    size: str
    side: str
    hue: float  # degrees
    place: tuple[float, float]  # center (x, y) in pixels
    drift: tuple[float, float]  # movement (x, y) during the clip in pixels, at speed 1


class Scene(NamedTuple):
    """The scene in front of a camera."""

    things: list[Thing]
    hue: float  # hue of the background
    angle: float
    period: float
    checked: bool  # whether the background is a checkerboard, else stripes


class Clip(NamedTuple):
    """A clip to be rendered."""

    name: str
    device: str
    role: str  # train, history, test, val, pretraining


def make_generator(seed: int, *place: object) -> np.random.Generator:
    """Return a random generator that depends on the seed and the purpose of its numbers, not on the rendering order."""
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256(" ".join(map(str, (seed, *place))).encode()).digest()[:8], "big")
    )


def plan_clips(counts: DatasetCounts, seed: int = 0, world: World = "sky") -> list[Clip]:
    """Plan all clips, in order; no two worlds share a name.

    Only "sky" with seed 0 has captioned clips: the encoder trained on them serves all worlds.
    """
    clips: list[Clip] = []
    is_first = (world, seed) == ("sky", 0)
    suffix = "" if is_first else f"-{world}{seed}"

    def add(device: str, role: str, number: int) -> None:
        start = sum(clip.device == device for clip in clips[-64:])
        clips.extend(Clip(f"{device}_{start + i:02}", device, role) for i in range(number))

    for i in range(counts.seen):
        for role, number in (("train", counts.labelled), ("history", counts.history), ("test", counts.test_seen)):
            add(f"seen{i:03}{suffix}", role, number)
    for group, devices in (("unseen", counts.unseen), ("val", counts.val)):
        for i in range(devices):
            add(f"{group}{i:03}{suffix}", "history", counts.labelled + counts.history)
            add(f"{group}{i:03}{suffix}", "test" if group == "unseen" else "val", counts.test)
    if is_first:
        clips.extend(Clip(f"web{i:05}", f"web{i:05}", "pretraining") for i in range(counts.captioned))
    return clips


def draw_camera(seed: int, device: str) -> Camera:
    """Draw a device's camera."""
    draw = make_generator(seed, "camera", device)
    return Camera(
        cast=draw.uniform(-180, 180),
        gain=draw.uniform(0.85, 1.15),
        gamma=draw.uniform(0.85, 1.2),
        noise=draw.uniform(0, 0.02),
        blur=draw.uniform(0, 0.4),
        zoom=draw.uniform(0.92, 1.08),
        speed=draw.uniform(0.5, 1.5),
    )


def draw_scene(seed: int, clip: str, world: World = "sky") -> Scene:
    """Draw the scene of a clip; the worlds differ only in its hues."""
    draw = make_generator(seed, "scene", clip)
    number = int(draw.integers(1, 3))
    shapes = draw.permutation(len(SHAPES))[:number]
    first = int(draw.integers(2))
    things = []
    for i in range(number):
        side, color = (first + i) % 2, int(draw.integers(len(COLOR_NAMES)))
        across = draw.uniform(14, 19)
        things.append(
            Thing(
                shape=SHAPES[shapes[i]],
                color=COLOR_NAMES[color],
                size=SIZES[int(draw.integers(2))],
                side=SIDES[side],
                hue=60 * color + draw.uniform(-HUE_JITTER, HUE_JITTER),
                place=(across if side == 0 else FRAME_PIXELS - across, draw.uniform(18, FRAME_PIXELS - 18)),
                drift=(draw.uniform(-1.5, 1.5), draw.uniform(-4, 4)),
            )
        )
    scene = Scene(things, draw.normal(*SKY_HUE), draw.uniform(0, np.pi), draw.uniform(8, 24), bool(draw.integers(2)))
    if world == "sky":
        return scene
    if world == "rooms":
        room = make_generator(seed, "room", clip.rpartition("_")[0])
        return scene._replace(hue=scene.hue + room.normal(0, ROOM_DEVIATION))
    draw, (known, mean, deviation) = make_generator(seed, world, clip), MEMORY_SHAPE
    for place, thing in enumerate(things):
        if thing.shape == known:
            hue = draw.normal(mean, deviation)
            things[place] = thing._replace(hue=hue, color=name_hue(hue))
    return scene._replace(hue=draw.uniform(0, 360))


def name_hue(hue: float, names: Sequence[str] = COLOR_NAMES) -> str:
    """Return the name of the colour nearest to a hue in degrees."""
    return names[round(hue * len(names) / 360) % len(names)]


def draw_questions(seed: int, clip: str, scene: Scene, number: int, world: World = "sky") -> list[tuple[str, str, str]]:
    """Draw distinct (type, question, answer) about the true scene; in "memory" none asks for the colour of a pole."""
    draw = make_generator(seed, "questions", clip)
    asked: list[tuple[str, str, str]] = []
    is_alone = len(scene.things) == 1
    only_poles = world == "memory" and {thing.shape for thing in scene.things} == {MEMORY_SHAPE[0]}
    while len(asked) < number:
        # The first asks for a colour; with half its weight in the others, the shares are those of `QUESTION_SHARES`.
        weights = np.array([share / 2 if kind == "color" else share for kind, share in QUESTION_SHARES.items()])
        is_first = not asked and not only_poles
        kind = "color" if is_first else str(draw.choice(list(QUESTION_SHARES), p=weights / weights.sum()))
        thing = scene.things[int(draw.integers(len(scene.things)))]
        question, answer = {
            "color": (f"what color is the {thing.shape}?", thing.color),
            "shape": ("what shape is the object?" if is_alone else f"what is on the {thing.side}?", thing.shape),
            "size": (f"how big is the {thing.shape}?", thing.size),
            "side": (f"on which side is the {thing.shape}?", thing.side),
            "count": ("how many objects are there?", COUNTS[len(scene.things) - 1]),
        }[kind]
        if kind == "color" and world == "memory" and thing.shape == MEMORY_SHAPE[0]:
            continue
        if (kind, question, answer) not in asked:
            asked.append((kind, question, answer))
    return asked


def rename_colors_as_seen(scene: Scene, cast: float, names: Sequence[str] = COLOR_NAMES) -> Scene:
    """Return the scene with the colour names that an observer gives who does not know the camera."""
    return scene._replace(things=[thing._replace(color=name_hue(thing.hue + cast, names)) for thing in scene.things])


def describe_scene(scene: Scene, cast: float) -> str:
    """Return the caption that an observer gives who does not know the camera."""
    left, *right = (
        f"a {thing.size} {name_hue(thing.hue + cast, HUES)} {thing.shape}"
        for thing in sorted(scene.things, key=lambda thing: SIDES.index(thing.side))
    )
    where = f"left of {right[0]}" if right else f"at {scene.things[0].side}"
    return f"{left} {where}{BACKGROUND_WORD}{name_hue(scene.hue + cast, HUES)}"


def render(seed: int, clip: str, scene: Scene, camera: Camera) -> Frames:
    """Render the frames (6, 64, 64, 3) of a clip."""
    draw = make_generator(seed, "noise", clip)
    time = np.linspace(-0.5, 0.5, CLIP_FRAMES, dtype=np.float32)[:, None, None] * camera.speed
    y, x = (grid.astype(np.float32) for grid in np.mgrid[:FRAME_PIXELS, :FRAME_PIXELS])
    middle = (FRAME_PIXELS - 1) / 2
    x, y = middle + (x - middle) / camera.zoom, middle + (y - middle) / camera.zoom
    # The background: two brightnesses of one hue.
    along = np.cos(scene.angle) * x + np.sin(scene.angle) * y + 6 * time
    wave = np.sin(2 * np.pi * along / scene.period)
    if scene.checked:
        wave = wave * np.sin(2 * np.pi * (np.sin(scene.angle) * x - np.cos(scene.angle) * y) / scene.period)
    picture = (0.28 + 0.03 * np.tanh(3 * wave))[..., None] * paint(scene.hue + camera.cast, 0.75)
    for thing in scene.things:
        reach = 13.5 if thing.size == "big" else 8.0
        right = x - (thing.place[0] + thing.drift[0] * time)
        down = y - (thing.place[1] + thing.drift[1] * time)
        distance = {  # in pixels to the edge, positive outside
            "disk": lambda: np.hypot(right, down) - reach,  # noqa: B023  called at once
            "ring": lambda: np.abs(np.hypot(right, down) - 0.8 * reach) - 0.3 * reach,  # noqa: B023
            "bar": lambda: np.maximum(np.abs(right) - 1.2 * reach, np.abs(down) - 0.45 * reach),  # noqa: B023
            "pole": lambda: np.maximum(np.abs(right) - 0.45 * reach, np.abs(down) - 1.2 * reach),  # noqa: B023
        }[thing.shape]()
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        picture = picture + cover * (paint(thing.hue + camera.cast, 0.7) - picture)
    for inner, before, after in (
        (np.s_[:, 1:-1], np.s_[:, :-2], np.s_[:, 2:]),
        (np.s_[:, :, 1:-1], np.s_[:, :, :-2], np.s_[:, :, 2:]),
    ):
        picture[inner] += camera.blur / 4 * (picture[before] + picture[after] - 2 * picture[inner])
    brightness = camera.gain * np.linspace(0, 1, 1024, dtype=np.float32) ** camera.gamma
    picture = brightness[(1023 * np.clip(picture, 0, 1)).astype(np.int16)]
    picture += camera.noise * 12**0.5 * (draw.random(picture.shape, dtype=np.float32) - 0.5)  # uniform
    return (255 * np.clip(picture, 0, 1) + 0.5).astype(np.uint8)


def paint(hue: float, saturation: float) -> NDArray[np.float32]:
    """Return RGB (3,) of a hue in degrees at full brightness."""
    distance = np.abs((hue / 60 - np.array([0, 2, 4]) + 3) % 6 - 3)  # from red, green, blue, in sixths
    return (1 - saturation + saturation * np.clip(2 - distance, 0, 1)).astype(np.float32)


def write_clip(folder: Path, seed: int, world: World, clip: Clip) -> None:
    """Render a clip's file, atomically, unless it exists."""
    path = folder / f"{clip.name}.mp4"
    if path.exists():
        return
    frames = render(seed, clip.name, draw_scene(seed, clip.name, world), draw_camera(seed, clip.device))
    temporary = path.with_name(f".{clip.name}.{os.getpid()}.tmp")
    try:
        write_video(temporary, frames)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CDCError(
            f"{path}: cannot be written ({error.strerror}): free disk space or use another folder"
        ) from error


def write_video(path: Path, frames: Frames) -> None:
    """Write frames as an MP4 file at full colour resolution.

    Raises:
        OSError: the file cannot be written.
    """
    with av.open(str(path), "w", format="mp4") as container:
        # No chroma subsampling, because hues are the signal.
        stream = container.add_stream("libx264", rate=5, options={"preset": "ultrafast", "crf": "10"})
        stream.width = stream.height = FRAME_PIXELS
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1  # the same bytes on any machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def make_annotations(seed: int, clips: Sequence[Clip], number: int, world: World = "sky") -> dict[str, str]:
    """Return the text of every annotation file by name; captions and vocabulary only with captioned clips."""
    videos = {clip.name: video for video, clip in enumerate(clips)}
    casts = {clip.device: draw_camera(seed, clip.device).cast for clip in clips}

    def make_questions(role: str, group: str = "") -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for clip in clips:
            if clip.role == role and clip.device.startswith(group):
                scene = draw_scene(seed, clip.name, world)
                if role == "pretraining":
                    scene = rename_colors_as_seen(scene, casts[clip.device], HUES)
                for kind, question, answer in draw_questions(seed, clip.name, scene, number, world):
                    row = {"answer": answer, "id": len(rows), "question": question, "type": kind}
                    rows.append(row | {"video_id": videos[clip.name]})
        return rows

    content: dict[str, Any] = {
        "train_qa.json": make_questions("train"),
        "val_qa.json": make_questions("val"),
        "test_qa.json": make_questions("test"),
        "test_seen_qa.json": make_questions("test", "seen"),
        "test_unseen_qa.json": make_questions("test", "unseen"),
        "history_qa.json": make_questions("history", "unseen"),
        "devices.json": {
            clip.name: {"device": clip.device, "role": clip.role, "cast": round(casts[clip.device], 3)}
            for clip in clips
        },
    }
    if captioned := [clip for clip in clips if clip.role == "pretraining"]:
        content["pretraining_qa.json"] = make_questions("pretraining")
        content["captions.json"] = {
            "sentences": [
                {"caption": describe_scene(draw_scene(seed, clip.name, world), casts[clip.device]),
                 "video_id": clip.name}
                for clip in captioned
            ]
        }  # fmt: skip
    texts = {name: json.dumps(rows, indent=0) + "\n" for name, rows in content.items()}
    texts["youtube_mapping.txt"] = "".join(f"{clip.name} vid{videos[clip.name]}\n" for clip in clips)
    texts["answer_set.txt"] = "".join(f"{answer}\n" for answer in ANSWER_WORDS)
    if captioned:  # worlds without captions use the encoder's vocabulary
        asked = [row["question"] for name in ("train_qa.json", "pretraining_qa.json") for row in content[name]]
        captions = [sentence["caption"] for sentence in content["captions.json"]["sentences"]]
        texts["vocab.txt"] = "".join(f"{piece}\n" for piece in train_wordpieces([*asked, *captions, *ANSWER_WORDS]))
    return texts


def train_wordpieces(texts: Sequence[str]) -> list[str]:
    """Train a WordPiece vocabulary on texts: special tokens, letters, entire words.

    Parts of words are left out, because the trainer breaks ties between them at random: the same texts must give the
    same vocabulary.
    """
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    special: list[Any] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        iter(texts), vocab_size=2048, min_frequency=1, special_tokens=special, show_progress=False
    )
    words = {word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    kept = {piece for piece in tokenizer.get_vocab() if piece in words or len(piece.removeprefix("##")) == 1}
    return special + sorted(kept)


def render_dataset(root: Path, counts: DatasetCounts | None = None, seed: int = 0, world: World = "sky") -> None:
    """Render the missing parts of the dataset below `root`, or check a complete one.

    Raises:
        DataError: `root` holds another dataset, or its files have changed.
        CDCError: a file cannot be written, or a rendering process was killed.
    """
    counts = counts or DatasetCounts()
    clips = plan_clips(counts, seed, world)
    settings: dict[str, object] = {"edition": EDITION, "seed": seed, "world": world, "counts": counts._asdict()}
    record, folder = root / DIGESTS, root / "YouTubeClips"
    if record.is_file():
        verify_dataset(root, settings)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    except OSError as error:
        raise CDCError(f"{folder}: cannot be written ({error.strerror}): use another folder") from error
    missing = [clip for clip in clips if not (folder / f"{clip.name}.mp4").exists()]
    logger.info("rendering %d of %d clips in %s", len(missing), len(clips), folder)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(count_processors(), context) as pool:
            try:
                with hold_signals(for_helpers=True):
                    rendered = pool.map(partial(write_clip, folder, seed, world), missing, chunksize=16)
                for _ in track(rendered, description="rendering clips", total=len(missing)):
                    pass
            except BaseException:  # a signal: drop the clips that are not begun
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise CDCError(f"{folder}: a rendering process was killed: re-run the same command") from error
    for name, text in make_annotations(seed, clips, counts.questions, world).items():
        with atomic_write(root / name) as file:
            file.write(text.encode())
    with atomic_write(record) as file:  # last, because it marks the dataset as complete
        file.write(json.dumps({**settings, "files": hash_files(root)}, indent=2).encode() + b"\n")


def hash_files(root: Path) -> dict[str, str]:
    """Return the sha256 of every annotation file, and one of all clips with their names."""
    digests = {}
    for path in sorted(root.iterdir()):
        if path.is_file() and path.name != DIGESTS and not path.name.startswith("."):
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    clips = hashlib.sha256()
    for path in sorted((root / "YouTubeClips").glob("*.mp4")):
        clips.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return {**digests, "YouTubeClips": clips.hexdigest()}


def verify_dataset(root: Path, settings: dict[str, object]) -> None:
    """Compare a complete dataset with the record of its rendering.

    Raises:
        DataError: settings or files differ; names them.
    """
    try:
        record = json.loads((root / DIGESTS).read_text(encoding="utf-8"))
        record.setdefault("world", "sky")  # the only world of earlier versions
        expected, actual = dict(record.pop("files")), hash_files(root)
        there, here = _flatten_settings(record), _flatten_settings(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{root}: cannot be compared with {DIGESTS} ({error!r:.200}): delete the folder and render it again"
        ) from error
    if keys := sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)):
        differing = ", ".join(f"{key}: {there.get(key)} there, {here.get(key)} requested" for key in keys)
        raise DataError(f"{root}: rendered with other settings ({differing}): delete or rename the folder")
    if changed := sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)):
        raise DataError(f"{root}: {', '.join(changed)} changed since rendering: delete the folder and render it again")


def _flatten_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with each count as one of them."""
    return {key: value for key, value in settings.items() if key != "counts"} | settings["counts"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Render or check the dataset; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the dataset")
    parser.add_argument("--size", choices=DATASET_SIZES, default="full", help="toy: small; wide: 384 training devices")
    parser.add_argument("--world", choices=get_args(World), default="sky", help="the hues that reveal a camera's cast")
    parser.add_argument("--seed", type=int, default=0, help="seed of devices, clips and questions")
    options = parser.parse_args(arguments)
    log_to_terminal()
    exit_on_signals()
    return run_to_exit_code(
        lambda: render_dataset(options.root, DATASET_SIZES[options.size], options.seed, options.world)
    )
