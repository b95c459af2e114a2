"""The figures: the method, the embedded dataset, and accuracy on unseen devices against the number of anchors.

`cdc-mmpg figures checkpoints/<dataset> [--data <dataset root>]`
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cdc_mmpg.catalogue import BASELINE, CONCATENATED, SESSION, color_of
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.files import atomic_write
from cdc_mmpg.media.frames import Frames
from cdc_mmpg.media.video import read_frames
from cdc_mmpg.program import exit_code, log_to_terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lines beside the session's: method, condition (none: the run's first), label, color.
REFERENCES = (
    (BASELINE, None, "Fine-tuning", color_of(BASELINE)),
    ("cdc_mmpg", None, "CDC-MMPG per sample", color_of("cdc_mmpg")),
    (SESSION, "shuffled_n16", "another device's 16 anchors", "#8250df"),
    (CONCATENATED, None, "concatenated", color_of(CONCATENATED)),
    ("session_oracle", None, "oracle: the true cast", color_of("session_oracle")),
)
LINES = (("all", "session, all questions", color_of(SESSION)), ("color", "session, color questions", "#cf3f2e"))

INK, MUTED = "#1f2328", "#59636e"
DEVICE, CLOUD, BOTH = ("#eaf3fc", "#0b5cad"), ("#fdf1e3", "#b45309"), ("#f6f8fa", "#59636e")  # face and edge
DPI = 100
TEXT, SMALL, HEAD = 11.5, 10.5, 13.0  # points

DEVICES, HISTORY = 4, 6  # rows of the dataset's figure, and clips without questions in each
CELL = 92  # pixels of a frame


class Score(NamedTuple):
    """An accuracy in %."""

    value: float
    low: float
    high: float


class Row(NamedTuple):
    """An unseen device: the names of clips, and what is asked about the last."""

    device: str
    cast: float
    history: list[str]
    test: str
    question: str
    answer: str


def method() -> bytes:
    """What runs where and what travels, as PNG."""
    with _canvas(1040, 540) as figure:
        axes = _plain(figure)
        for left, width, name, colors in ((20, 480, "device", DEVICE), (740, 280, "cloud", CLOUD)):
            _box(axes, left, 130, width, 390, colors)
            axes.text(left + 18, 488, name, color=colors[1], fontsize=HEAD, weight="bold", va="baseline")
        # The device: in and out at the left, the model downwards at the right.
        for number in range(3):
            _picture(axes, 46 + 30 * number, 404 - 9 * number, 58, number / 2)
        axes.text(130, 372, "3 frames + question", fontsize=TEXT, color=INK, ha="center", va="top")
        axes.text(130, 350, "“what color is the disk?”", fontsize=SMALL, color=MUTED, ha="center", va="top")
        boxes = ((385, 72, "All-in-One-Ti\nencoder"), (283, 54, "φ"), (163, 72, "last layer\nW, b"))
        for bottom, height, name in boxes:
            _box(axes, 290, bottom, 180, height, ("white", DEVICE[1]), name)
        axes.text(130, 209, "answer", fontsize=TEXT, color=INK, ha="center", va="center")
        axes.text(130, 187, "“blue”", fontsize=SMALL, color=MUTED, ha="center", va="center")
        _arrow(axes, (182, 421), (290, 421), DEVICE[1])
        _arrow(axes, (380, 385), (380, 337), DEVICE[1])
        _arrow(axes, (380, 283), (380, 235), DEVICE[1])
        _arrow(axes, (290, 199), (176, 199), DEVICE[1])
        # The cloud.
        _box(axes, 770, 385, 220, 72, ("white", CLOUD[1]), "ADR: VAE,\nre-normalisation")
        _box(axes, 770, 163, 220, 72, ("white", CLOUD[1]), "FDA:\nhypernetwork")
        _arrow(axes, (880, 385), (880, 235), CLOUD[1])
        # What travels.
        _arrow(axes, (470, 421), (770, 421), INK, 2.2)
        axes.text(620, 433, "anchor feature\nof one frame", fontsize=TEXT, color=INK, ha="center", va="bottom")
        axes.text(620, 409, "192 floats, 768 bytes", fontsize=SMALL, color=MUTED, ha="center", va="top")
        _arrow(axes, (770, 199), (470, 199), INK, 2.2)
        axes.text(620, 211, "weights of\nthe last layer", fontsize=TEXT, color=INK, ha="center", va="bottom")
        # The session.
        _box(axes, 20, 20, 1000, 86, BOTH)
        axes.text(38, 63, "session", color=INK, fontsize=HEAD, weight="bold", va="center_baseline")
        _box(axes, 150, 37, 450, 52, ("white", BOTH[1]), "mean of n anchors from other, unlabelled clips")
        _box(axes, 680, 37, 320, 52, ("white", BOTH[1]), "rank-4 residual on a shared head")
        _arrow(axes, (600, 63), (680, 63), BOTH[1])
        return _png(figure)


def data(root: Path) -> bytes:
    """Clips of a few unseen devices, as PNG.

    Raises:
        DataError: a file is absent or damaged, or no unseen device has enough clips.
    """
    rows = choose(root)
    side, gap, top, left = CELL, 5, 52, 118
    test = left + HISTORY * (side + gap) + 22
    aside = test + side + 18
    height = top + len(rows) * (side + gap + 3) + 9
    with _canvas(1080, height) as figure:
        axes = _plain(figure)
        for start, end, title in (
            (left, left + HISTORY * (side + gap) - gap, "the same camera's other clips, unlabelled"),
            (test, test + side, "a test clip"),
            (aside, aside + 245, "question → answer"),
        ):
            centred = start != aside
            axes.text((start + end) / 2 if centred else start, height - 24, title, fontsize=TEXT, color=INK,
                      weight="bold", ha="center" if centred else "left", va="center")  # fmt: skip
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
                _image(axes, _frame(root, clip), x, bottom, side)
            axes.text(aside, middle + 10, row.question, fontsize=TEXT, color=INK, va="center")
            axes.text(aside, middle - 13, f"→ {row.answer}", fontsize=TEXT, color=INK, va="center", weight="bold")
        return _png(figure)


def choose(root: Path) -> list[Row]:
    """Up to four unseen devices, their casts as evenly spaced around the hue circle as they come, 0° first."""
    names = {}
    for number, line in enumerate(_text(root / "youtube_mapping.txt").splitlines(), start=1):
        name, _, vid = line.rpartition(" vid")
        if not name or not vid.isdigit():
            raise DataError(f"{root / 'youtube_mapping.txt'}, line {number}: {line!r} is not '<clip> vid<number>'")
        names[int(vid)] = name
    questions: dict[str, dict[str, Any]] = {}
    clips: dict[str, dict[str, list[str]]] = {}
    casts = {}
    try:
        for asked in json.loads(_text(root / "test_unseen_qa.json")):
            known = questions.setdefault(names[asked["video_id"]], asked)
            if asked["type"] == "color" != known["type"]:
                questions[names[asked["video_id"]]] = asked
        for name, clip in sorted(json.loads(_text(root / "devices.json")).items()):
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
                rows.append(Row(device, casts[device], history, test, question, answer))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{root}: devices.json and test_unseen_qa.json do not hold what the figure needs "
            f"({type(error).__name__}: {error}); make the dataset again"
        ) from error
    if not rows:
        raise DataError(
            f"{root}: none of {len(clips)} unseen devices has {HISTORY} history clips and a test clip with a question; "
            "make the dataset again"
        )
    chosen: list[Row] = []
    for number in range(min(DEVICES, len(rows))):
        target = 360 * number / DEVICES
        left = [row for row in rows if row not in chosen]
        chosen.append(min(left, key=lambda row: abs((row.cast - target + 180) % 360 - 180)))
    return chosen


def anchors(folder: Path) -> bytes:
    """Accuracy on unseen devices against the number of anchors, as PNG.

    Raises:
        ConfigError: no finished run has these figures.
    """
    found = Evidence(folder).runs
    results = {name: [run.results for run in own] for name, own in found.items()}
    runs = results.get(SESSION, [])
    conditions = {name for run in runs for name in run.get("accuracy") or {} if re.fullmatch(r"n\d+", name)}
    counts = sorted(int(name[1:]) for name in conditions)
    curves = []
    for kind, label, color in LINES:
        points = [(x, score) for x, count in enumerate(counts) if (score := accuracy(runs, f"n{count}", kind))]
        if points:
            curves.append((label, color, points))
    if not curves:
        raise ConfigError(
            f"{folder / SESSION}: no finished run with accuracies on unseen devices for n anchors; train one first "
            "(make train)"
        )
    references = [
        (score.value, label, color)
        for name, condition, label, color in REFERENCES
        if (score := accuracy(results.get(name, []), condition, "all"))
    ]
    scores = [score for _, _, points in curves for _, score in points]
    low = min([score.low for score in scores] + [value for value, _, _ in references])
    high = max([score.high for score in scores] + [value for value, _, _ in references])
    margin = 0.06 * max(high - low, 1)
    with _canvas(1000, 540) as figure:
        axes = figure.add_axes((0.075, 0.12, 0.615, 0.735))
        axes.set_xlim(-0.2, max(len(counts) - 1, 0.2))
        axes.set_ylim(max(low - margin, 0), min(high + margin, 100))
        for value, _, color in references:
            axes.axhline(value, color=color, linewidth=1.4, linestyle=(0, (5, 3)))
        for _, color, points in curves:
            x, band = [place for place, _ in points], [score for _, score in points]
            axes.fill_between(x, [score.low for score in band], [score.high for score in band], color=color, alpha=0.15,
                              linewidth=0)  # fmt: skip
            axes.plot(x, [score.value for score in band], color=color, linewidth=2.2, marker="o", markersize=6,
                      clip_on=False, zorder=5)  # fmt: skip
        ends = [(points[-1][1].value, label, color, "bold") for label, color, points in curves]
        _label(axes, sorted([*ends, *((*reference, "normal") for reference in references)]))
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.tick_params(length=0, pad=7, labelsize=SMALL, colors=MUTED)
        axes.grid(axis="y", color="#e6eaef", linewidth=0.9)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#afb8c1")
        axes.set_xlabel("n, anchors of the device's other clips", fontsize=TEXT, color=INK, labelpad=8)
        axes.set_ylabel("accuracy, %", fontsize=TEXT, color=INK, labelpad=8)
        figure.text(0.02, 0.945, "Accuracy on unseen devices", fontsize=HEAD, weight="bold", color=INK, va="center")
        figure.text(0.02, 0.897, _caption(runs, bool(references)), fontsize=SMALL, color=MUTED, va="center")
        return _png(figure)


def accuracy(runs: list[dict[str, Any]], condition: str | None, kind: str) -> Score | None:
    """On unseen devices: of one seed with its interval, of several their mean and standard deviation."""
    found = []
    for run in runs:
        conditions = run.get("accuracy") or {}
        cell = conditions.get(condition or next(iter(conditions), ""), {}).get("unseen", {}).get(kind)
        if cell:
            found.append(Score(*(100 * cell[key] for key in Score._fields)))
    if len(found) < 2:
        return found[0] if found else None
    values = [score.value for score in found]
    return Score(mean(values), mean(values) - stdev(values), mean(values) + stdev(values))


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ascending ones that lie `gap` apart and, if there is room, between `low` and `high`."""
    blocks: list[tuple[float, int]] = []  # isotonic regression of what is left without the gaps: mean, number
    for number, place in enumerate(places):
        value, size = place - number * gap, 1
        while blocks and blocks[-1][0] > value:
            before, count = blocks.pop()
            value, size = (before * count + value * size) / (count + size), count + size
        blocks.append((value, size))
    flat = [value for value, size in blocks for _ in range(size)]
    highest = high - (len(flat) - 1) * gap
    return [max(min(value, highest), low) + number * gap for number, value in enumerate(flat)]


