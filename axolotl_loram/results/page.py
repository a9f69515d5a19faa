"""What a report is made of, and its HTML page: no script, no font, no request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from axolotl_loram import __version__
from axolotl_loram.files.atomic import new_file
from axolotl_loram.results.figures import NARROW, PALETTE, WIDE, Chart, svg
from axolotl_loram.results.render import render
from axolotl_loram.results.statistics import Interval

UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row.

    Attributes:
        texts: How many columns are text; what follows are numbers, which are set to the right.
        hidden: Whether it is folded until asked for.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    hidden: bool = False


@dataclass(frozen=True)
class KeyFigure:
    """One of the numbers at the top; `origin` is "measured", "predicted" or "counted"."""

    label: str
    value: str
    note: str
    origin: str


@dataclass
class Chapter:
    """A part of the page: text, then charts and tables in order.

    `missing` names what was not measured, and how to.
    """

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    items: list[Chart | Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All of the page."""

    headline: str
    lead: str
    figures: Sequence[KeyFigure]
    sections: Sequence[Chapter]

    @property
    def missing(self) -> list[str]:
        """What was not measured, in the order of the page."""
        return [sentence for section in self.sections for sentence in section.missing]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        items = (item for section in self.sections for item in section.items)
        return [item for item in items if not isinstance(item, Table)]


def html(report: Report) -> str:
    """The page. Every text is escaped; only the charts, which escape their own, are markup."""
    widths = {"wide": WIDE, "narrow": NARROW}
    facts = {"svg": svg, "widths": widths, "palette": PALETTE, "version": __version__}
    return render("report.html.jinja", report=report, **facts)


def write(report: Report, file: Path) -> None:
    """Write the page.

    Raises:
        LoRAMError: The file cannot be written.
    """
    with new_file(file) as partial:
        partial.write_bytes(html(report).encode("utf-8", "replace"))  # of half a surrogate, "?"


def number(value: float, digits: int = 4) -> str:
    """A number in about `digits` digits: 12,345 · 378.2 · 0.01234; with a true minus sign."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e9:
        return f"{value:.3g}".replace("e+", "e")
    whole = len(str(int(abs(value))))
    decimals = max(0, digits - whole) if abs(value) >= 1 else digits
    return minus(f"{value:,.{decimals}f}")


def percent(value: float, signed: bool = False) -> str:
    """A share as a percentage with one decimal."""
    return minus(f"{value:{'+' if signed else ''}.1%}").replace("%", "\N{NO-BREAK SPACE}%")


def minus(text: str) -> str:
    """A true minus sign, and none before a zero."""
    negative = text.startswith("-")
    zero = not any(digit in "123456789" for digit in text)
    return text.lstrip("-") if negative and zero else text.replace("-", "−")


def change(value: float, decimals: int = 4) -> str:
    """A difference with its sign."""
    return minus(f"{value:+.{decimals}f}") if math.isfinite(value) else "not finite"


def bounds(interval: Interval, write: Callable[[float], str] = number) -> str:
    """Lower to upper bound, or that they are not known."""
    if interval.low is None or interval.high is None:
        return "not recorded"
    return f"{write(interval.low)} to {write(interval.high)}"


def arrow(before: str, after: str) -> str:
    """From the one to the other; breaks, if it must, before the arrow."""
    return f"{before} →\N{NO-BREAK SPACE}{after}"


def count(value: int) -> str:
    """2,702,464 → 2.70 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(value) >= size:
            return f"{value / size:.2f}\N{NO-BREAK SPACE}{unit}"
    return str(value)
