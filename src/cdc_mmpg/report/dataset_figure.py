"""Figure of the synthetic dataset: clips of a few unseen devices."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from cdc_mmpg.errors import DataError
from cdc_mmpg.media.frames import Frames
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.report.canvas import INK, MUTED, SMALL, TEXT, add_pixel_axes, draw_image, encode_png, open_canvas

DEVICES, HISTORY = 4, 6  # number of rows, and of clips without questions in each row
FRAME_PIXELS = 92  # width and height of a frame


class DeviceRow(NamedTuple):
    """A row of the figure: an unseen device, names of its clips, and the question about the test clip."""

    device: str
    cast: float
    history: list[str]
    test: str
    question: str
    answer: str


def draw_dataset(root: Path) -> bytes:
    """Draw clips of a few unseen devices, as PNG.

    Raises:
        DataError: a file is absent or damaged, or no unseen device has enough clips.
    """
    rows = choose_devices(root)
    side, gap, top, left = FRAME_PIXELS, 5, 52, 118
    test = left + HISTORY * (side + gap) + 22
    aside = test + side + 18
    height = top + len(rows) * (side + gap + 3) + 9
    with open_canvas(1080, height) as figure:
        axes = add_pixel_axes(figure)
        for start, end, title in (
            (left, left + HISTORY * (side + gap) - gap, "the same camera's other clips, unlabelled"),
            (test, test + side, "a test clip"),
            (aside, aside + 245, "question → answer"),
        ):
            is_centred = start != aside
            axes.text((start + end) / 2 if is_centred else start, height - 24, title, fontsize=TEXT, color=INK,
                      weight="bold", ha="center" if is_centred else "left", va="center")  # fmt: skip
            axes.plot([start, end], [height - 41] * 2, color="#d1d9e0", linewidth=1)
        for number, row in enumerate(rows):
            bottom = height - top - number * (side + gap + 3) - side
            middle = bottom + side / 2
            axes.text(16, middle + 10, row.device, fontsize=SMALL, color=INK, va="center")
            axes.text(
                16, middle - 11, f"hue {row.cast:+.0f}°".replace("-", "−"), fontsize=SMALL, color=MUTED, va="center"
            )
            for place, clip in enumerate((*row.history, row.test)):
                x = left + place * (side + gap) if place < HISTORY else test
                draw_image(axes, _read_frame(root, clip), x, bottom, side)
            axes.text(aside, middle + 10, row.question, fontsize=TEXT, color=INK, va="center")
            axes.text(aside, middle - 13, f"→ {row.answer}", fontsize=TEXT, color=INK, va="center", weight="bold")
        return encode_png(figure)


def choose_devices(root: Path) -> list[DeviceRow]:
    """Choose up to four unseen devices whose casts are spread most evenly over the hue circle, near 0° first."""
    names = {}
    for number, line in enumerate(_read_text(root / "youtube_mapping.txt").splitlines(), start=1):
        name, _, vid = line.rpartition(" vid")
        if not name or not vid.isdigit():
            raise DataError(f"{root / 'youtube_mapping.txt'}, line {number}: {line!r} is not '<clip> vid<number>'")
        names[int(vid)] = name
    questions: dict[str, dict[str, Any]] = {}
    clips: dict[str, dict[str, list[str]]] = {}
    casts = {}
    try:
        for entry in json.loads(_read_text(root / "test_unseen_qa.json")):
            known = questions.setdefault(names[entry["video_id"]], entry)
            if entry["type"] == "color" != known["type"]:
                questions[names[entry["video_id"]]] = entry
        for name, clip in sorted(json.loads(_read_text(root / "devices.json")).items()):
            if clip["device"].startswith("unseen"):
                casts[clip["device"]] = float(clip["cast"])
                clips.setdefault(clip["device"], {}).setdefault(clip["role"], []).append(name)
        rows = []
        for device, roles in clips.items():
            history = roles.get("history", [])[:HISTORY]
            asked_about = [name for name in roles.get("test", []) if name in questions]
            if len(history) == HISTORY and asked_about:
                test = min(asked_about, key=lambda name: questions[name]["type"] != "color")
                question, answer = questions[test]["question"], questions[test]["answer"]
                rows.append(DeviceRow(device, casts[device], history, test, question, answer))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{root}: devices.json and test_unseen_qa.json lack data that the figure needs "
            f"({type(error).__name__}: {error}); make the dataset again"
        ) from error
    if not rows:
        raise DataError(
            f"{root}: none of {len(clips)} unseen devices has {HISTORY} history clips and a test clip with a question; "
            "make the dataset again"
        )
    chosen: list[DeviceRow] = []
    for number in range(min(DEVICES, len(rows))):
        target = 360 * number / DEVICES
        left = [row for row in rows if row not in chosen]
        chosen.append(min(left, key=lambda row: abs((row.cast - target + 180) % 360 - 180)))
    return chosen


def _read_frame(root: Path, clip: str) -> Frames:
    """Read the middle frame of a clip."""
    return read_frames(
        root / "YouTubeClips" / f"{clip}.mp4", lambda count: [count // 2], FRAME_PIXELS, side=FRAME_PIXELS
    )[0]


def _read_text(path: Path) -> str:
    """Read a file of the dataset.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the dataset again") from error
