"""Charts as data, and as SVG inside a page.

The SVG has no colours of its own: classes take them from the page's variables, so that light, dark
and print each have theirs. All text passes through ElementTree, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from xml.etree.ElementTree import Element, SubElement, tostring

WIDE, NARROW = 814, 342  # pixels: a page's column, and a phone's
MOST_POINTS = 500  # of a line: more are not told apart


@dataclass(frozen=True)
class Series:
    """A line: its name, its colour's name, and (x, y) in ascending x."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Lines:
    """Losses over steps; the right axis says their perplexity."""

    name: str
    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = "loss, nats per token"

    @property
    def legend(self) -> list[tuple[str, str]]:
        """(class, label) of each series."""
        return [(f"line {s.color}{' dashed' * s.dashed}", s.label) for s in self.series]


@dataclass(frozen=True)
class Bar:
    """A stack of predicted parts (label → GiB), and measured totals (what → GiB) beside it."""

    label: str
    parts: dict[str, float]
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bars:
    """Memory by part, predicted as a stack, measured as a solid bar below it."""

    name: str
    title: str
    bars: Sequence[Bar]
    unit: str = "GiB"

    @property
    def parts(self) -> list[str]:
        """Every part, in order."""
        return list(dict.fromkeys(part for bar in self.bars for part in bar.parts))

    @property
    def legend(self) -> list[tuple[str, str]]:
        """(class, label) of each part."""
        shown = [(f"box part{i}", part) for i, part in enumerate(self.parts)]
        measured = any(bar.measured for bar in self.bars)
        return shown + [("box measured", "measured")] * measured


@dataclass(frozen=True)
class Strip:
    """Units of one kind: (kept, of how many) in each layer, None where it has none."""

    label: str
    layers: Sequence[tuple[int, int] | None]


@dataclass(frozen=True)
class Strips:
    """Kept width of each layer."""

    name: str
    title: str
    strips: Sequence[Strip]
    legend: Sequence[tuple[str, str]] = (("box kept", "kept"), ("box removed", "removed"))


@dataclass(frozen=True)
class Dot:
    """A measured value with its interval, if known, and how both are written."""

    label: str
    color: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Dots:
    """Measured values with intervals, in groups (title → dots)."""

    name: str
    title: str
    groups: Mapping[str, Sequence[Dot]]
    x_label: str
    log: bool = False
    legend: Sequence[tuple[str, str]] = ()


Chart = Lines | Bars | Strips | Dots


TINY = 1e-300
"""Below, numbers have no digits left to divide by: they count as 0."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within low…high, about so many."""
    if not high - low > TINY:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = min(steps, key=lambda step: abs((high - low) / step - about))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(width: int, height: float, label: str) -> Element:
    box = {"viewBox": f"0 0 {width} {height:g}", "width": str(width), "height": f"{height:g}"}
    return Element("svg", box | {"role": "img", "aria-label": label})


def _add(parent: Element, tag: str, css: str = "", title: str = "", **numbers: float) -> Element:
    made = SubElement(parent, tag, {n: f"{v:.5g}" for n, v in numbers.items()})
    if css:
        made.set("class", css)
    if title:
        SubElement(made, "title").text = title
    return made


def _text(parent: Element, x: float, y: float, text: str, css: str = "") -> None:
    _add(parent, "text", css, x=x, y=y).text = text


def _cut(text: str, pixels: float) -> str:
    """What fits of a text, at about 6.6 pixels a letter."""
    most = max(4, int(pixels / 6.6))
    return text if len(text) <= most else f"{text[: most - 1]}…"


@singledispatch
def draw(chart: Chart, width: int) -> str:
    """A chart as an SVG element.

    Args:
        chart: What to draw.
        width: Pixels; text has the page's size at this width.
    """
    raise TypeError(f"no chart: {chart!r}")


