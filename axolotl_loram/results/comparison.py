"""Perplexities and task scores of an evaluation: tables, intervals, and what share LoRAM keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from axolotl_loram.results import statistics
from axolotl_loram.results.artefacts import (
    ALSO,
    BASE,
    RECOVERED,
    Evaluation,
    Paired,
    TaskScores,
    TextSet,
)
from axolotl_loram.results.figures import Chart, Dot, Dots
from axolotl_loram.results.page import UNKNOWN, Table, bounds, change, number, percent
from axolotl_loram.results.statistics import Interval

NAMES = {
    BASE: "base model",
    "pruned": "pruned model",
    "pruned+adapter": "pruned model + its LoRA",
    RECOVERED: "base + recovered LoRA",
}
COLORS = {BASE: "grey", "pruned": "green", "pruned+adapter": "purple", RECOVERED: "blue"}
MOST_ROWS = 12  # of a table that is not folded
OTHERS = ("orange", "red", "brown")
KINDS = {"in_domain": "in domain", "out_of_domain": "out of domain"}


@dataclass(frozen=True)
class Gain:
    """What LoRAM came to on one set.

    Attributes:
        before: Perplexity of the base model, as text.
        difference: Of their losses, after − before.
        shares: Other adapter → share of its gain in loss that the recovered one has; None where
            the other gained nothing.
    """

    label: str
    set_name: str
    kind: str
    before: str
    after: str
    difference: Interval
    shares: Mapping[str, float | None]


def gains(label: str, evaluation: Evaluation) -> list[Gain]:
    """What LoRAM came to on each set that both models were measured on; in-domain ones first."""
    found = [
        Gain(
            label,
            name,
            KINDS.get(text.kind, text.kind),
            number(_measured(text, BASE).exp().value),
            number(_measured(text, RECOVERED).exp().value),
            _difference(text, RECOVERED, BASE)[0],
            _shares(text),
        )
        for name, text in evaluation.perplexity.items()
        if {BASE, RECOVERED} <= text.models.keys()
    ]
    return sorted(found, key=lambda outcome: outcome.kind != "in domain")


def _shares(text: TextSet) -> dict[str, float | None]:
    """Other adapter → share of its gain that the recovered one has; None where it has none."""
    others = [key for key in text.models if key.startswith(ALSO)]
    if not {BASE, RECOVERED} <= text.models.keys():
        return {}
    found = statistics.share_of_gain({k: m.loss for k, m in text.models.items()}, others)
    return {key.removeprefix(ALSO): found.get(key) for key in others}


def model_name(key: str, evaluation: Evaluation) -> str:
    """What to call a model of an evaluation."""
    if key.startswith(ALSO):
        label = evaluation.models.get(key, {}).get("label")
        return f"base + {label or key.removeprefix(ALSO)}"
    return NAMES.get(key, key)


def color_of(key: str, evaluation: Evaluation) -> str:
    """The colour of a model, the same in every chart of an evaluation."""
    if key in COLORS:
        return COLORS[key]
    others = [k for k in evaluation.models if k not in COLORS]
    return OTHERS[others.index(key) % len(OTHERS)] if key in others else OTHERS[0]


def perplexity_parts(label: str, evaluation: Evaluation) -> list[Chart | Table]:
    """A chart and tables for each set of text; `label` tells one evaluation from others."""
    parts: list[Chart | Table] = []
    for name, text in evaluation.perplexity.items():
        if not text.models:  # not measured yet
            continue
        title = f"{name} ({KINDS.get(text.kind, text.kind)})" + f", {label}" * bool(label)
        measured = {key: _measured(text, key).exp() for key in text.models}
        dots = [_dot(k, v, _with_bounds(v), evaluation) for k, v in measured.items()]
        axis = "perplexity, lower is better (logarithmic)"
        name = f"perplexity-{label}-{name}"
        parts.append(Dots(name, f"Perplexity, {title}", {"": dots}, axis, log=True))
        parts.append(_perplexity_table(f"{title}{_size(text)}", text, evaluation))
        if len(text.models) > 1:
            parts.append(_difference_table(title, text, evaluation))
    return parts


def task_parts(label: str, evaluation: Evaluation) -> list[Chart | Table]:
    """The chart and the tables of task scores; `label` tells one evaluation from others."""
    of = f", {label}" * bool(label)
    if not evaluation.tasks:
        return []
    groups = {
        _task_title(name, task): [
            _dot(key, _measured(task, key), _score_text(task, key), evaluation)
            for key in task.models
        ]
        for name, task in evaluation.tasks.items()
    }
    keys = list(dict.fromkeys(k for task in evaluation.tasks.values() for k in task.models))
    rows = [
        [_task_title(name, task), *(_score_text(task, key) for key in keys)]
        for name, task in evaluation.tasks.items()
    ]
    names = [model_name(key, evaluation) for key in keys]
    tables = [Table(f"Scores with 95 % intervals{of}", ["task", *names], rows)]
    differing = [
        [_task_title(name, task), *_difference_row(task, key, other, evaluation)]
        for name, task in evaluation.tasks.items()
        for key, other in _pairs(task)
        if not key.startswith("pruned")
    ]
    if differing:
        columns = ["task", "model", "against", "difference", "95 % interval", "samples"]
        title, folded = f"Differences of scores{of}", len(differing) > MOST_ROWS
        tables.append(Table(title, columns, differing, texts=3, hidden=folded))
    chart = Dots(f"tasks-{label}", f"Task scores{of}", groups, "score, higher is better")
    return [chart, *tables]


def _size(text: TextSet) -> str:
    sizes = {"tokens": text.tokens, "documents": text.documents}
    told = ", ".join(f"{size:,} {what}" for what, size in sizes.items() if size is not None)
    return f": {told}" if told else ""


def _measured(of: TextSet | TaskScores, key: str) -> Interval:
    """A model's loss, or its score."""
    if isinstance(of, TextSet):
        return statistics.normal(of.models[key].loss, of.models[key].standard_error)
    return statistics.score_interval(
        of.models[key].value, of.models[key].standard_error, of.samples
    )


