"""Confidence intervals of measured scores and of their differences, at 95 %."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959964  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95 % interval; without bounds where no error was recorded."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def holds_zero(self) -> bool:
        """Whether the interval is known and 0 lies in it."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high

    def exp(self) -> Interval:
        """The interval of e^value: perplexities from losses, their ratios from differences."""
        low, high = (None if bound is None else exp(bound) for bound in (self.low, self.high))
        return Interval(exp(self.value), low, high)


def exp(value: float) -> float:
    """e^value, infinite where that is too large for a float."""
    return math.exp(value) if value < 709 else math.inf


def normal(value: float, standard_error: float | None) -> Interval:
    """The value ± 1.96 standard errors."""
    if standard_error is None or not math.isfinite(standard_error):
        return Interval(value)
    return Interval(value, value - Z * standard_error, value + Z * standard_error)


def score(value: float, standard_error: float | None, samples: int | None) -> Interval:
    """Interval of a task's score in 0…1; of other scores, `normal`.

    A rate of 0 or 1 has a standard error of 0, which says nothing: 0 of 20 may well be a model that
    is right one time in ten. There, and where no error is given, it is Wilson's score interval of a
    rate over `samples` (J. Am. Stat. Assoc. 22, 1927).
    """
    if standard_error or not samples or not 0 <= value <= 1:
        found = normal(value, standard_error)
        if found.low is None or found.high is None or not 0 <= value <= 1:
            return found
        return Interval(value, max(0.0, found.low), min(1.0, found.high))
    spread = Z * math.sqrt(value * (1 - value) / samples + Z * Z / (4 * samples**2))
    center, scale = value + Z * Z / (2 * samples), 1 + Z * Z / samples
    low, high = (center - spread) / scale, (center + spread) / scale
    return Interval(value, max(0.0, low) if value else 0.0, min(1.0, high) if value < 1 else 1.0)


def difference(ours: Interval, theirs: Interval) -> Interval:
    """Interval of ours − theirs as if the two were measured on different samples.

    Newcombe's hybrid of the two intervals (Stat. Med. 17, 1998), which for normal ones is
    √(s₁² + s₂²). On the same samples it is too wide: paired errors are to be preferred.
    """
    value = ours.value - theirs.value
    if None in (ours.low, ours.high, theirs.low, theirs.high):
        return Interval(value)
    assert ours.low is not None and ours.high is not None
    assert theirs.low is not None and theirs.high is not None
    below = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Interval(value, value - below, value + above)
