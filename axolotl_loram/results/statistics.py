"""What an evaluation found: means, standard errors, differences, and intervals at 95 %."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_loram.results.artefacts import ALSO, BASE, RECOVERED

if TYPE_CHECKING:
    from axolotl_loram.text.heldout import HeldOut

Z = 1.959964  # the normal distribution's 97.5 % point


def perplexity_section(held: HeldOut, losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What is said of one set.

    Args:
        held: The set.
        losses: Model → what `document_losses` returns.

    Returns:
        Perplexity of each model; how much larger its loss is than the base's, and the recovered
        adapter's than that of others, paired by document; the share of others' gain that the
        recovered adapter keeps.
    """
    counted = next(iter(losses.values()), np.zeros((0, 2)))
    models = {name: mean_loss(each) for name, each in losses.items()}
    found = {
        "kind": held.kind,
        "source": held.source,
        "tokens": int(counted[:, 1].sum()),
        "documents": held.documents,
        "models": models,
        "paired": _paired(
            {name: each for name, each in losses.items() if name != BASE},
            losses.get(BASE, np.zeros((0, 2))),
        ),
    }
    if RECOVERED in losses:
        others = [name for name in losses if name.startswith(ALSO)]
        found["recovered_against"] = {
            name: paired_difference(losses[RECOVERED], losses[name]) for name in others
        }
        of = {name: model["loss"] for name, model in models.items()}
        found["share_of_gain"] = share_of_gain(of, others)
    return found


def task_sections(found: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> dict:
    """Task → each model's value, and how much higher it is than the base's, paired by question.

    Of each model, task → what `score` returns, and task → scores of each question.
    """
    tasks: dict[str, Any] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    for model, values, per_sample in found:
        for name, value in values.items():
            shared = {key: value[key] for key in ("metric", "num_fewshot", "samples")}
            own = {key: value[key] for key in ("value", "standard_error", "metrics")}
            tasks.setdefault(name, {**shared, "models": {}})["models"][model] = own
            of_one = np.ones(len(per_sample[name]))
            scores.setdefault(name, {})[model] = np.stack([per_sample[name], of_one], axis=1)
    for name, by_model in scores.items():
        base = by_model.pop(BASE, np.zeros((0, 2)))
        tasks[name]["paired"] = _paired(by_model, base)
    return tasks


def _paired(measured: Mapping[str, np.ndarray], base: np.ndarray) -> dict[str, Any]:
    return {
        name: {"against": BASE, **paired_difference(each, base)}
        for name, each in measured.items()
        if 0 < len(each) == len(base)
    }


def share_of_gain(losses: Mapping[str, float], others: Sequence[str]) -> dict[str, float]:
    """Other model that gained something → ln(base / recovered) / ln(base / other).

    In perplexities: 1 where both gain the same.
    """
    if BASE not in losses:
        return {}
    gains = {name: losses[BASE] - losses[name] for name in (RECOVERED, *others)}
    return {name: gains[RECOVERED] / gains[name] for name in others if gains[name] > 0}


def mean_loss(losses: np.ndarray) -> dict[str, Any]:
    """Loss per token, its standard error over documents, and perplexity.

    The loss is a ratio of sums over documents; its standard error is that of a ratio estimate
    (Cochran, Sampling Techniques, 1977, section 6.4), since documents, not tokens, are independent.
    """
    mean, error = _ratio(losses)
    return {"loss": mean, "standard_error": error, "perplexity": exp(mean)}


def paired_difference(losses: np.ndarray, against: np.ndarray) -> dict[str, Any]:
    """How much larger a loss per token is than another on the same documents; standard error."""
    difference, error = _ratio(np.stack([losses[:, 0] - against[:, 0], losses[:, 1]], axis=1))
    return {"difference": difference, "standard_error": error}


def exp(loss: float) -> float | None:
    """Perplexity of a loss in nats; None where it is past what a float holds."""
    return math.exp(loss) if loss < 700 else None


def _ratio(sums: np.ndarray) -> tuple[float, float | None]:
    """Σ first / Σ second over documents, and its standard error; None for a single document."""
    count, (first, second) = len(sums), sums.sum(axis=0)
    mean = float(first / second)
    residuals = sums[:, 0] - mean * sums[:, 1]
    if count == 1:
        return mean, None
    return mean, float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / second)


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

    def exp(self, less: float = 0) -> Interval:
        """The interval of e^value − less: perplexities from losses, their change from differences.

        Infinite where it is too large for a float.
        """

        def of(loss: float) -> float:
            return (math.exp(loss) if loss < 709 else math.inf) - less

        low, high = (None if bound is None else of(bound) for bound in (self.low, self.high))
        return Interval(of(self.value), low, high)


def normal(value: float, standard_error: float | None) -> Interval:
    """The value ± 1.96 standard errors."""
    if standard_error is None or not math.isfinite(standard_error):
        return Interval(value)
    return Interval(value, value - Z * standard_error, value + Z * standard_error)


def score_interval(value: float, standard_error: float | None, samples: int | None) -> Interval:
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
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return Interval(value)
    below = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Interval(value, value - below, value + above)