def _pairs(measured: TextSet | TaskScores) -> list[tuple[str, str]]:
    """Which models are held against which: all against the base, the recovered one against all."""
    keys = list(measured.models)
    against_base = [(key, BASE) for key in keys if key != BASE and BASE in keys]
    others = [key for key in keys if key.startswith(ALSO) and RECOVERED in keys]
    return against_base + [(RECOVERED, key) for key in others]


def _difference(measured: TextSet | TaskScores, key: str, other: str) -> tuple[Interval, str]:
    """Ours minus theirs, and whether samples were paired."""
    for ours, theirs, sign in ((key, other, 1), (other, key, -1)):
        found: Paired | None = measured.paired.get(ours)
        if found and found.against != theirs:
            found = None
        if ours == RECOVERED and isinstance(measured, TextSet):
            found = found or measured.recovered_against.get(theirs)
        # Where no answer differs, there is no spread to go by.
        if found and (found.standard_error or isinstance(measured, TextSet)):
            return statistics.normal(sign * found.difference, found.standard_error), "paired"
    return statistics.difference(*(_measured(measured, k) for k in (key, other))), "unpaired"


def _dot(key: str, found: Interval, text: str, evaluation: Evaluation) -> Dot:
    name, color = model_name(key, evaluation), color_of(key, evaluation)
    return Dot(name, color, found.value, found.low, found.high, text)


def _with_bounds(found: Interval, write: Callable[[float], str] = number) -> str:
    between = bounds(found, write).replace(" to ", "–").replace("\N{NO-BREAK SPACE}%–", "–")
    return write(found.value) + ("" if found.low is None else f" ({between})")


def _perplexity_table(title: str, text: TextSet, evaluation: Evaluation) -> Table:
    columns = ["model", "perplexity", "95 % interval", "loss, nats per token"]
    columns += [f"share of the gain of {other}" for other in _shares(text)]
    rows = []
    for key in text.models:
        loss, shares = _measured(text, key), _shares(text).values()
        cells = [UNKNOWN + " (no gain)" if s is None else percent(s) for s in shares]
        cells = cells if key == RECOVERED else [""] * len(cells)
        measured = [number(loss.exp().value), bounds(loss.exp()), number(loss.value, 5)]
        rows.append([model_name(key, evaluation), *measured, *cells])
    return Table(f"Perplexity, {title}", columns, rows)


def _difference_table(title: str, text: TextSet, evaluation: Evaluation) -> Table:
    rows = []
    for pair in _pairs(text):
        found, how = _difference(text, *pair)
        changes, signed = found.exp(less=1), partial(percent, signed=True)
        measured = [signed(changes.value), bounds(changes, signed), change(found.value)]
        rows.append([*(model_name(key, evaluation) for key in pair), *measured, how])
    columns = ["model", "against", "perplexity", "95 % interval", "loss", "samples"]
    return Table(f"Differences, {title}", columns, rows, texts=2)


def _task_title(name: str, task: TaskScores) -> str:
    shots = "" if task.num_fewshot is None else f", {task.num_fewshot}-shot"
    return f"{name}{shots}" + (f" ({task.metric.partition(',')[0]})" if task.metric else "")


def _is_rate(task: TaskScores) -> bool:
    return all(0 <= score.value <= 1 for score in task.models.values())


def _score_text(task: TaskScores, key: str) -> str:
    if key not in task.models:
        return "not measured"
    return _with_bounds(_measured(task, key), percent if _is_rate(task) else number)


def _difference_row(task: TaskScores, key: str, other: str, evaluation: Evaluation) -> list[str]:
    found, how = _difference(task, key, other)

    def points(value: float) -> str:
        return change(100 * value, 1) if _is_rate(task) else change(value)

    unit = " points" if _is_rate(task) else ""
    models = [model_name(key, evaluation), model_name(other, evaluation)]
    return [*models, points(found.value) + unit, bounds(found, points), how]
