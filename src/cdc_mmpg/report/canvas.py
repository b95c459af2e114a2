"""Drawing tools that all figures share: colors, a reproducible canvas, PNG and SVG encoders, spaced labels."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.media.frames import Frames
from cdc_mmpg.program import escape_controls

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, AXIS = "#1f2328", "#59636e", "#e6eaef", "#afb8c1"
PNG_DPI = 100
SVG_DPI = 72  # one point is one unit of the picture
TEXT, SMALL, HEAD = 11.5, 10.5, 13.0  # font sizes in PNGs, points

TOOLTIP_PREFIX = "tooltip:"  # of the ids of artists with a tooltip
SVG_TAG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


class EndLabel(NamedTuple):
    """A label at the right end of a line."""

    value: float  # y of the line at its end
    text: str
    color: str
    weight: str = "normal"


@contextmanager
def open_canvas(width: int, height: int, dpi: int = PNG_DPI) -> "Iterator[Figure]":
    """Open a white figure of width x height pixels, without the user's matplotlib settings.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: PLC0415  slow to import, only for figures
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"figures need matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "cdc_mmpg", "text.parse_math": False}
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def add_pixel_axes(figure: "Figure") -> "Axes":
    """Add axes whose units are the figure's pixels, from the lower left."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    axes.set_xlim(0, figure.bbox.width)
    axes.set_ylim(0, figure.bbox.height)
    return axes


def draw_image(axes: "Axes", picture: Frames, left: float, bottom: float, side: int) -> None:
    """Draw a picture (H, W, 3) as a square of `side` pixels, in axes whose units are pixels."""
    axes.imshow(picture, extent=(left, left + side, bottom, bottom + side), aspect="auto", interpolation="nearest",
                zorder=2)  # fmt: skip


def encode_png(figure: "Figure") -> bytes:
    """Encode a figure as PNG with 256 colors, since noise does not compress; equal figures give equal bytes."""
    from PIL import Image  # noqa: PLC0415

    file, drawn = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=PNG_DPI)
    picture = Image.open(drawn).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def set_tooltip(artist: "Artist", text: str) -> None:
    """Give an artist a tooltip."""
    artist.set_gid(TOOLTIP_PREFIX + escape_controls(text))


def encode_svg(figure: "Figure", title: str) -> str:
    """Encode a figure as an SVG element of a page: no ids, no URLs, the page's fonts, tooltips as titles."""
    drawn = StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters missing in the local font: the page uses other fonts
        figure.savefig(drawn, format="svg", dpi=SVG_DPI, metadata={"Date": None})
    root = ElementTree.fromstring(drawn.getvalue().encode())
    paths = [path for defs in root.iter(f"{SVG_TAG}defs") for path in defs.iter(f"{SVG_TAG}path")]
    markers = {path.get("id", ""): path for path in paths}
    width, height = root.attrib["viewBox"].split()[2:]
    attributes = {"viewBox": f"0 0 {float(width):g} {float(height):g}", "role": "img", "aria-label": title}
    picture = ElementTree.Element("svg", attributes | {"stroke-linejoin": "round"})
    ElementTree.SubElement(picture, "title").text = title
    for child in root:
        _copy_shapes(child, picture, markers)
    return ElementTree.tostring(picture, encoding="unicode")


def _copy_shapes(
    element: ElementTree.Element, target: ElementTree.Element, markers: dict[str, ElementTree.Element]
) -> None:
    """Copy the paths and texts of matplotlib's SVG below `target`; each use of a marker becomes a path."""
    kind = element.tag.removeprefix(SVG_TAG)
    if kind == "g":
        identity = element.get("id", "")
        if identity.startswith(TOOLTIP_PREFIX):
            target = ElementTree.SubElement(target, "g")
            ElementTree.SubElement(target, "title").text = identity.removeprefix(TOOLTIP_PREFIX)
        for child in element:
            _copy_shapes(child, target, markers)
    elif kind == "path":
        ElementTree.SubElement(target, "path", {"d": _round(element.attrib["d"]), "style": element.get("style", "")})
    elif kind == "use":
        marker = markers[element.attrib[LINK].removeprefix("#")]
        style = "; ".join(filter(None, (marker.get("style"), element.get("style"))))
        offset = _round(f"translate({element.attrib['x']} {element.attrib['y']})")
        ElementTree.SubElement(target, "path", {"d": _round(marker.attrib["d"]), "style": style, "transform": offset})
    elif kind == "text":
        style = re.sub(r"font-family: [^;]*; ?", "", element.get("style", ""))
        place: dict[str, str] = {
            key: _round(element.attrib[key]) for key in ("x", "y", "transform") if key in element.attrib
        }
        if place.get("transform", "").startswith("rotate(-0 "):
            del place["transform"]
        ElementTree.SubElement(target, "text", {"style": style, **place}).text = element.text


def _round(text: str) -> str:
    """Round all decimal numbers of a text to two digits and put it on one line."""
    return re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), 2):g}", " ".join(text.split()))


def style_axes(axes: "Axes", x_label: str, y_label: str, text: float, small: float) -> None:
    """Give axes a horizontal grid, labels with font sizes `text` and `small` in points, and no frame."""
    axes.tick_params(length=0, pad=7, labelsize=small, colors=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.set_xlabel(x_label, fontsize=text, color=INK, labelpad=8)
    axes.set_ylabel(y_label, fontsize=text, color=INK, labelpad=8)


def label_ends(axes: "Axes", labels: Sequence[EndLabel], size: float, gap: float) -> None:
    """Write the labels of lines to the right of their ends, at least `gap` pixels apart."""
    labels = sorted(labels, key=lambda label: -label.value)[::-1]  # the first of equal values goes on top
    low, high = axes.get_ylim()
    height = axes.get_position().height * axes.figure.bbox.height
    places = spread_apart([label.value for label in labels], (high - low) * gap / height, low, high)
    right = axes.get_yaxis_transform()
    for (value, text, color, weight), place in zip(labels, places, strict=True):
        axes.plot([1.012, 1.04, 1.05], [value, place, place], color=color, linewidth=1, transform=right, clip_on=False)
        axes.text(1.058, place, text, color=color, fontsize=size, weight=weight, va="center_baseline",
                  transform=right)  # fmt: skip


def spread_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending places as little as possible, to be `gap` apart and, if there is room, in `low` to `high`."""
    blocks: list[tuple[float, int]] = []  # isotonic regression after subtracting the gaps: mean, size
    for number, place in enumerate(places):
        value, size = place - number * gap, 1
        while blocks and blocks[-1][0] > value:
            before, count = blocks.pop()
            value, size = (before * count + value * size) / (count + size), count + size
        blocks.append((value, size))
    flat = [value for value, size in blocks for _ in range(size)]
    highest = high - (len(flat) - 1) * gap
    return [max(min(value, highest), low) + number * gap for number, value in enumerate(flat)]
