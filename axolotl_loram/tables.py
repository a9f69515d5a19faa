"""What the command line shows people: lines of name and value, and the table of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def lines(result: Mapping[str, Any]) -> str:
    """Names and values, one to a line."""
    width = max(len(name) for name in result)
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {_written(value)}" for name, value in result.items()
    )


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Models as rows; perplexities and task scores, with standard errors, as columns."""
    rows: dict[str, list[str]] = {"": [*result["perplexity"], *result["tasks"]]}
    rows |= {name: [] for name in result["models"]}
    for name in result["models"]:
        for held in result["perplexity"].values():
            found = held["models"].get(name)
            error = found and found["perplexity"] and found["standard_error"]
            spread = found["perplexity"] * error if error else None
            rows[name].append(_measured(found and found["perplexity"], spread, 2))
        for task in result["tasks"].values():
            found = task["models"].get(name) or {}
            rows[name].append(_measured(found.get("value"), found.get("standard_error"), 4))
    shares = [
        f"{name}: base+recovered keeps {share:.1%} of {other}'s gain (log perplexity)"
        for name, held in result["perplexity"].items()
        for other, share in held.get("share_of_gain", {}).items()
    ]
    return "\n".join([columns(rows), "", "perplexity or score, ± standard error", *shares])


def _measured(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ±{error:.{digits}f}" if error is not None else "")


def columns(rows: Mapping[str, Sequence[str]]) -> str:
    """Names and cells, one row to a line."""
    left = max(map(len, rows))
    width = max(len(cell) for row in rows.values() for cell in row) + 2
    return "\n".join(
        f"{name:<{left}}{''.join(f'{cell:>{width}}' for cell in row)}".rstrip()
        for name, row in rows.items()
    )
