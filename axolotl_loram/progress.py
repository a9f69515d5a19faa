"""Progress bars with rate and remaining time, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int], Callable[[int], object]]]:
    """Gives a function that takes the bytes to do and returns one for the bytes done."""
    bars: list[tqdm] = []

    def start(size: int) -> Callable[[int], object]:
        bars.append(tqdm(total=size, desc=what, unit="B", unit_scale=True))
        return bars[-1].update

    try:
        yield start
    finally:
        for bar in bars:
            bar.close()
