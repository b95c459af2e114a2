"""Plots as inline SVG, written by hand: few elements, text that stays text, a title on every mark."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

from cdc_mmpg.report.figures import INK, MUTED, spread

WIDTH, HEIGHT = 760, 380  # units of every plot; the page scales them
GRID = "#e6eaef"
LETTER = 6.9  # width of a letter at 12 units, rather too much


class Point(NamedTuple):
    """A mark: where, what it says, and its interval."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points of one colour."""

    label: str
    color: str
    points: Sequence[Point]
    dashed: bool = False  # a line over the whole width at the first point's height
    square: bool = False


class _Frame(NamedTuple):
    """The area of the data, and what its edges stand for."""

    left: float
    top: float
    right: float
    bottom: float
    low: tuple[float, float]
    high: tuple[float, float]

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.low[0]) / (self.high[0] - self.low[0])

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.low[1]) / (self.high[1] - self.low[1])


def lines(
    title: str, series: Sequence[Series], x_label: str, y_label: str, ticks: Sequence[tuple[float, str]] = (),
    bands: bool = True,
) -> str:  # fmt: skip
    """Curves with their names at the right end; `ticks` are the places on the x axis and their names."""
    points = [point for each in series for point in each.points]
    solid = [point.x for each in series if not each.dashed for point in each.points]
    low, high = _range([end for p in points for end in (p.y, p.low, p.high) if end is not None])
    begin, end = min(solid), max(solid)
    right = WIDTH - 16 - LETTER * max(len(each.label) + 6 for each in series)
    frame = _Frame(56, 14, right, HEIGHT - 46, (begin, low), (max(end, begin + 1e-9), high))
    marks = []
    for each in series:
        places = [(frame.x(p.x), frame.y(p.y)) for p in each.points]
        if each.dashed:
            marks.append(_path([(frame.left, places[0][1]), (frame.right, places[0][1])], each.color, "5 4",
                               each.points[0].title))  # fmt: skip
            continue
        banded = [p for p in each.points if p.low is not None and p.high is not None]
        if bands and len(banded) > 1:
            edge = [(frame.x(p.x), frame.y(p.low or 0)) for p in banded]
            edge += [(frame.x(p.x), frame.y(p.high or 0)) for p in reversed(banded)]
            marks.append(f'<polygon points="{_points(edge)}" fill="{each.color}" opacity=".13"/>')
        marks.append(_path(places, each.color, "", each.label))
        if len(places) <= 12:
            marks += [_dot(x, y, each.color, p.title) for (x, y), p in zip(places, each.points, strict=True)]
    ends = sorted(series, key=lambda each: -each.points[-1].y)
    heights = spread([frame.y(each.points[-1].y) for each in ends], 15, frame.top, frame.bottom)
    for each, height in zip(ends, heights, strict=True):
        place = frame.y(each.points[-1].y)
        marks.append(_path([(frame.right, place), (right + 9, height), (right + 12, height)], each.color, "", "", 1))
        text = f"{each.points[-1].y:.1f} {each.label}"
        marks.append(_text(right + 15, height + 4, text, each.color))
    named = ticks or [(value, f"{value:g}") for value in _nice(begin, end, 8) if value == round(value)]
    return _svg(title, _axes(frame, named, x_label, y_label) + "".join(marks))


