"""Charts as data, drawn by matplotlib: SVG inside a page, PNG and others as files.

In a page, colours are its variables, so that light, dark and print each have theirs.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import singledispatch
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import new_file

WIDE, NARROW = 814, 342  # pixels: a page's column, and a phone's
PARTS = ("part0", "part1", "part2", "part3", "part4", "part5", "brown", "red", "green", "purple")
PALETTE = {
    **{"ink": "#1b2430", "muted": "#55606e", "grid": "#e4e7eb"},
    **{"blue": "#0b5cad", "orange": "#b4510a", "grey": "#5d6875", "green": "#0a7355"},
    **{"purple": "#81358a", "red": "#ad2440", "brown": "#6d5335"},
    **{"part0": "#1f5f99", "part1": "#4a94cf", "part2": "#7d8b9a", "part3": "#c4651a"},
    **{"part4": "#1f9384", "part5": "#8d6fb0", "kept": "#1f6fb2", "removed": "#e6e9ed"},
}
"""Name of a colour → what it is on white."""
STYLE = {
    "font.size": 12.0,
    "text.parse_math": False,  # a label may hold what is taken for mathematics
    "svg.fonttype": "none",
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["grid"],
    "grid.color": PALETTE["grid"],
    "xtick.color": PALETTE["grid"],
    "ytick.color": PALETTE["grid"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
    "legend.frameon": False,
}
SVG = "{http://www.w3.org/2000/svg}"
UNPRINTABLE = re.compile("[^ -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MOST = 1e300
"""Numbers beyond cannot be drawn: the width of an axis would be infinite."""


@dataclass(frozen=True)
class Chart:
    """What can be drawn; `name` is unlike that of other charts of a page."""

    name: str
    title: str


@dataclass(frozen=True)
class Series:
    """A line: its name, its colour's name, and (x, y) in ascending x."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Lines(Chart):
    """Losses over steps; the right axis says their perplexity."""

    series: Sequence[Series]


