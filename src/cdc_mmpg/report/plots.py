"""Charts as SVG for the page: readable on a phone, with a tooltip on every mark and the legend as text below."""

from collections.abc import Sequence
from itertools import product
from math import ceil, cos, floor, log10, pi, sin
from typing import TYPE_CHECKING, Literal, NamedTuple

from cdc_mmpg.evidence.facts import CitedText
from cdc_mmpg.program import escape_controls
from cdc_mmpg.report.canvas import (
    AXIS,
    GRID,
    INK,
    MUTED,
    SVG_DPI,
    EndLabel,
    add_pixel_axes,
    encode_svg,
    label_ends,
    open_canvas,
    set_tooltip,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 460, 320  # size of a chart in units; the page scales its width to 360 to 600 pixels
TEXT_SIZE = 12  # font size, units
LABEL_GAP = 13  # distance between labels, units
DIGIT_WIDTH = 7.5  # upper bound, units
MAX_DOTS = 12  # curves with at most this many points have dots


class Point(NamedTuple):
    """A mark: its position, tooltip and interval."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points of one color."""

    label: str
    color: str
    points: Sequence[Point]
    dashed: bool = False  # a line over the full width at the first point's height
    square: bool = False


class LegendEntry(NamedTuple):
    """An entry of the legend: mark and color in the chart, and label."""

    mark: Literal["line", "dashed", "dot", "square"]
    color: str
    label: str
    number: str = ""  # that also marks it in the chart


class Chart(NamedTuple):
    """A chart as SVG with its legend."""

    svg: str
    legend: Sequence[LegendEntry] = ()


def make_point(x: float, accuracy: CitedText, title: str) -> Point:
    """Return the mark of an accuracy with its interval, or with mean ± standard deviation."""
    value, *rest = (fact.amount for fact in accuracy.facts)
    if len(rest) == 2:
        return Point(x, value, title, rest[0], rest[1])
    return Point(x, value, title, value - rest[0], value + rest[0]) if rest else Point(x, value, title)


def draw_curves(axes: "Axes", series: Sequence[Series], bands: bool = True) -> None:
    """Draw curves of percentages with their intervals as bands, and dashed lines over the full width.

    Args:
        axes: axes to draw in, with the limits of x set.
        series: curves to draw, at least one.
        bands: whether to draw intervals.
    """
    ends = [end for curve in series for point in curve.points for end in _list_ends(point, bands and not curve.dashed)]
    low, high = min(ends), max(ends)
    margin = 0.06 * max(high - low, 1)
    axes.set_ylim(max(low - margin, 0), min(high + margin, 100))
    for curve in series:
        if curve.dashed:
            (point,) = curve.points
            line = axes.axhline(point.y, color=curve.color, linewidth=1.4, linestyle=(0, (5, 3)))
            set_tooltip(line, point.title)
            continue
        banded = [point for point in curve.points if point.low is not None and point.high is not None]
        if bands and len(banded) > 1:
            lows, highs = [point.low or 0 for point in banded], [point.high or 0 for point in banded]
            axes.fill_between([point.x for point in banded], lows, highs, color=curve.color, alpha=0.15, linewidth=0)
        (line,) = axes.plot([point.x for point in curve.points], [point.y for point in curve.points], color=curve.color,
                            linewidth=2, clip_on=False, zorder=5)  # fmt: skip
        set_tooltip(line, curve.label)
        for point in curve.points if len(curve.points) <= MAX_DOTS else ():
            _draw_dot(axes, point, curve.color, 6, "o")


def chart_lines(
    title: str, series: Sequence[Series], x_label: str, y_label: str, ticks: Sequence[tuple[float, str]] = (),
    bands: bool = True,
) -> Chart:  # fmt: skip
    """Draw curves with numbers at their right ends; `ticks` are positions on the x axis with their labels."""
    with open_canvas(WIDTH, max(HEIGHT, LABEL_GAP * len(series) + 80), SVG_DPI) as figure:
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

        axes = _add_axes(figure, x_label, y_label, right=46)
        places = [point.x for curve in series if not curve.dashed for point in curve.points]
        begin, end = min(places), max(places)
        axes.set_xlim(begin, end if end > begin else begin + 1)
        draw_curves(axes, series, bands)
        if ticks:
            axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ranked = sorted(series, key=lambda curve: -curve.points[-1].y)
        ends = [EndLabel(curve.points[-1].y, str(n), curve.color) for n, curve in enumerate(ranked, 1)]
        label_ends(axes, ends, TEXT_SIZE, LABEL_GAP)
        legend = [
            LegendEntry(
                "dashed" if curve.dashed else "line", curve.color, f"{curve.label}, {curve.points[-1].y:.1f}", str(n)
            )
            for n, curve in enumerate(ranked, 1)
        ]
        return Chart(encode_svg(figure, title), legend)


def chart_scatter(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Chart:
    """Draw numbered marks over a logarithmic x axis with 0 at its left end."""
    marks = [(point, group) for group in series for point in group.points]
    positive = [point.x for point, _ in marks if point.x > 0]
    begin, end = (floor(log10(min(positive))), ceil(log10(max(positive)) + 0.15)) if positive else (0, 1)
    zero = begin - 0.8 if len(positive) < len(marks) else begin
    with open_canvas(WIDTH, HEIGHT, SVG_DPI) as figure:
        axes = _add_axes(figure, x_label, y_label, right=34)
        axes.set_xlim(zero - 0.25, end)
        axes.set_ylim(*_add_margin([end for point, _ in marks for end in _list_ends(point, True)]))
        ticks = {zero: "0"} | {float(power): f"{10**power:,}" for power in range(begin, end + 1)}
        axes.set_xticks(list(ticks), list(ticks.values()))
        placed = [(point._replace(x=log10(point.x) if point.x > 0 else zero), group) for point, group in marks]
        for point, group in placed:
            if point.low is not None and point.high is not None:
                axes.plot([point.x] * 2, [point.low, point.high], color=group.color, linewidth=1, alpha=0.45)
            _draw_dot(axes, point, group.color, 8, "s" if group.square else "o")
        _number_marks(axes, [(point.x, point.y, group.color) for point, group in placed])
        legend = [
            LegendEntry("square" if group.square else "dot", group.color, group.label, str(n))
            for n, (_, group) in enumerate(marks, 1)
        ]
        return Chart(encode_svg(figure, title), legend)


def chart_bars(title: str, points: Sequence[Point], x_label: str, y_label: str, colors: tuple[str, str]) -> Chart:
    """Draw bars from zero, with one color above zero and another below."""
    with open_canvas(WIDTH, HEIGHT, SVG_DPI) as figure:
        axes = _add_axes(figure, x_label, y_label)
        axes.set_xlim(-0.5, len(points) - 0.5)
        low, high = _add_margin([0, *(point.y for point in points)])
        axes.set_ylim(0 if all(point.y >= 0 for point in points) else low, high)
        axes.set_xticks([])
        for place, point in enumerate(points):
            color = colors[point.y < 0] if point.y else GRID
            (bar,) = axes.bar(place, point.y, 0.8, color=color, edgecolor=color, linewidth=0 if point.y else 1)
            set_tooltip(bar, point.title)
        axes.axhline(0, color=MUTED, linewidth=1)
        return Chart(encode_svg(figure, title))


def chart_pairs(
    title: str, points: Sequence[tuple[Point, Point]], x_label: str, y_label: str, names: tuple[str, str],
    colors: tuple[str, str],
) -> Chart:  # fmt: skip
    """Draw each pair as two connected dots, before and after."""
    with open_canvas(WIDTH, HEIGHT, SVG_DPI) as figure:
        axes = _add_axes(figure, x_label, y_label)
        axes.set_xlim(-0.7, len(points) - 0.3)
        axes.set_ylim(*_add_margin([point.y for pair in points for point in pair]))
        axes.set_xticks([])
        for place, pair in enumerate(points):
            axes.plot([place] * 2, [point.y for point in pair], color=AXIS, linewidth=1.5)
            for point, color in zip(pair, colors, strict=True):
                _draw_dot(axes, point._replace(x=place), color, 6, "o")
        legend = [LegendEntry("dot", color, name) for name, color in zip(names, colors, strict=True)]
        return Chart(encode_svg(figure, title), legend)


def chart_stacked(
    title: str, rows: Sequence[tuple[str, Sequence[Point]]], names: Sequence[str], colors: Sequence[str]
) -> Chart:
    """Draw stacked horizontal bars, each below its name; the x of a point is the length of a part in seconds."""
    longest = max(sum(part.x for part in parts) for _, parts in rows) or 1
    step, text_height, thick = 42, 17, 13
    with open_canvas(WIDTH, step * len(rows) + 6, SVG_DPI) as figure:
        axes = add_pixel_axes(figure)
        for number, (label, parts) in enumerate(rows):
            top, left = figure.bbox.height - step * number - 4, 4.0
            axes.text(left, top, escape_controls(label), fontsize=TEXT_SIZE, color=INK, va="top")
            middle = top - text_height - thick / 2
            for part, color in zip(parts, colors, strict=True):
                length = max((WIDTH - 90) * part.x / longest, 0.5)
                (bar,) = axes.barh(middle, length, thick, left, color=color)
                set_tooltip(bar, part.title)
                left += length
            total = f"{sum(part.x for part in parts):,.0f} s"
            axes.text(left + 6, middle, total, fontsize=TEXT_SIZE, color=MUTED, va="center_baseline")
        legend = [LegendEntry("square", color, name) for name, color in zip(names, colors, strict=True)]
        return Chart(encode_svg(figure, title), legend)


def _add_axes(figure: "Figure", x_label: str, y_label: str, right: float = 14) -> "Axes":
    """Add the axes of a chart, with room for its labels and `right` units of space at the right."""
    left, top, bottom, height = 54, 12, 46, figure.bbox.height
    width = WIDTH - left - right
    axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, (height - top - bottom) / height))
    style_axes(axes, x_label, y_label, TEXT_SIZE, TEXT_SIZE)
    return axes


