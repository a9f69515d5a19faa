"""Progress bars with rate and remaining time, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Starts to show how far something is; returns a function to call with what was done since."""

    def __call__(self, total: float, what: str = "", unit: str = "B") -> Callable[[float], Any]:
        """Start: `total` of a unit such as bytes ("B") or "layer" are to be done."""


def no_progress(total: float, what: str = "", unit: str = "B") -> Callable[[float], Any]:
    """Shows nothing."""
    return lambda done: None


@contextmanager
def progress_bar(default: str) -> Iterator[Progress]:
    """Gives a `Progress` that draws a bar for each thing started, named `default` if unnamed."""
    bars: list[tqdm] = []

    def start(total: float, what: str = "", unit: str = "B") -> Callable[[float], Any]:
        shape = "{l_bar}{bar}| {n:.3g}/{total:.3g} [{elapsed}<{remaining}, {rate_fmt}]"
        scaled: dict[str, Any] = {"unit_scale": True} if unit == "B" else {"bar_format": shape}
        for bar in bars:
            bar.close()
        bars.append(tqdm(total=total, desc=what or default, unit=unit, **scaled))
        return bars[-1].update

    try:
        yield start
    finally:
        for bar in bars:
            bar.close()
