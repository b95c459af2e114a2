"""Charts of the report page: text kept as text, a tooltip on every mark, no overlapping labels, reproducible SVG."""

import re
from xml.etree import ElementTree

import pytest

from cdc_mmpg.report.plots import Point, Series, chart_bars, chart_lines, chart_pairs, chart_scatter, chart_stacked

NAME = "a <b> & $x_1$ \x1b[31m"
SHOWN = "a <b> & $x_1$ \\x1b[31m"


def draw_charts():
    """Yield one chart of each kind, with hostile names and boundary values."""
    points = [
        Point(0, 50.0, f"{NAME}: 50"),
        Point(768, 0.0, "none", 0.0, 10.0),
        Point(10**6, 100.0, "all", 90.0, 100.0),
    ]
    series = [Series(NAME, "#0b5cad", points), Series("dashed", "#6b7280", [Point(0, 40.0, "forty")], dashed=True)]
    yield chart_lines("title", series, "x", "y")
    yield chart_lines("title", series, "x", "y", [(0, "none"), (10**6, "many")], bands=False)
    yield chart_scatter("title", [Series(NAME, "#0b5cad", points, square=True)], "x", "y")
    yield chart_bars("title", [*points, Point(0, -20.0, "less")], "x", "y", ("#0b5cad", "#cf3f2e"))
    yield chart_pairs("title", [(points[0], points[1])], "x", "y", (NAME, "after"), ("#0b5cad", "#cf3f2e"))
    yield chart_stacked("title", [(NAME, points[:2]), ("other", points[1:])], ("a", "b"), ("#0b5cad", "#cf3f2e"))


def test_charts_keep_text_have_tooltips_and_are_reproducible(monkeypatch):
    import matplotlib

    first = [chart.svg for chart in draw_charts()]
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)  # settings of the user must not matter
    assert [chart.svg for chart in draw_charts()] == first
    for svg in first:
        root = ElementTree.fromstring(svg)
        assert root.attrib["viewBox"].startswith("0 0 460 ")
        assert root.attrib["aria-label"] == root.find("title").text == "title"
        assert not re.search(r"https?:|url\(|font-family| id=", svg)
        assert len({path.text for path in root.iter("text")}) > 1
        assert any(SHOWN in (title.text or "") for title in root.iter("title")) or SHOWN in root.itertext()


@pytest.mark.parametrize("number", [2, 12])
def test_labels_of_marks_and_lines_do_not_overlap(number):
    close = [Series(f"method {n}", "#0b5cad", [Point(1000 + n, 50 + n / 10, "")]) for n in range(number)]
    scattered = chart_scatter("title", close, "x", "y")
    curves = [series._replace(points=[Point(0, 40, ""), Point(1, 50 + n / 100, "")]) for n, series in enumerate(close)]
    for chart in (scattered, chart_lines("title", curves, "x", "y", [(0, "first"), (1, "second")])):
        assert [entry.number for entry in chart.legend] == [str(n) for n in range(1, number + 1)]
        positions = {}
        for text in ElementTree.fromstring(chart.svg).iter("text"):
            color = re.search("fill: (#[0-9a-f]+)", text.attrib["style"])
            if color and color[1] == "#0b5cad":
                positions[text.text] = float(text.attrib["x"]), float(text.attrib["y"])
        assert len(positions) == number
        for a, (x, y) in positions.items():
            others = [position for b, position in positions.items() if a != b]
            assert all(abs(y - below) > 10 or abs(x - left) > 6 * len(a) for left, below in others)