@dataclass(frozen=True)
class Bar:
    """A stack of predicted parts (label → size), and measured totals (what → size) below it."""

    label: str
    parts: Mapping[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bars(Chart):
    """Memory by part, predicted as a stack, measured as a solid bar; `limits` are lines."""

    bars: Sequence[Bar]
    unit: str = "GiB"
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Strips(Chart):
    """Kept width: kind of unit → for each layer (kept, of how many), None where it has none."""

    strips: Mapping[str, Sequence[tuple[int, int] | None]]


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
class Dots(Chart):
    """Measured values with intervals, in groups (title → dots)."""

    groups: Mapping[str, Sequence[Dot]]
    x_label: str
    log: bool = False


def svg(chart: Chart, width: int) -> str:
    """A chart as an SVG element for a page that has PALETTE's names as variables.

    Args:
        chart: What to draw.
        width: Pixels; text has the page's size at this width.

    Raises:
        LoRAMError: matplotlib is missing.
    """
    with _drawn(chart, width) as figure:
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        height = figure.get_figheight() * 72
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    _clean(root)
    root.attrib |= {"width": str(width), "height": f"{height:g}", "role": "img"}
    root.set("aria-label", plain(chart.title))
    return ElementTree.tostring(root, "unicode")


def _clean(root: Any) -> None:
    """Make styles attributes, colours variables; take away what a page has itself."""
    names = {value: f"var(--{name})" for name, value in PALETTE.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}style", f"{SVG}title") or child.tag.endswith("metadata"):
                parent.remove(child)
        if parent.tag == f"{SVG}g":
            parent.attrib.pop("id", None)
        for setting in parent.attrib.pop("style", "").split(";"):
            name, _, value = (part.strip() for part in setting.partition(":"))
            if name == "font":
                parent.set("font-size", re.findall(r"[\d.]+px", value)[0])
                parent.set("font-weight", "bold" if "bold" in value else "normal")
            elif name and name != "font-family":  # the page has its own
                parent.set(name, names.get(value, value))


def save(chart: Chart, file: Path) -> None:
    """Write a chart; the file's ending says the format, such as .png or .svg.

    Raises:
        LoRAMError: matplotlib is missing, or the file cannot be written.
    """
    with _drawn(chart, WIDE) as figure:
        figure.suptitle(plain(chart.title), fontweight="bold")
        with new_file(file) as partial:
            try:
                figure.savefig(partial, dpi=144, format=file.suffix[1:])
            except ValueError as error:  # of an ending that is no format
                raise LoRAMError(f"expected to be able to write {file}, found: {error}") from None


def save_all(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write a PNG of each chart, under its name, with a number where another has that name.

    Raises:
        LoRAMError: matplotlib is missing, or the folder cannot be written.
    """
    files: list[Path] = []
    for chart in charts:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", chart.name).strip("-.")[:80]
        names = [f"{name}.png", *(f"{name}-{i}.png" for i in range(2, len(charts) + 2))]
        files.append(next(f for f in (folder / each for each in names) if f not in files))
        save(chart, files[-1])
    return files


@contextmanager
def _drawn(chart: Chart, width: int) -> Iterator[Any]:
    """A figure of so many pixels at 72 to the inch, and matplotlib set up to write it."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # draws without a display, and without pyplot's state
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise LoRAMError(
            "expected matplotlib for charts, found none: pip install 'axolotl-loram[plot]'"
        ) from None
    # Ids of a hidden chart must not be those of a shown one.
    style: Any = STYLE | {"svg.hashsalt": f"{chart.name} {width}"}
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some letter; a page has its own
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.05)
        figure = Figure(figsize=(width / 72, 5), dpi=72, layout=layout)
        figure.set_figheight(_draw(chart, figure, width) / 72)
        yield figure


def plain(text: str) -> str:
    """Text without what XML cannot hold."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _cut(text: str, pixels: float) -> str:
    """What fits of a text, at about 6.6 pixels a letter."""
    most, text = max(4, int(pixels / 6.6)), plain(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _short(value: float, _: Any = None) -> str:
    """A tick's number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "−")


def _perplexity(loss: float, _: Any = None) -> str:
    return _short(float(f"{math.exp(min(loss, 700)):.3g}"))


def _legend(figure: Any, handles: Mapping[str, Any], width: int) -> int:
    """A legend below; returns its height in pixels."""
    labels = [_cut(f" {label}", width - 50) for label in handles]  # "_" in front would hide it
    columns = max(1, int(width / (6.6 * max(map(len, labels), default=1) + 50)))
    if labels:
        place = {"loc": "outside lower left", "ncols": columns}
        figure.legend(list(handles.values()), labels, **place)
    return 20 * math.ceil(len(labels) / columns)


def _row(axes: Any, y: float, left: str, right: str, width: int, **style: Any) -> None:
    """A line of text across the axes: a name, and what is said of it."""
    where = {"transform": axes.get_yaxis_transform(), "va": "center", **style}
    axes.text(0, y, _cut(left, width - 6.6 * len(right) - 12), **where)
    axes.text(1, y, plain(right), ha="right", **where)


def _rows(axes: Any, count: float, x_label: str) -> None:
    """Axes of rows from top to bottom, with ticks on x only."""
    axes.set(ylim=(count, 0), yticks=[], xlabel=plain(x_label))
    axes.xaxis.set_major_formatter(_short)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.spines[["left", "top", "right"]].set_visible(False)


@singledispatch
def _draw(chart: Chart, figure: Any, width: int) -> float:
    """Draw a chart; returns the height it wants, in pixels."""
    raise TypeError(f"no chart: {chart!r}")


@_draw.register
def _(chart: Lines, figure: Any, width: int) -> float:
    axes, handles = figure.subplots(), dict[str, Any]()
    for series in chart.series:
        x, y = zip(*series.points, strict=True)
        style, mark = "--" if series.dashed else "-", "o" if len(x) <= 60 else ""
        color = PALETTE[series.color]
        (line,) = axes.plot(x, y, style, color=color, marker=mark, markersize=3)
        handles[series.label] = line
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.locator_params("x", nbins=4 if width < 500 else 8, integer=True)
    right = axes.twinx()
    right.set(ylim=axes.get_ylim(), ylabel="perplexity")
    right.yaxis.set_major_formatter(_perplexity)
    axes.yaxis.set_major_formatter(_short)
    axes.grid()
    return 300 + _legend(figure, handles, width)


@_draw.register
def _(chart: Bars, figure: Any, width: int) -> float:
    axes, handles, y = figure.subplots(), dict[str, Any](), 0.0
    names = list(dict.fromkeys(part for bar in chart.bars for part in bar.parts))
    colors = {name: PALETTE[PARTS[i % len(PARTS)]] for i, name in enumerate(names)}
    for bar in chart.bars:
        left, total = 0.0, sum(bar.parts.values())
        said = f"{total:.2f} {chart.unit} predicted" if bar.parts else "not predicted"
        _row(axes, y + 0.5, bar.label, said, width, fontweight="bold")
        for part, value in bar.parts.items():
            drawn = axes.barh(y + 1.4, value, 0.9, left=left, color=colors[part], lw=0)
            handles.setdefault(part, drawn)
            left += value
        y += 2.0 if bar.parts else 1.0
        for what, value in bar.measured.items():
            drawn = axes.barh(y + 0.3, value, 0.5, color=PALETTE["ink"], lw=0)
            handles.setdefault("measured", drawn)
            _row(axes, y + 0.9, what, f"{value:.2f} {chart.unit} measured", width)
            y += 1.4
    for name, limit in chart.limits.items():
        axes.axvline(limit, color=PALETTE["muted"], lw=0.75)
        axes.text(limit, y, f" {name}", rotation=90, va="bottom", ha="right", fontsize=10)
    _rows(axes, y, chart.unit)
    return 24 * y + 60 + _legend(figure, handles, width)


@_draw.register
def _(chart: Strips, figure: Any, width: int) -> float:
    kept = PALETTE["kept"]
    places = figure.subplots(len(chart.strips), squeeze=False)[:, 0]
    for axes, (label, layers) in zip(places, chart.strips.items(), strict=True):
        held = {i: units[0] / units[1] for i, units in enumerate(layers) if units and units[1]}
        wide = 0.9 if len(layers) < 60 else 1.0
        axes.bar(list(held), 1, wide, color=PALETTE["removed"], lw=0)
        axes.bar(list(held), list(held.values()), wide, color=kept, lw=0)
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlim=(-0.6, len(layers) - 0.4))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_title(_cut(f"{label} kept, by layer", width), loc="left", fontsize=12)
        axes.locator_params("x", nbins=max(2, width // 45), integer=True)
        axes.spines[:].set_visible(False)
    return 20 + 110 * len(chart.strips)


@_draw.register
def _(chart: Dots, figure: Any, width: int) -> float:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes, y = figure.subplots(), 0.0
    for title, dots in chart.groups.items():
        if title:
            _row(axes, y + 0.7, title, "", width, fontweight="bold")
            y += 1.3
        for dot in dots:
            _row(axes, y + 0.5, dot.label, dot.text, width)
            _dot(axes, dot, y + 1.2, chart.log)
            y += 1.9
    if chart.log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        few = MaxNLocator(4) if high < 10 * low else LogLocator(subs=(1, 3))
        axes.xaxis.set(major_locator=few, minor_locator=NullLocator())
    _rows(axes, y, chart.x_label)
    return 24 * y + 60


def _dot(axes: Any, dot: Dot, y: float, log: bool) -> None:
    def drawable(value: float | None) -> bool:
        return value is not None and abs(value) < MOST and (value > 0 or not log)

    if not drawable(dot.value):
        return
    color = PALETTE[dot.color]
    if drawable(dot.low) and drawable(dot.high):
        axes.plot([dot.low, dot.high], [y, y], color=color, marker="|", markersize=7)
    axes.plot(dot.value, y, "o", color=color, markersize=6)
