"""Figure of the method: the parts on the device and in the cloud, and the messages between them."""

from typing import TYPE_CHECKING

import numpy as np

from cdc_mmpg.report.canvas import HEAD, INK, MUTED, SMALL, TEXT, add_pixel_axes, draw_image, encode_png, open_canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEVICE, CLOUD, BOTH = ("#eaf3fc", "#0b5cad"), ("#fdf1e3", "#b45309"), ("#f6f8fa", "#59636e")  # face and edge colors


def draw_method() -> bytes:
    """Draw the parts of the method and the messages between them, as PNG."""
    with open_canvas(1040, 540) as figure:
        axes = add_pixel_axes(figure)
        for left, width, name, colors in ((20, 480, "device", DEVICE), (740, 280, "cloud", CLOUD)):
            _draw_box(axes, left, 130, width, 390, colors)
            axes.text(left + 18, 488, name, color=colors[1], fontsize=HEAD, weight="bold", va="baseline")
        # The device: input and output on the left, the model on the right from top to bottom.
        for number in range(3):
            _draw_picture(axes, 46 + 30 * number, 404 - 9 * number, 58, number / 2)
        axes.text(130, 372, "3 frames + question", fontsize=TEXT, color=INK, ha="center", va="top")
        axes.text(130, 350, "“what color is the disk?”", fontsize=SMALL, color=MUTED, ha="center", va="top")
        boxes = ((385, 72, "All-in-One-Ti\nencoder"), (283, 54, "head φ"), (163, 72, "last layer\nW, b"))
        for bottom, height, name in boxes:
            _draw_box(axes, 290, bottom, 180, height, ("white", DEVICE[1]), name)
        axes.text(130, 209, "answer", fontsize=TEXT, color=INK, ha="center", va="center")
        axes.text(130, 187, "“blue”", fontsize=SMALL, color=MUTED, ha="center", va="center")
        _draw_arrow(axes, (182, 421), (290, 421), DEVICE[1])
        _draw_arrow(axes, (380, 385), (380, 337), DEVICE[1])
        _draw_arrow(axes, (380, 283), (380, 235), DEVICE[1])
        _draw_arrow(axes, (290, 199), (176, 199), DEVICE[1])
        # The cloud.
        _draw_box(axes, 770, 385, 220, 72, ("white", CLOUD[1]), "ADR: VAE,\nre-normalisation")
        _draw_box(axes, 770, 163, 220, 72, ("white", CLOUD[1]), "FDA:\nhypernetwork")
        _draw_arrow(axes, (880, 385), (880, 235), CLOUD[1])
        # The messages.
        _draw_arrow(axes, (470, 421), (770, 421), INK, 2.2)
        axes.text(620, 433, "anchor feature\nof one frame", fontsize=TEXT, color=INK, ha="center", va="bottom")
        axes.text(620, 409, "192 floats, 768 bytes", fontsize=SMALL, color=MUTED, ha="center", va="top")
        _draw_arrow(axes, (770, 199), (470, 199), INK, 2.2)
        axes.text(620, 211, "weights of\nthe last layer", fontsize=TEXT, color=INK, ha="center", va="bottom")
        # The session.
        _draw_box(axes, 20, 20, 1000, 86, BOTH)
        axes.text(38, 63, "session\n(ours)", color=INK, fontsize=HEAD, weight="bold", va="center", linespacing=1.3)
        for left, width, text in (
            (140, 260, "readings of n other,\nunlabelled clips"),
            (450, 220, "their mean:\n192 floats, 768 bytes"),
            (720, 280, "change of the shared layer,\nfor all questions"),
        ):
            _draw_box(axes, left, 33, width, 60, ("white", BOTH[1]), text)
        _draw_arrow(axes, (400, 63), (450, 63), BOTH[1])
        _draw_arrow(axes, (670, 63), (720, 63), BOTH[1])
        return encode_png(figure)


def _draw_box(
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


def _draw_arrow(
    axes: "Axes", start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.6
) -> None:
    axes.annotate("", end, start, arrowprops={
        "arrowstyle": "-|>", "color": color, "linewidth": width, "mutation_scale": 15, "shrinkA": 2, "shrinkB": 2,
    })  # fmt: skip


def _draw_picture(axes: "Axes", left: float, bottom: float, side: int, time: float) -> None:
    """Draw a frame of a synthetic clip of a moving disk, at `time` from 0 to 1."""
    y, x = np.mgrid[:side, :side] / side
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = (214, 226, 238)
    picture[(x - 0.3 - 0.4 * time) ** 2 + (y - 0.62 + 0.2 * time) ** 2 < 0.035] = (11, 92, 173)
    draw_image(axes, picture, left, bottom, side)
    x, y = left + side * np.array([0, 1, 1, 0, 0]), bottom + side * np.array([0, 0, 1, 1, 0])
    axes.plot(x, y, color="white", linewidth=2, zorder=2)