@draw.register
def _(chart: Lines, width: int) -> str:
    left, right, top, height = 46, 52, 22, 260 if width < 500 else 300
    bottom = height - 40
    svg = _svg(width, height, chart.title)
    points = [point for series in chart.series for point in series.points]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = (low, high) if high - low > TINY else (low - 0.5, high + 0.5)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    span = max(high_x - low_x, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / span if high_x > low_x else 0.5
        down = (high - y) / (high - low)
        return left + across * (width - left - right), top + down * (bottom - top)

    for tick in ticks(low, high):
        y = place(low_x, tick)[1]
        _add(svg, "line", "grid", x1=left, x2=width - right, y1=y, y2=y)
        _text(svg, left - 6, y + 4, short(tick), "end")
        _text(svg, width - right + 6, y + 4, short(float(f"{math.exp(min(tick, 700)):.3g}")))
    for tick in ticks(low_x, high_x, 4 if width < 500 else 8):
        if tick == int(tick):
            _text(svg, place(tick, low)[0], bottom + 18, short(tick), "middle")
    _text(svg, 0, 12, chart.y_label, "muted")
    _text(svg, width, 12, "perplexity", "muted end")
    _text(svg, (left + width - right) / 2, height - 4, chart.x_label, "muted middle")
    for series in chart.series:
        _line(svg, series, [place(*point) for point in series.points])
    return tostring(svg, "unicode")


def _line(svg: Element, series: Series, placed: Sequence[tuple[float, float]]) -> None:
    """A line with a mark at each of its points, every n-th of them where they are too many."""
    stride = math.ceil(len(placed) / MOST_POINTS)
    last = len(placed) - 1
    shown = [i for i in range(len(placed)) if i % stride == 0 or i == last]
    path = _add(svg, "polyline", f"line {series.color}{' dashed' * series.dashed}")
    path.set("points", " ".join(f"{placed[i][0]:.1f},{placed[i][1]:.1f}" for i in shown))
    for i in shown:
        x, loss = series.points[i]
        title = f"{series.label}, step {x:g}: loss {loss:.4f}"
        css = f"mark {series.color}" if len(shown) <= 60 else "hit"
        cx, cy = placed[i]
        _add(svg, "circle", css, title, cx=cx, cy=cy, r=3 if len(shown) <= 60 else 5)


@draw.register
def _(chart: Bars, width: int) -> str:
    row, bar, thin = 22, 22, 12
    heights = [row + bar + (thin + 18) * len(each.measured) + 14 for each in chart.bars]
    height = sum(heights) + 26
    svg = _svg(width, height, chart.title)
    totals = [sum(each.parts.values()) for each in chart.bars]
    most = max([*totals, *(v for each in chart.bars for v in each.measured.values())])
    scale = (width - 2) / (most if most > TINY else 1)
    for tick in ticks(0, most, 4 if width < 500 else 7):
        x = 1 + tick * scale
        _add(svg, "line", "grid", x1=x, x2=x, y1=0, y2=height - 22)
        end = "middle" if 20 < x < width - 20 else "end" if x > 20 else ""
        _text(svg, x, height - 6, f"{short(tick)} {chart.unit}" if tick else "0", f"muted {end}")
    y = 0.0
    for each, total, tall in zip(chart.bars, totals, heights, strict=True):
        _text(svg, 0, y + 15, each.label, "strong label")
        said = f"{total:.2f} {chart.unit} predicted" if each.parts else "not predicted"
        _text(svg, width, y + 15, said, "end label")
        x = 1.0
        for part, value in each.parts.items():
            wide = value * scale
            title = f"{each.label}, {part}: {value:.3g} {chart.unit} predicted"
            css = f"part{chart.parts.index(part)} predicted"
            _add(svg, "rect", css, title, x=x, y=y + row, width=wide, height=bar)
            x += wide
        below = y + row + bar + 4
        for what, value in each.measured.items():
            title = f"{what}: {value:.3g} {chart.unit} measured"
            _add(svg, "rect", "measured", title, x=1, y=below, width=value * scale, height=thin)
            said = _cut(f"{value:.2f} {chart.unit} measured, {what}", width - 4)
            _text(svg, 1, below + thin + 13, said, "label")
            below += thin + 18
        y += tall
    return tostring(svg, "unicode")


@draw.register
def _(chart: Strips, width: int) -> str:
    tall, title_height, axis = 52, 24, 24
    step = tall + title_height + axis + 6
    svg = _svg(width, step * len(chart.strips), chart.title)
    for number, strip in enumerate(chart.strips):
        top = number * step + title_height
        _text(svg, 0, top - 9, strip.label, "strong")
        slot = width / max(len(strip.layers), 1)
        gap = min(3.0, slot * 0.2)
        for layer, units in enumerate(strip.layers):
            if units is None:
                continue
            kept, total = units
            high = tall * kept / total if total else 0
            title = f"layer {layer}: {kept:,} of {total:,} {strip.label.lower()} kept"
            if total:
                title += f" ({kept / total:.0%})"
            x, wide = layer * slot + gap / 2, slot - gap
            _add(svg, "rect", "removed", title, x=x, y=top, width=wide, height=tall)
            _add(svg, "rect", "kept", title, x=x, y=top + tall - high, width=wide, height=high)
        most = max(2, int(width / 45))
        every = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(strip.layers) / s <= most)
        for layer in range(0, len(strip.layers), every):
            _text(svg, (layer + 0.5) * slot, top + tall + 16, str(layer), "muted middle")
    return tostring(svg, "unicode")