def scatter(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Marks over a logarithmic x axis, at whose left end stands 0; every mark is named."""
    positive = [p.x for each in series for p in each.points if p.x > 0]
    begin, end = (floor(log10(min(positive))), ceil(log10(max(positive)) + 0.15)) if positive else (0, 1)
    zero = begin - 0.8 if any(p.x <= 0 for each in series for p in each.points) else begin
    low, high = _range([end for e in series for p in e.points for end in (p.y, p.low, p.high) if end is not None])
    frame = _Frame(56, 14, WIDTH - 40, HEIGHT - 46, (zero - 0.25, low), (end, high))
    ticks = [(float(power), f"{10**power:,}") for power in range(begin, end + 1)]
    ticks = [(zero, "0"), *ticks] if zero != begin else ticks
    marks, boxes, names = [], [], []
    for each in series:
        for p in each.points:
            x, y = frame.x(log10(p.x) if p.x > 0 else zero), frame.y(p.y)
            if p.low is not None and p.high is not None:
                marks.append(_path([(x, frame.y(p.low)), (x, frame.y(p.high))], each.color, "", "", 1, 0.45))
            marks.append(_square(x, y, each.color, p.title) if each.square else _dot(x, y, each.color, p.title, 5))
            boxes.append((x - 6, y - 6, x + 6, y + 6))
            names.append((x, y, p.title.partition(":")[0], each.color))
    for x, y, name, color in names:
        width, room = LETTER * len(name), [*boxes]
        choices = [(side, y + 4 + dy) for dy in (0, 14, -14, 28, -28, 42, -42, 56, -56, 70, -70) for side in (1, -1)]
        fits = [
            (side, b, box)
            for side, b in choices
            if (box := (x + 9, b - 10, x + 9 + width, b + 3) if side > 0 else (x - 9 - width, b - 10, x - 9, b + 3))
            and frame.left < box[0] and box[2] < WIDTH and frame.top < box[1] and box[3] < frame.bottom
        ]  # fmt: skip
        free = [each for each in fits if not any(_overlap(each[2], box) for box in room)]
        side, b, box = (free or fits or [(1, y + 4, (x, y, x, y))])[0]
        boxes.append(box)
        if abs(b - y - 4) > 14:
            marks.append(_path([(x, y), (x + 8 * side, b - 4)], color, "", "", 0.8, 0.7))
        marks.append(_text(x + 9 * side, b, name, color, "start" if side > 0 else "end"))
    return _svg(title, _axes(frame, ticks, x_label, y_label) + "".join(marks))


def bars(title: str, points: Sequence[Point], x_label: str, y_label: str, colors: tuple[str, str]) -> str:
    """Bars from zero, of one colour above and another below."""
    low, high = _range([0, *(point.y for point in points)])
    low = 0 if all(point.y >= 0 for point in points) else low
    frame = _Frame(56, 14, WIDTH - 16, HEIGHT - 46, (-0.5, low), (len(points) - 0.5, high))
    wide = (frame.right - frame.left) / len(points)
    marks = []
    for place, point in enumerate(points):
        top, bottom = sorted((frame.y(point.y), frame.y(0)))
        marks.append(
            f'<rect x="{frame.x(place) - 0.4 * wide:.1f}" y="{top:.1f}" width="{0.8 * wide:.1f}" '
            f'height="{max(bottom - top, 1):.1f}" fill="{colors[point.y < 0] if point.y else GRID}">'
            f"<title>{escape(point.title)}</title></rect>"
        )
    zero = _path([(frame.left, frame.y(0)), (frame.right, frame.y(0))], MUTED, "", "", 1)
    return _svg(title, _axes(frame, [], x_label, y_label) + "".join(marks) + zero)


def pairs(
    title: str, points: Sequence[tuple[Point, Point]], x_label: str, y_label: str, names: tuple[str, str],
    colors: tuple[str, str],
) -> str:  # fmt: skip
    """Two dots of each, joined: before and after."""
    low, high = _range([each.y for pair in points for each in pair])
    frame = _Frame(56, 36, WIDTH - 16, HEIGHT - 46, (-0.7, low), (len(points) - 0.3, high))
    marks = []
    for place, (before, after) in enumerate(points):
        x = frame.x(place)
        marks.append(_path([(x, frame.y(before.y)), (x, frame.y(after.y))], "#afb8c1", "", "", 1.5))
        marks += [
            _dot(x, frame.y(each.y), color, each.title, 3.5)
            for each, color in zip((before, after), colors, strict=True)
        ]
    x = frame.left
    for name, color in zip(names, colors, strict=True):
        marks += [_dot(x + 5, 16, color, name, 4), _text(x + 14, 20, name, color)]
        x += 34 + LETTER * len(name)
    return _svg(title, _axes(frame, [], x_label, y_label) + "".join(marks))


def stacked(
    title: str, rows: Sequence[tuple[str, Sequence[Point]]], names: Sequence[str], colors: Sequence[str]
) -> str:
    """Horizontal bars of parts, a row each; the points' x are their lengths."""
    most = max(sum(part.x for part in parts) for _, parts in rows) or 1
    left = 12 + LETTER * max(len(label) for label, _ in rows)
    height = 34 + 22 * len(rows)
    marks, x = [], left
    for name, color in zip(names, colors, strict=True):
        marks += [_square(x + 5, 14, color, name), _text(x + 15, 18, name, INK)]
        x += 36 + LETTER * len(name)
    for place, (label, parts) in enumerate(rows):
        y, x = 30 + 22 * place, left
        marks.append(_text(left - 8, y + 12, label, INK, "end"))
        for part, color in zip(parts, colors, strict=True):
            long = (WIDTH - 90 - left) * part.x / most
            marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(long, 0.5):.1f}" height="16" fill="{color}">'
                f"<title>{escape(part.title)}</title></rect>"
            )
            x += long
        marks.append(_text(x + 6, y + 12, f"{sum(part.x for part in parts):,.0f} s", MUTED))
    return _svg(title, "".join(marks), height)


def _svg(title: str, content: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}" font-size="12">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )


def _axes(frame: _Frame, ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
    """Horizontal lines with their values, names below, and what both axes are."""
    parts = []
    for value in _nice(frame.low[1], frame.high[1], 6):
        y = frame.y(value)
        parts.append(_path([(frame.left, y), (frame.right, y)], GRID, "", "", 1))
        parts.append(_text(frame.left - 8, y + 4, f"{value:g}".replace("-", "−"), MUTED, "end"))
    for value, name in ticks:
        parts.append(_text(frame.x(value), frame.bottom + 18, name, MUTED, "middle"))
    parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 38, x_label, INK, "middle"))
    middle = (frame.top + frame.bottom) / 2
    parts.append(
        f'<text x="14" y="{middle:.1f}" fill="{INK}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:.1f})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With some air."""
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 1
    return low - air, high + air


def _nice(low: float, high: float, most: int) -> list[float]:
    """Round values between the two, at most so many."""
    span = max(high - low, 1e-9)
    step = 10 ** floor(log10(span / most))
    step = next(step * k for k in (1, 2, 5, 10, 20) if span / (step * k) <= most)
    return [round(step * k, 10) for k in range(ceil(low / step), floor(high / step) + 1)]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _path(
    places: Sequence[tuple[float, float]], color: str, dashes: str, title: str, width: float = 1.8, opacity: float = 1
) -> str:
    extra = (f' stroke-dasharray="{dashes}"' if dashes else "") + (f' opacity="{opacity}"' if opacity != 1 else "")
    inside = f"><title>{escape(title)}</title></polyline>" if title else "/>"
    return f'<polyline points="{_points(places)}" fill="none" stroke="{color}" stroke-width="{width}"{extra}{inside}'


def _dot(x: float, y: float, color: str, title: str, radius: float = 4) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"><title>{escape(title)}</title></circle>'


def _square(x: float, y: float, color: str, title: str) -> str:
    return (
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{color}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, color: str, anchor: str = "start") -> str:
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}"{place}>{escape(text)}</text>'


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