def _draw_dot(axes: "Axes", point: Point, color: str, size: float, marker: str) -> None:
    (dot,) = axes.plot([point.x], [point.y], color=color, marker=marker, markersize=size, linestyle="none",
                       markeredgewidth=0, clip_on=False, zorder=6)  # fmt: skip
    set_tooltip(dot, point.title)


def _number_marks(axes: "Axes", marks: Sequence[tuple[float, float, str]]) -> None:
    """Number the marks (x, y, color) from 1, each number where it covers neither a mark nor another number."""
    pixels = [tuple(map(float, axes.transData.transform((x, y)))) for x, y, _ in marks]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    area = axes.bbox.expanded(1.02, 1.02)
    for number, ((x, y), (_, _, color)) in enumerate(zip(pixels, marks, strict=True), 1):
        half = DIGIT_WIDTH * len(str(number)) / 2
        for radius, turn in product((12, 17, 24, 32, 42, 54, 68), range(16)):
            a, b = x + radius * cos(turn * pi / 8), y + radius * sin(turn * pi / 8)
            box = (a - half, b - 6, a + half, b + 6)
            inside = area.x0 < box[0] and box[2] < area.x1 and area.y0 < box[1] and box[3] < area.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        place = axes.transData.inverted().transform((a, b))
        if radius > 17:
            edge = axes.transData.inverted().transform((a + (x - a) * 8 / radius, b + (y - b) * 8 / radius))
            start = axes.transData.transform(marks[number - 1][:2])
            from_mark = axes.transData.inverted().transform(
                (start[0] + (a - x) * 5 / radius, start[1] + (b - y) * 5 / radius)
            )
            axes.plot([from_mark[0], edge[0]], [from_mark[1], edge[1]], color=color, linewidth=0.7)
        axes.text(
            place[0],
            place[1],
            str(number),
            color=color,
            fontsize=TEXT_SIZE,
            ha="center",
            va="center_baseline",
            zorder=7,
        )


def _list_ends(point: Point, interval: bool) -> list[float]:
    """Return a point's height and, if `interval`, the ends of its interval."""
    ends = (point.y, point.low, point.high) if interval else (point.y,)
    return [end for end in ends if end is not None]


def _add_margin(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of values, extended by a margin."""
    low, high = min(values), max(values)
    margin = 0.07 * (high - low) or 1
    return low - margin, high + margin


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