def _caption(runs: list[dict[str, Any]], dashed: bool) -> str:
    """What the band is, and what it was counted on."""
    cells = [run["accuracy"].get("n0", {}).get("unseen", {}).get("all", {}) for run in runs if run.get("accuracy")]
    counts = dict.fromkeys(f"{cell['questions']:,}" for cell in cells if "questions" in cell)
    parts = [f"{' / '.join(counts)} test questions"] if counts else []
    parts.append(
        "band: 95 % interval, one seed" if len(cells) == 1 else f"band: ± standard deviation, {len(cells)} seeds"
    )
    return " · ".join([*parts, *(["dashed: all questions"] if dashed else [])])


def _label(axes: "Axes", lines: list[tuple[float, str, str, str]]) -> None:
    """Names of horizontal lines' right ends, apart from each other: value, text, colour, weight, ascending."""
    low, high = axes.get_ylim()
    gap = (high - low) * 21 / (axes.get_position().height * axes.figure.bbox.height)  # 21 pixels
    places = spread([line[0] for line in lines], gap, low, high)
    right = axes.get_yaxis_transform()
    for (value, text, color, weight), place in zip(lines, places, strict=True):
        axes.plot([1.012, 1.04, 1.05], [value, place, place], color=color, linewidth=1, transform=right, clip_on=False)
        axes.text(1.058, place, f"{value:.1f}  {text}", color=color, fontsize=SMALL, weight=weight,
                  va="center_baseline", transform=right)  # fmt: skip


