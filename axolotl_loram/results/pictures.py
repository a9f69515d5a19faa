"""A report's charts as PNGs, for slides and messages; drawn by matplotlib from the same numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import new_file
from axolotl_loram.results.charts import Bars, Chart, Dots, Lines, Strips

COLORS = {
    "blue": "#0b5cad",
    "orange": "#b4510a",
    "grey": "#5d6875",
    "green": "#0a7355",
    "purple": "#81358a",
    "red": "#ad2440",
    "brown": "#6d5335",
}
PARTS = ("#1f5f99", "#4a94cf", "#7d8b9a", "#c4651a", "#1f9384", "#8d6fb0")


def draw_pictures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write a PNG of each chart; returns the files.

    Raises:
        LoRAMError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise LoRAMError(
            "expected matplotlib for --png-dir, found none: pip install 'axolotl-loram[plot]'"
        ) from None
    files: list[Path] = []
    for chart in charts:
        # A label may hold what matplotlib takes for mathematics.
        with rc_context({"text.parse_math": False, "font.size": 9}):
            figure = Figure(figsize=(8, _height(chart)), layout="constrained")
            _draw(chart, figure)
            figure.suptitle(chart.title, fontweight="bold")
            files.append(folder / _file_name(chart.name, [file.name for file in files]))
            with new_file(files[-1]) as file:
                figure.savefig(file, dpi=150, format="png")
    return files


def _file_name(name: str, taken: Sequence[str]) -> str:
    """A chart's name as a file's, with a number where another chart has it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    names = [f"{plain}.png", *(f"{plain}-{i}.png" for i in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _height(chart: Chart) -> float:
    if isinstance(chart, Strips):
        return 0.8 + 1.4 * len(chart.strips)
    if isinstance(chart, Dots):
        return 1.3 + 0.3 * sum(1.6 + len(dots) for dots in chart.groups.values())
    return 1.5 + 0.8 * len(chart.bars) if isinstance(chart, Bars) else 4.5


@singledispatch
def _draw(chart: Chart, figure: Any) -> None:
    raise TypeError(f"no chart: {chart!r}")


@_draw.register
def _(chart: Lines, figure: Any) -> None:
    axes = figure.subplots()
    for series in chart.series:
        x, y = zip(*series.points, strict=True)
        style, mark = "--" if series.dashed else "-", "o" if len(x) <= 60 else ""
        color = COLORS[series.color]
        axes.plot(x, y, style, color=color, marker=mark, markersize=3, label=series.label)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend()


@_draw.register
def _(chart: Bars, figure: Any) -> None:
    axes = figure.subplots()
    labels: list[str] = []
    for bar in chart.bars:
        left = 0.0
        for part, value in bar.parts.items():
            color = PARTS[chart.parts.index(part)]
            axes.barh(len(labels), value, left=left, color=color)
            left += value
        labels.append(f"{bar.label}, predicted" if bar.parts else bar.label)
        for what, value in bar.measured.items():
            axes.barh(len(labels), value, color="#1b2430", height=0.5)
            labels.append(f"measured, {what}")
    for part, color in zip(chart.parts, PARTS, strict=False):
        axes.barh(0, 0, color=color, label=part)
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel=chart.unit)
    axes.invert_yaxis()
    if chart.parts:
        axes.legend(fontsize=7)


@_draw.register
def _(chart: Strips, figure: Any) -> None:
    for axes, strip in zip(
        figure.subplots(len(chart.strips), squeeze=False), chart.strips, strict=True
    ):
        for layer, units in enumerate(strip.layers):
            if units is not None and units[1]:
                axes[0].bar(layer, 1, color="#e6e9ed")
                axes[0].bar(layer, units[0] / units[1], color="#1f6fb2")
        axes[0].set(ylabel="share kept", ylim=(0, 1))
        axes[0].set_title(strip.label, fontsize=9, loc="left")


@_draw.register
def _(chart: Dots, figure: Any) -> None:
    axes, labels = figure.subplots(), []
    for title, dots in chart.groups.items():
        labels.append(title)
        for dot in dots:
            color = COLORS[dot.color]
            if math.isfinite(dot.value) and (dot.value > 0 or not chart.log):
                axes.plot(dot.value, len(labels), "o", color=color)
                if dot.low is not None and dot.high is not None:
                    axes.plot([dot.low, dot.high], [len(labels)] * 2, color=color)
            labels.append(f"{dot.label}  {dot.text}")
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel=chart.x_label)
    if chart.log:
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
