"""Text from the templates in `templates/`."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **facts: Any) -> str:
    """A template filled in.

    In a page (``….html.jinja``) every text is escaped; in Markdown, cells of tables are, by the
    filter `cell`.
    """
    environment = Environment(
        loader=PackageLoader("axolotl_loram.results"),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(**facts)