@contextmanager
def _canvas(width: int, height: int) -> "Iterator[Figure]":
    """A white figure of so many pixels, without the user's matplotlib settings."""
    try:
        import matplotlib  # noqa: PLC0415  slow, and only for figures
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"figures need matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _plain(figure: "Figure") -> "Axes":
    """Axes whose units are the figure's pixels."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    axes.set_xlim(0, figure.bbox.width)
    axes.set_ylim(0, figure.bbox.height)
    return axes


def _box(
    axes: "Axes", left: float, bottom: float, width: float, height: float, colors: tuple[str, str], text: str = ""
) -> None:
    from matplotlib.patches import FancyBboxPatch  # noqa: PLC0415

    style = "round,pad=0,rounding_size=9"
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, style, facecolor=colors[0], edgecolor=colors[1], linewidth=1.3)
    )
    axes.text(left + width / 2, bottom + height / 2, text, fontsize=TEXT, color=INK, ha="center",
              va="center" if "\n" in text else "center_baseline",
              linespacing=1.35)  # fmt: skip


def _arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.6) -> None:
    axes.annotate("", end, start, arrowprops={
        "arrowstyle": "-|>", "color": color, "linewidth": width, "mutation_scale": 15, "shrinkA": 2, "shrinkB": 2,
    })  # fmt: skip


def _picture(axes: "Axes", left: float, bottom: float, side: int, time: float) -> None:
    """A frame of the clip that everybody imagines: a disk that moves."""
    y, x = np.mgrid[:side, :side] / side
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = (214, 226, 238)
    picture[(x - 0.3 - 0.4 * time) ** 2 + (y - 0.62 + 0.2 * time) ** 2 < 0.035] = (11, 92, 173)
    _image(axes, picture, left, bottom, side)
    x, y = left + side * np.array([0, 1, 1, 0, 0]), bottom + side * np.array([0, 0, 1, 1, 0])
    axes.plot(x, y, color="white", linewidth=2, zorder=2)


def _image(axes: "Axes", picture: Frames, left: float, bottom: float, side: int) -> None:
    axes.imshow(picture, extent=(left, left + side, bottom, bottom + side), aspect="auto", interpolation="nearest",
                zorder=2)  # fmt: skip


def _frame(root: Path, clip: str) -> Frames:
    """The middle one of a clip."""
    return read_frames(root / "YouTubeClips" / f"{clip}.mp4", lambda count: [count // 2], CELL, side=CELL)[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the dataset again") from error


def _png(figure: "Figure") -> bytes:
    """In 256 colours, because noise does not compress; the same bytes for the same figure."""
    from PIL import Image  # noqa: PLC0415

    file, drawn = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    picture = Image.open(drawn).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures below the runs and print where; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoints/<dataset>")
    parser.add_argument("--data", type=Path, help="the embedded dataset's folder, for data.png")
    options = parser.parse_args(arguments)

    def write(name: str, content: bytes) -> None:
        with atomic_write(options.folder / "figures" / name) as file:
            file.write(content)
        print(f"written: {options.folder / 'figures' / name}")

    def draw() -> None:
        if not options.folder.is_dir():
            raise ConfigError(f"{options.folder}: no such folder; train first (make train)")
        write("method.png", method())
        if options.data is None:
            print("skipped: data.png, which needs --data <dataset root>")
        elif not (options.data / "devices.json").is_file():
            print(f"skipped: data.png, because {options.data} has no devices.json")
        else:
            write("data.png", data(options.data))
        write("anchors.png", anchors(options.folder))

    log_to_terminal()
    return exit_code(draw)


if __name__ == "__main__":
    sys.exit(main())
