"""A report as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from axolotl_loram import __version__
from axolotl_loram.files.atomic import new_file
from axolotl_loram.results.figures import NARROW, PALETTE, WIDE, Chart, svg
from axolotl_loram.results.sections import Report


def html(report: Report) -> str:
    """The page. Jinja escapes every text; only the charts, which escape their own, are markup."""
    environment = Environment(
        loader=PackageLoader("axolotl_loram.results", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment.get_template("page.html").render(
        report=report, svg=_svg, wide=WIDE, narrow=NARROW, palette=PALETTE, version=__version__
    )


def write(report: Report, file: Path) -> None:
    """Write the page.

    Raises:
        LoRAMError: The file cannot be written.
    """
    with new_file(file) as partial:
        partial.write_bytes(html(report).encode("utf-8", "replace"))  # of half a surrogate, "?"


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code, all of it escaped."""
    parts = [
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
        for index, part in enumerate(text.split("`"))
    ]
    return Markup("").join(parts)


def _svg(chart: Chart, width: int) -> Markup:
    return Markup(svg(chart, width))  # ElementTree escaped it
