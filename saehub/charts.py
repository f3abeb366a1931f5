"""Charts as server-rendered SVG: plain Vega-Lite specs, drawn by vl-convert.

Colours are CSS variables with their light value as fallback, so that one SVG follows the page's theme and, downloaded,
still stands on its own. The SVG holds no <style>, style attribute or script, as the content security policy asks. Show
a chart with `{% include "chart.html" %}`; it adds the n, the table and the downloads.

The library is loaded with the first chart (0.6 to 1.4 s and 90 MB, once in a process); from then on a chart takes 11 to
60 ms on an idle core, and equal charts come from a cache. It is drawn by a thread of its own, without the interpreter's
lock, from the moment it is made; a page waits only when it comes to write the SVG. So charts are best made first.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from html import escape
from typing import Any

from django.utils.safestring import SafeString, mark_safe
from django.utils.text import slugify

SOFT, LINE = "var(--soft, #565a66)", "var(--line, #e1e3e8)"
ACCENT, OK, WARN, RUN = "var(--accent, #4449c8)", "var(--ok, #0c6b3c)", "var(--warn, #8a5200)", "var(--run, #005f9e)"
MUTED = "var(--edge, #8b8f99)"
SERIES = (ACCENT, OK, WARN, RUN)
OVERLAID = (*SERIES, "var(--bad, #a4262c)", "var(--ink, #22242b)")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # so that colour is not the only thing that tells lines apart
DENSE = 0.1  # a feature that fires on more than a tenth of the tokens says little
WIDEST, LEGEND_LINE = 28, 70  # letters of a name in a legend, and of all names that fit in one line of it
HARDLY = 0.01  # of their size: an L0 of TopK between 31.999 and 32, an explained variance between 0.9951 and 0.9958
FLOOR = 0.8  # where the bars of a log axis begin, just under a count of one

Value = float | int | None


@dataclass(frozen=True)
class Chart:
    """A chart and the figures in it. `n` says in words what it rests on; rows hold the exact values."""

    title: str
    n: str
    drawing: Future[SafeString]
    columns: tuple[str, ...]
    rows: Sequence[tuple[Value, ...]]

    @property
    def svg(self) -> SafeString:
        """The picture, once it is drawn."""
        return self.drawing.result()

    @property
    def name(self) -> str:
        """For element ids and file names."""
        return slugify(self.title) or "chart"


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[Value]],
    *,
    title: str,
    x_title: str,
    y_title: str = "",
    n: str = "",
    y_domain: tuple[float, float] | None = None,
    log_y: bool = False,
    size: tuple[int, int] = (360, 180),
) -> Chart:
    """Lines over a common x: `series` maps a name to as many values as x has, None (or NaN) where there is none.

    Small multiples are several of them in a `<div class="charts">`. Values outside `y_domain`, and on a log axis those
    not above 0, are in the table but not drawn: a first step far off does not flatten the rest.
    Raises ValueError when a series is longer or shorter than x, or there are more than four.
    """
    if len(series) > len(SERIES):
        raise ValueError(f"A chart takes {len(SERIES)} lines at most, not {len(series)}; draw several charts.")
    low, high = y_domain or (5e-324 if log_y else -math.inf, math.inf)
    points = [
        {"x": at, "y": value, "s": name}
        for name, values in series.items()
        for at, value in zip(x, values, strict=True)
        if value is not None and math.isfinite(value) and low <= value <= high
    ]
    scale: dict[str, Any] = {"zero": False, "nice": y_domain is None, "type": "log" if log_y else "linear"}
    drawn = [point["y"] for point in points]
    if y_domain:
        scale["domain"] = list(y_domain)
    elif not log_y:
        scale |= _room(drawn)
    encoding = {
        "x": _axis(
            "x", x_title, labelExpr="format(datum.value, '~s')", tickCount=5, labelOverlap=True, scale={"nice": False}
        ),
        "y": _axis("y", y_title, scale=scale, **_ticks(drawn)),
        "color": _lines(series, range=list(SERIES[: len(series)])),
        "strokeDash": _lines(series, range=list(DASHES[: len(series)])),
    }
    mark = {"type": "line", "strokeWidth": 1.75, "point": len(points) <= len(series)}
    rows = [(at, *(_given(value) for value in values)) for at, *values in zip(x, *series.values(), strict=True)]
    svg = _svg({"data": {"values": points}, "mark": mark, "encoding": encoding}, size, f"{title}: {x_title}")
    return Chart(title, n, svg, (x_title, *series), rows)


def histogram(
    counts: Iterable[int],
    edges: Iterable[float],
    *,
    title: str,
    x_title: str,
    y_title: str = "tokens",
    n: str = "",
    log_y: bool = False,
    size: tuple[int, int] = (290, 150),
) -> Chart:
    """Bars of `counts` (b,) between `edges` (b + 1,). With log_y empty bins have no bar."""
    rows = _bins(counts, edges)
    bars = [{"low": low, "high": high, "count": count} for low, high, count in rows if count or not log_y]
    encoding = {
        "x": _axis("low", x_title, bin={"binned": True}, tickCount=5),
        "x2": {"field": "high"},
        "y": _counts(y_title, log_y, max((count for _, _, count in rows), default=1)),
        "y2": {"datum": FLOOR if log_y else 0},
        "color": {"value": ACCENT},
    }
    spec = {"data": {"values": bars}, "mark": _BAR, "encoding": encoding}
    return Chart(title, n, _svg(spec, size, f"{title}: {y_title} by {x_title}"), ("from", "to", y_title), rows)


def density_histogram(
    counts: Iterable[int],
    edges: Iterable[float],
    dead: int,
    *,
    title: str = "Feature density",
    n: str = "",
    log_y: bool = False,
    size: tuple[int, int] = (400, 190),
) -> Chart:
    """Features by density: counts (b,) between log10 densities `edges` (b + 1,), the dead ones apart at the left.

    Density is the share of the tokens on which a feature fires, so that an edge of -3 is 0.1 %. Bins from 10 % up are
    coloured as over-dense.
    """
    rows = _bins(counts, edges)
    step, first = rows[0][1] - rows[0][0], rows[0][0]
    dense = math.log10(DENSE) - 1e-9
    bars = [(low, high, count, "over 10 %" if low >= dense else "alive") for low, high, count in rows]
    bars.append((first - 2.5 * step, first - step, dead, "dead"))
    powers = list(range(math.ceil(first), 1))
    encoding = {
        "x": _axis(
            "low",
            "density, % of tokens (log scale)",
            bin={"binned": True},
            values=powers,
            labelExpr="format(pow(10, datum.value) * 100, '~g')",
            labelOverlap=True,
        ),
        "x2": {"field": "high"},
        "y": _counts("features", log_y, max(bar[2] for bar in bars)),
        "y2": {"datum": FLOOR if log_y else 0},
        "color": {"field": "kind", "type": "nominal", "legend": _LEGEND | {"symbolType": "square"}, "scale": _KINDS},
    }
    values = [dict(zip(("low", "high", "count", "kind"), bar, strict=True)) for bar in bars if bar[2] or not log_y]
    spec = {"data": {"values": values}, "mark": _BAR, "encoding": encoding}
    table: list[tuple[Value, ...]] = [(0, 0, dead), *((10**low, 10**high, count) for low, high, count in rows)]
    return Chart(title, n, _svg(spec, size, f"{title}: features by density"), ("density from", "to", "features"), table)


def densities(
    found: Mapping[str, Mapping[str, Any]],
    *,
    title: str = "Feature densities",
    n: str = "",
    size: tuple[int, int] = (560, 280),
) -> Chart:
    """Histograms of feature density over each other, as outlines in shares of the features, so that widths do not matter.

    found: name to {"counts", "edges" (log10, the same for all), "dead"}. Raises ValueError for more than six.
    """
    if len(found) > len(OVERLAID):
        raise ValueError(f"{len(OVERLAID)} histograms at most can be told apart, not {len(found)}.")
    shares = {}
    for name, bins in found.items():
        total = sum(bins["counts"]) + bins["dead"] or 1
        shares[name] = [bins["dead"] / total, *(count / total for count in bins["counts"])]
    edges = next(iter(found.values()))["edges"] if found else [0.0]
    step = edges[1] - edges[0] if len(edges) > 1 else 1.0
    middles = [edges[0] - 1.5 * step, *(edge + step / 2 for edge in edges[:-1])]
    points = [
        {"x": at, "y": value, "s": name}
        for name, values in shares.items()
        for at, value in zip(middles[1:], values[1:], strict=True)
    ]
    dead = [{"x": middles[0], "y": values[0], "s": name} for name, values in shares.items()]
    colour = _lines(shares, range=list(OVERLAID[: len(shares)]))
    dash = _lines(shares, range=[list(DASHES[at % len(DASHES)]) for at in range(len(shares))])
    x = _axis(
        "x",
        "density, % of tokens (log scale); dots at the left: dead",
        values=list(range(math.ceil(edges[0]), 1)),
        labelExpr="format(pow(10, datum.value) * 100, '~g')",
        labelOverlap=True,
        scale={"nice": False, "zero": False},
    )
    y = _axis("y", "share of features", tickCount=4, format="%")
    line = {"type": "line", "interpolate": "step", "strokeWidth": 1.75}
    layers = [
        {"data": {"values": points}, "mark": line, "encoding": {"color": colour, "strokeDash": dash}},
        {
            "data": {"values": dead},
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
            "encoding": {"color": colour},
        },
    ]
    svg = _svg({"encoding": {"x": x, "y": y}, "layer": layers}, size, f"{title}: share of features by density")
    rows: list[tuple[Value, ...]] = [
        (low, *(values[at] for values in shares.values())) for at, low in enumerate([0.0, *(10**e for e in edges[:-1])])
    ]
    return Chart(title, n, svg, ("density from", *shares), rows)


def scatter(
    points: Sequence[tuple[float, float, str, str]],
    *,
    title: str,
    x_title: str,
    y_title: str,
    n: str = "",
    log_x: bool = False,
    size: tuple[int, int] = (560, 280),
) -> Chart:
    """A labelled point for each (x, y, label, group); a thin line joins the points of a group from left to right.

    Groups are told apart by colour and dash, at most four of them; further ones are drawn like the first. Points whose x
    or y is not a number are left out, and on a log axis those with an x not above 0.
    """
    drawn = [
        {"x": x, "y": y, "label": label, "s": group}
        for x, y, label, group in points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)
    ]
    groups = dict.fromkeys(group for *_, group in points)
    place = {group: index % len(SERIES) for index, group in enumerate(groups)}
    colour = _lines(groups, range=[SERIES[place[group]] for group in groups])
    dash = _lines(groups, range=[list(DASHES[place[group]]) for group in groups])
    x_scale: dict[str, Any] = {"zero": False, "padding": 24}
    ticks: dict[str, Any] = {"tickCount": 6}
    if log_x and drawn:
        values = _log_ticks([point["x"] for point in drawn])
        x_scale, ticks = {"type": "log", "domain": [values[0], values[-1]], "nice": False}, {"values": values}
    at = {
        "x": _axis("x", x_title, scale=x_scale, labelExpr="format(datum.value, '~s')", labelOverlap=True, **ticks),
        "y": _axis("y", y_title, scale={"zero": False, "padding": 16} | _room([p["y"] for p in drawn]), tickCount=5),
    }
    layers = [
        {"mark": {"type": "line", "strokeWidth": 1}, "encoding": {"color": colour, "strokeDash": dash}},
        {"mark": {"type": "point", "filled": True, "size": 55, "opacity": 1}, "encoding": {"color": colour}},
        {
            "mark": {"type": "text", "dy": -9, "fontSize": 11, "color": SOFT, "limit": 120},
            "encoding": {"text": {"field": "label", "type": "nominal"}},
        },
    ]
    spec = {"data": {"values": drawn}, "encoding": at, "layer": layers}
    svg = _svg(spec, size, f"{title}: {y_title} by {x_title}")
    return Chart(title, n, svg, (x_title, y_title), [(_given(x), _given(y)) for x, y, *_ in points])


# -- pieces of a spec -------------------------------------------------------------------------------------------------
_LEGEND = {"title": None, "orient": "top", "symbolType": "stroke", "offset": 4, "columnPadding": 18}
_BAR = {"type": "bar", "binSpacing": 1, "opacity": 0.85}
_KINDS = {"domain": ["dead", "alive", "over 10 %"], "range": [MUTED, ACCENT, WARN]}
_AXIS = {
    "labelColor": SOFT, "titleColor": SOFT, "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 12,
    "gridColor": LINE, "domainColor": LINE, "ticks": False, "labelPadding": 5, "titlePadding": 6,
}  # fmt: skip
_CONFIG = {
    "background": None, "aria": False, "font": "system-ui, sans-serif", "view": {"stroke": None}, "axis": _AXIS,
    "axisX": {"grid": False},
    "legend": {"labelColor": SOFT, "labelFontSize": 12, "symbolStrokeWidth": 2, "symbolSize": 160},
}  # fmt: skip


def _axis(
    field: str, title: str, *, scale: dict[str, Any] | None = None, bin: Any = None, **axis: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {"field": field, "type": "quantitative", "title": title or None, "axis": axis}
    return found | ({"scale": scale} if scale else {}) | ({"bin": bin} if bin else {})


def _log_ticks(values: Sequence[Any]) -> list[float]:
    """1, 2 and 5 of each power of ten from just under the values to just over them; over three decades powers alone."""
    smallest, largest = min(values), max(values)
    low, high = math.floor(math.log10(smallest)), math.floor(math.log10(largest))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [step * 10.0**power for power in range(low - 1, high + 2) for step in steps]
    under, over = sum(tick < smallest for tick in ticks), sum(tick <= largest for tick in ticks)
    return ticks[under - 1 : over + 1]


def _room(values: Sequence[Any]) -> dict[str, Any]:
    """A domain about values that are all the same, or nearly: without one the axis has no length, or shows noise as if it
    were a course. Values that differ by less than HARDLY of their size take up the middle of an axis as long as that."""
    if not values:
        return {}
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10 or 1.0
        return {"domain": [low - margin if low else 0, low + margin]}
    least = HARDLY * max(abs(low), abs(high))
    if high - low >= least:
        return {}
    middle = (low + high) / 2
    return {"domain": [middle - least / 2, middle + least / 2]}


def _ticks(values: Sequence[Any]) -> dict[str, Any]:
    """About four; of few whole numbers each one, never a half between them."""
    low, high = min(values, default=0), max(values, default=0) or 1
    if HARDLY * abs(high) <= high - low <= 4 and low < high and all(float(value).is_integer() for value in values):
        return {"values": list(range(int(low), int(high) + 1)), "format": "d"}
    return {"tickCount": 4}


def _counts(title: str, log_y: bool, most: int) -> dict[str, Any]:
    """The axis of counts up to `most`; ticks beyond it are laid out like the others, and were a sixth of the drawing."""
    scale = {"type": "log", "domainMin": FLOOR} if log_y else {"type": "linear"}
    ticks: dict[str, Any] = {"values": [10**power for power in range(len(str(most)))]} if log_y else {"tickCount": 3}
    return _axis("count", title, scale=scale, labelExpr="format(datum.value, '~s')", **ticks)


def _lines(series: Mapping[str, Any], **scale: Any) -> dict[str, Any]:
    """One colour or dash for each line, in the order given; a single line needs no legend."""
    wide = sum(min(len(name), WIDEST) for name in series) > LEGEND_LINE
    legend = _LEGEND | ({"columns": 2} if wide else {}) if len(series) > 1 else None
    return {"field": "s", "type": "nominal", "legend": legend, "scale": {"domain": list(series), **scale}}


def _bins(counts: Iterable[int], edges: Iterable[float]) -> list[tuple[float, float, int]]:
    borders = [float(edge) for edge in edges]
    return [(low, high, int(count)) for low, high, count in zip(borders[:-1], borders[1:], counts, strict=True)]


def _given(value: Value) -> Value:
    return value if value is not None and math.isfinite(value) else None


# -- drawing ----------------------------------------------------------------------------------------------------------
_CLUTTER = re.compile(
    r' (?:role|aria-[a-z]+|class|pointer-events|font-weight|xmlns:xlink|version)="[^"]*"| opacity="1"'
)
_FRAMES = re.compile(r'<path class="(?:background|foreground)"[^>]*?(?:/>|></path>)')


def _svg(spec: Mapping[str, Any], size: tuple[int, int], label: str) -> Future[SafeString]:
    width, height = size
    whole = {"width": width, "height": height, "autosize": {"type": "fit", "contains": "padding"}, "padding": 2}
    text = json.dumps(whole | {"config": _CONFIG} | dict(spec), sort_keys=True, allow_nan=False)
    return _artist(os.getpid()).submit(_draw, text, label)


@cache
def _artist(process: int) -> ThreadPoolExecutor:
    """The thread that draws; one a process, because threads do not survive a fork. The library draws one at a time."""
    return ThreadPoolExecutor(1, "charts")


@lru_cache(maxsize=256)
def _draw(spec: str, label: str) -> SafeString:
    import vl_convert  # 70 ms and a JavaScript engine: only a process that draws pays for it

    svg = _CLUTTER.sub("", _FRAMES.sub("", vl_convert.vegalite_to_svg(spec)))
    # vl-convert escapes every text it draws (tests/test_charts.py), and the label is escaped here
    return mark_safe(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
