"""Charts: the SVG is a well-formed, style-free picture of the figures given, in the page's colours."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from django.template import Context, Engine

from saehub import charts

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: charts.Chart) -> ElementTree.Element:
    """The parsed SVG, having passed what holds for every chart."""
    root = ElementTree.fromstring(chart.svg)
    elements = list(root.iter())
    assert root.attrib["role"] == "img" and chart.title in root.attrib["aria-label"]
    assert {element.tag for element in elements} <= {SVG + tag for tag in ("svg", "g", "path", "line", "rect", "text")}
    assert not any(name == "style" or name.startswith("on") for element in elements for name in element.attrib)
    colours = {element.attrib[name] for element in elements for name in ("fill", "stroke") if name in element.attrib}
    assert all(colour == "none" or colour.startswith("var(--") for colour in colours - {"transparent"}), colours
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(SVG + "text")]


def labels(svg: str) -> list[str]:
    """Figures along the axes."""
    return re.findall(r">([\d.]+)</text>", svg)


def test_counts_have_whole_ticks_and_a_level_line_stands_in_the_middle() -> None:
    x = [0, 1e6, 2e6]  # labelled 0, 500k, 1M, ...
    for dead in ([0, 1, 0], [0, 0, 0]):
        few = charts.curves(x, {"dead": dead}, title="Dead", x_title="steps")
        assert sorted(labels(few.svg)) == ["0", "0", "1"], "of x, of y, of y"
    level = charts.curves(x, {"L0": [32.0, 32.0, 32.0]}, title="L0", x_title="steps")
    assert sorted(labels(level.svg)) == ["0", "30", "32", "34"]


def test_log_scatter_has_round_ticks_that_lie_about_its_points() -> None:
    points = [(8.0, 0.83, "k 8", "a"), (32.0, 0.87, "k 32", "a")]
    chart = charts.scatter(points, title="Sweep", x_title="L0", y_title="variance", log_x=True)
    assert [text for text in texts(drawn(chart)) if text.isdigit()] == ["5", "10", "20", "50"]


def test_long_names_do_not_run_out_of_the_legend() -> None:
    names = [f"{letter} smollm2-135m-instruct-layer9-topk" for letter in "ABCD"]
    points = [(i + 1.0, i + 1.0, name[0], name) for i, name in enumerate(names)]
    root = drawn(charts.scatter(points, title="Four", x_title="L0", y_title="variance"))
    shifts = {
        float(g.attrib["transform"].split("(")[1].split(",")[0])
        for g in root.iter(SVG + "g")
        if "transform" in g.attrib
    }
    assert max(shifts) < 400, "an entry of the legend begins where its name has room in 560"


def test_scatter_of_one_point_does_not_round_its_only_figure_away() -> None:
    chart = charts.scatter([(32.0, 0.911, "A", "a")], title="One", x_title="L0", y_title="variance")
    ticks = [float(text) for text in texts(drawn(chart)) if text.startswith(("0.", "1."))]
    assert len(ticks) >= 3 and min(ticks) < 0.911 < max(ticks)


def bars(root: ElementTree.Element, colour: str) -> list[ElementTree.Element]:
    return [path for path in root.iter(SVG + "path") if path.attrib.get("fill") == colour and path.attrib.get("d")]


def test_curves_draw_one_line_a_series_with_titles_and_legend() -> None:
    x = list(range(0, 2_000_000, 100_000))
    loss = [1 / (1 + at / 1e5) for at in x]
    held = [value + 0.1 if i % 4 == 0 else None for i, value in enumerate(loss)]
    chart = charts.curves(
        x, {"train": loss, "held out": held}, title="Loss", x_title="tokens", y_title="nats", n="1 batch"
    )
    root = drawn(chart)
    lines = {
        path.attrib["stroke"]: path
        for path in root.iter(SVG + "path")
        if path.attrib.get("stroke", "").startswith("var")
    }
    assert set(lines) >= {charts.ACCENT, charts.OK}
    assert {"tokens", "nats", "train", "held out"} <= set(texts(root))
    assert chart.columns == ("tokens", "train", "held out")
    assert chart.rows[0] == (0, loss[0], held[0]) and chart.rows[1] == (100_000, loss[1], None)


def test_curves_without_points_or_with_one_or_with_nan_are_still_charts() -> None:
    for x, y in (([], []), ([0], [1.0]), ([0, 1, 2], [math.nan, None, math.inf])):
        chart = charts.curves(x, {"loss": y}, title="Loss", x_title="tokens")
        drawn(chart)
        assert len(chart.rows) == len(x)
    assert chart.rows == [(0, None), (1, None), (2, None)]


def test_a_log_axis_leaves_out_what_it_cannot_show() -> None:
    chart = charts.curves([0, 1, 2], {"dead": [0, 10, 1000]}, title="Dead", x_title="steps", log_y=True)
    drawn(chart)
    assert chart.rows[0] == (0, 0)


def test_what_lies_outside_the_domain_is_in_the_table_only() -> None:
    chart = charts.curves([0, 1, 2], {"ev": [-40, 0.5, 0.8]}, title="EV", x_title="steps", y_domain=(0, 1))
    line = next(path for path in drawn(chart).iter(SVG + "path") if path.attrib.get("stroke") == charts.ACCENT)
    assert line.attrib["d"].count("L") == 1 and chart.rows[0] == (0, -40)


def test_series_must_fit_x_and_each_other() -> None:
    with pytest.raises(ValueError):
        charts.curves([0, 1], {"loss": [1.0]}, title="Loss", x_title="tokens")
    with pytest.raises(ValueError, match="4 lines at most, not 5"):
        charts.curves([0], {str(i): [1.0] for i in range(5)}, title="Loss", x_title="tokens")


@pytest.mark.parametrize("log_y", [False, True])
def test_histogram_has_a_bar_for_every_filled_bin(log_y: bool) -> None:
    counts, edges = np.array([100, 10, 1, 0, 3]), np.linspace(0, 5, 6)
    chart = charts.histogram(counts, edges, title="Activations", x_title="activation", n="114 tokens", log_y=log_y)
    root = drawn(chart)
    assert len(bars(root, charts.ACCENT)) == (4 if log_y else 5)
    assert {"activation", "tokens"} <= set(texts(root))
    assert chart.rows == [(0.0, 1.0, 100), (1.0, 2.0, 10), (2.0, 3.0, 1), (3.0, 4.0, 0), (4.0, 5.0, 3)]


def test_density_histogram_sets_the_dead_apart_and_marks_the_dense() -> None:
    edges = np.linspace(-4, 0, 17)
    counts = np.arange(16)
    chart = charts.density_histogram(counts, edges, dead=7, n="111,482 tokens")
    root = drawn(chart)
    legend = 1  # a square of each colour in the legend
    assert len(bars(root, charts.MUTED)) == 1 + legend
    assert len(bars(root, charts.WARN)) == 4 + legend  # the quarter decades from 10 % to 100 %
    assert len(bars(root, charts.ACCENT)) == 12 + legend
    assert {"0.01", "1", "100", "dead", "alive", "over 10 %"} <= set(texts(root))
    assert chart.rows[0] == (0, 0, 7) and chart.rows[-1][2] == 15
    assert chart.rows[-1][1] == pytest.approx(1)


def test_equal_charts_are_drawn_once() -> None:
    def draw() -> str:
        return charts.histogram([1, 2], [0, 1, 2], title="Once", x_title="x").svg

    first = draw()
    hits = charts._draw.cache_info().hits
    assert draw() is first and charts._draw.cache_info().hits == hits + 1


def test_names_cannot_break_out_of_the_svg() -> None:
    chart = charts.curves([0, 1], {"a</text><script>": [1, 2], "b": [1, 2]}, title='"><script>', x_title="<b>")
    assert "<script" not in chart.svg and "<b>" not in chart.svg
    drawn(chart)


def test_the_include_shows_n_the_table_and_the_downloads() -> None:
    chart = charts.histogram([3, 4], [0.0, 0.5, 1.0], title="Activations", x_title="activation", n="7 tokens")
    root = str(charts.__file__).rsplit("/", 2)[0]
    engine = Engine(dirs=[f"{root}/templates"], builtins=["saehub.figures"])
    shown = engine.get_template("chart.html").render(Context({"chart": chart}))
    assert "n = 7 tokens" in shown and chart.svg in shown and 'data-save="csv"' in shown
    assert '<td class="n" data-v="0.5">0.5000</td>' in shown and '<td class="n" data-v="4">4</td>' in shown
    assert " style=" not in shown


def spread(chart: charts.Chart, values: list[float]) -> float:
    """How much of the picture's height a line takes up."""
    line = next(e for e in drawn(chart).iter(SVG + "path") if e.attrib.get("d", "").count("L") == len(values) - 1)
    ys = [float(y) for y in re.findall(r",(-?[\d.]+)", line.attrib["d"])]
    return (max(ys) - min(ys)) / 180


def test_noise_is_drawn_as_the_level_line_it_is() -> None:
    noise = [32 - (i * 7 % 10) * 1e-4 for i in range(30)]
    level = charts.curves(list(range(30)), {"L0": noise}, title="L0", x_title="steps", y_title="features")
    assert spread(level, noise) < 0.01
    assert {"31.9", "32.0", "32.1"} <= set(labels(level.svg))
    course = [0.80 + 0.1 * i / 30 for i in range(30)]
    rising = charts.curves(list(range(30)), {"EV": course}, title="EV", x_title="steps", y_title="share")
    assert spread(rising, course) > 0.6, "what varies fills its chart"
    many = charts.curves([0, 1, 2], {"dead": [1000, 1001, 1002]}, title="Dead", x_title="steps")
    assert "1,001" not in many.svg, "ticks lie along the whole axis, not beside each other in its middle"