@draw.register
def _(chart: Dots, width: int) -> str:
    narrow = width < 500
    row, head = (40, 30) if narrow else (26, 30)
    left, right = (8, 8) if narrow else (250, 178)
    count = sum(len(dots) for dots in chart.groups.values())
    height = count * row + sum(bool(title) for title in chart.groups) * head + 40
    svg = _svg(width, height, chart.title)
    scaled = math.log if chart.log else float
    ends = [v for dots in chart.groups.values() for d in dots for v in (d.value, d.low, d.high)]
    known = [v for v in ends if v is not None and math.isfinite(v) and (v > 0 or not chart.log)]
    low, high = min(known, default=1.0), max(known, default=1.0)
    reach = (scaled(low), scaled(high)) if high > low else (scaled(low) - 0.5, scaled(low) + 0.5)
    margin = 0.03 * (reach[1] - reach[0])
    reach = (reach[0] - margin, reach[1] + margin)

    def place(value: float) -> float:
        if chart.log and value <= 0:
            return float(left)
        across = (scaled(value) - reach[0]) / (reach[1] - reach[0])
        return left + 6 + min(max(across, 0), 1) * (width - left - right - 12)

    marks = _log_ticks(low, high) if chart.log else ticks(low, high, 4)
    for tick in marks:
        x = place(tick)
        _add(svg, "line", "grid", x1=x, x2=x, y1=4, y2=height - 36)
        end = "end" if x > width - 16 else "" if x < 16 else "middle"
        _text(svg, x, height - 22, short(tick), f"muted {end}")
    _text(svg, (left + width - right) / 2, height - 4, chart.x_label, "muted middle")
    y = 0.0
    for title, dots in chart.groups.items():
        if title:
            _text(svg, 0, y + 20, _cut(title, width), "strong label")
            y += head
        for dot in dots:
            middle = y + (28 if narrow else row / 2)
            room = (width - 7 * len(dot.text) - 8) if narrow else left - 10
            _text(svg, 0, middle + 4 - 17 * narrow, _cut(dot.label, room), "label")
            _text(svg, width, middle + 4 - 17 * narrow, dot.text, "end label")
            _dot(svg, dot, middle, place)
            y += row
    return tostring(svg, "unicode")


def _dot(svg: Element, dot: Dot, y: float, place: Callable[[float], float]) -> None:
    if not math.isfinite(dot.value):
        return
    if dot.low is not None and dot.high is not None:
        x1, x2 = place(dot.low), place(dot.high)
        _add(svg, "line", f"whisker {dot.color}", x1=x1, x2=x2, y1=y, y2=y)
        for x in (x1, x2):
            _add(svg, "line", f"whisker {dot.color}", x1=x, x2=x, y1=y - 4, y2=y + 4)
    title = f"{dot.label}: {dot.text}"
    _add(svg, "circle", f"mark {dot.color}", title, cx=place(dot.value), cy=y, r=5)


def _log_ticks(low: float, high: float) -> list[float]:
    """Of 1, 2 and 5 times powers of ten those within low…high, or a few round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high]
    return found if len(found) > 2 else ticks(low, high, 4)
