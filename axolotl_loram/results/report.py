"""From artefacts to a report: headline, key figures and sections. What was not measured is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.record import Kind, refit_summary
from axolotl_loram.errors import LoRAMError
from axolotl_loram.results.artefacts import Artefact, Evaluation, read, training_of
from axolotl_loram.results.comparison import Outcome, outcomes, perplexity_parts, task_parts
from axolotl_loram.results.figures import Lines, Series, Strips
from axolotl_loram.results.footprint import memory_figure, memory_section
from axolotl_loram.results.page import (
    KeyFigure,
    Report,
    Section,
    Table,
    arrow,
    count,
    number,
    percent,
)

LORAM_COLORS, LORA_COLORS = ("blue", "green", "purple", "grey"), ("orange", "red", "brown")
HELDOUT = {
    "eval_loss": "model in training",
    "eval_loram_recovered_loss": "base + recovered LoRA",
}


def build(paths: Sequence[Path]) -> Report:
    """The report on some runs.

    Raises:
        LoRAMError: A path holds no artefact, a damaged one, or one of a newer version.
    """
    runs = read(list({path.resolve(): path for path in paths}.values()))
    try:
        return _build(runs)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise LoRAMError(
            f"expected the records of {', '.join(run.label for run in runs)} as this package "
            f"writes them, found one that cannot be shown ({type(error).__name__}: {error!s:.200}):"
            " it is damaged, or was changed"
        ) from error


def _build(runs: Sequence[Artefact]) -> Report:
    evaluations = [(run.label, run.evaluation) for run in runs if run.evaluation is not None]
    if len(evaluations) == 1:
        evaluations = [("", evaluations[0][1])]  # nothing to tell it from
    found = [each for label, evaluation in evaluations for each in outcomes(label, evaluation)]
    sections = [
        _perplexities(evaluations),
        _tasks(evaluations),
        _curves(runs),
        memory_section(runs),
        _widths(runs),
        _provenance(runs),
    ]
    return Report(_headline(runs, found), _lead(runs, found), _figures(runs, found), sections)


def _headline(runs: Sequence[Artefact], found: Sequence[Outcome]) -> str:
    """The one sentence to take away, of in-domain text where that was measured."""
    first = [outcome for outcome in found if outcome.kind == found[0].kind]
    shared = [share for o in first for share in o.shares.values() if share is not None]
    kept = [share for share in shared if share > 0]
    if kept and len(kept) == len(shared):
        low, high = percent(min(kept)), percent(max(kept))
        subject = "adapter keeps" if len(kept) == 1 else "adapters keep"
        others = {name for outcome in first for name in outcome.shares}
        what = "LoRA" if others <= {"lora", "LoRA"} else ", ".join(sorted(others))
        span = low if low == high else f"{low.removesuffix(' %')} to {high}"
        return f"The recovered {subject} {span} of what {what} gains"
    if found:
        before, after = (number(loss.exp().value) for loss in (found[0].before, found[0].after))
        if found[0].difference.holds_zero:
            return f"No measurable change: perplexity {before} without, {after} with the adapter"
        verb = "lowers" if found[0].difference.value < 0 else "raises"
        return f"The recovered adapter {verb} held-out perplexity from {before} to {after}"
    return _headline_unmeasured(runs)


def _headline_unmeasured(runs: Sequence[Artefact]) -> str:
    counts = next((c for c in map(_counts, runs) if c), None)
    if counts:
        share = percent(counts["pruned_parameters"] / counts["base_parameters"])
        return f"LoRAM trains on {share} of the model’s parameters"
    if any(run.kind == "loram" for run in runs):
        return "An adapter trained with LoRAM; how good it is was not measured"
    if any(run.evaluation for run in runs):
        return "An evaluation without LoRAM"
    return "A run of plain LoRA"


def _lead(runs: Sequence[Artefact], found: Sequence[Outcome]) -> str:
    """What was compared, in a sentence or two."""
    bases = list(dict.fromkeys(filter(None, map(_base_name, runs))))
    about = f"Base model: {', '.join(bases)}. " if bases else ""
    if not found:
        return about + "Held-out perplexity and tasks were not measured."
    first = found[0]
    before, after = (number(loss.exp().value) for loss in (first.before, first.after))
    said = f"{about}Perplexity on {first.set_name} ({first.kind}): {before} before, "
    said += f"{after} with the adapter that was trained on the pruned model and recovered."
    if first.shares:
        said += " The share is of the gain in loss (log perplexity)."
    others = [o for o in found if o.label == first.label and o.kind != first.kind]
    for other in others[:2]:
        shift = percent(other.difference.exp().value - 1, signed=True)
        said += f" On {other.set_name} ({other.kind}) perplexity changes by {shift}."
    return said


def _figures(runs: Sequence[Artefact], found: Sequence[Outcome]) -> list[KeyFigure]:
    figures = []
    if found:
        first = found[0]
        of = f", {first.label}" * bool(first.label)
        for other, share in first.shares.items():
            value = "–" if share is None else percent(share)
            note = f"of the gain of {other}" if share is not None else f"{other} gained nothing"
            figures.append(KeyFigure("Gain kept", value, f"{note}, {first.kind}{of}", "measured"))
        before, after = (number(loss.exp().value) for loss in (first.before, first.after))
        note = f"base → base + recovered LoRA, {first.set_name}{of}"
        figures.append(KeyFigure("Perplexity", arrow(before, after), note, "measured"))
    counts = next((c for c in map(_counts, runs) if c), None)
    if counts:
        base, pruned = counts["base_parameters"], counts["pruned_parameters"]
        note = f"base → pruned, ×{base / pruned:.2f} fewer"
        value = arrow(count(base), count(pruned))
        figures.append(KeyFigure("Parameters", value, note, "counted"))
    return figures + memory_figure(runs)


def _base_name(run: Artefact) -> str | None:
    base = run.record.get("base") or (run.evaluation.base if run.evaluation else {})
    named = base.get("id") or run.settings.get("base_model_name_or_path")
    revision = base.get("revision")
    return f"{named} at {revision}" if named and revision else named


def _counts(run: Artefact) -> dict[str, Any] | None:
    """Parameters of base and pruned model, where a run records them."""
    found = run.pruned.get("parameters") or (run.record if run.kind == "plan" else {})
    return found if {"base_parameters", "pruned_parameters"} <= found.keys() else None


def _perplexities(evaluations: Sequence[tuple[str, Evaluation]]) -> Section:
    section = Section("perplexity", "Perplexity")
    for label, evaluation in evaluations:
        section.items += perplexity_parts(label, evaluation)
    if not section.items:
        section.missing.append(
            "Perplexity was not measured: run `axolotl-loram evaluate` and give its evaluation.json"
        )
        return section
    section.text.append(
        "Intervals are of 95 %: 1.96 standard errors over documents. A paired difference compares "
        "two models on the same documents; an unpaired one is wider than need be."
    )
    keys = {
        k for _, found in evaluations for text in found.perplexity.values() for k in text.models
    }
    if not any(key.startswith("also:") for key in keys):
        section.missing.append("No other adapter, such as plain LoRA, was measured beside LoRAM")
    return section


def _tasks(evaluations: Sequence[tuple[str, Evaluation]]) -> Section:
    section = Section("tasks", "Tasks")
    for label, evaluation in evaluations:
        section.items += task_parts(label, evaluation)
    if not section.items:
        section.missing.append("Tasks were not measured: `axolotl-loram evaluate --suite paper`")
    else:
        section.text.append(
            "Intervals are of 95 %, from the standard errors of lm-eval; for a rate of 0 or 1 "
            "Wilson’s interval."
        )
    return section


def _curves(runs: Sequence[Artefact]) -> Section:
    """Training loss and held-out loss of every run that was trained."""
    section, trained = Section("curves", "Training"), [r for r in runs if r.trained]
    colors = _colors(trained)
    training = [
        Series(run.label, colors[run.label], curve)
        for run in trained
        if (curve := run.curve("loss"))
    ]
    heldout = [
        Series(f"{run.label}: {what}", colors[run.label], curve, dashed=key != "eval_loss")
        for run in trained
        for key, what in HELDOUT.items()
        if (curve := run.curve(key))
    ]
    if training:
        section.items.append(Lines("training-loss", "Training loss", training))
        pruned = any(run.kind == "loram" for run in trained)
        which = ": LoRAM’s on the pruned one, which the recovered adapter is not run on" * pruned
        section.text.append(f"Loss on the training batches, each run on its own model{which}.")
    if heldout:
        section.items.append(Lines("heldout-loss", "Held-out loss during training", heldout))
    elif trained:
        section.missing.append("Held-out loss was not measured during training")
    if len(training) < len(trained):
        without = ", ".join(run.label for run in trained if not run.curve("loss"))
        section.missing.append(
            f"No training curve was recorded for {without}: plain LoRA leaves one in its "
            "checkpoints (`save_strategy: steps`), LoRAM in loram.json"
        )
    if not trained:
        section.missing.append("No training run was given")
    return section


def _colors(trained: Sequence[Artefact]) -> dict[str, str]:
    """A colour for each run: cold ones for LoRAM, warm ones for plain LoRA."""
    colors, used = {}, {"loram": 0, "lora": 0}
    for run in trained:
        palette = LORAM_COLORS if run.kind == "loram" else LORA_COLORS
        colors[run.label] = palette[used[run.kind] % len(palette)]
        used[run.kind] += 1
    return colors


def _widths(runs: Sequence[Artefact]) -> Section:
    section, shown = Section("widths", "What was kept"), set()
    for run in runs:
        digest = run.record.get("plan")
        if run.widths and digest not in shown:
            shown.add(digest)
            title = f"Kept width of each layer, {run.label}"
            section.items.append(Strips(f"widths-{run.label}", title, run.widths))
            section.items.append(_width_table(run))
        elif run.pruned and not run.widths:
            section.text.append(f"{run.label}: every layer keeps its width; weights were zeroed.")
        elif run.kind == "loram" and not run.widths:
            named = training_of(run.record).get("pruned_model") or "its pruned model"
            section.missing.append(
                f"The kept width is not known for {run.label}: {named} is not here, or is not the "
                "one it was trained on"
            )
    if not (section.items or section.text or section.missing):
        section.missing.append("No pruned model was given, nor a run that names one")
    return section


def _width_table(run: Artefact) -> Table:
    rows = [
        [str(layer), *("none" if units is None else "{:,} of {:,}".format(*units) for units in row)]
        for layer, row in enumerate(zip(*run.widths.values(), strict=True))
    ]
    return Table(f"Every layer of {run.label}", ["layer", *run.widths], rows, hidden=True)


def _provenance(runs: Sequence[Artefact]) -> Section:
    section = Section("provenance", "What was run")
    for run in runs:
        rows = [[name, str(text)] for name, text in _facts(run).items() if text]
        section.items.append(Table(f"{run.label}: {_kind(run)}", ["", ""], rows, texts=2))
        files = run.pruned.get("files")
        if isinstance(files, Mapping):
            hashes = [[name, str(digest)] for name, digest in files.items()]
            title = f"SHA-256 of the pruned model’s files, {run.label}"
            section.items.append(Table(title, ["file", "SHA-256"], hashes, 2, hidden=True))
    return section


KINDS = {
    "loram": "LoRAM, recovered for the base",
    "lora": "plain LoRA",
    "pruned": "pruned model",
    "plan": "plan of memory, nothing was run",
    "evaluation": "evaluation",
}


def _kind(run: Artefact) -> str:
    unrecovered = run.record.get("kind") == Kind.TRAINED_ADAPTER
    return "LoRAM, not recovered yet" if unrecovered else KINDS[run.kind]


def _facts(run: Artefact) -> dict[str, Any]:
    """Name → text of what is recorded about a run; what is not, is left out."""
    pruning, training = run.pruned.get("pruning") or {}, training_of(run.record)
    measured = (training.get("memory") or {}).get("measured") or {}
    base = run.pruned.get("base") or run.record.get("base") or {}
    facts = {
        "base model": _base_name(run) or "not recorded",
        "base fingerprint": base.get("fingerprint") or "",
        "plan": run.record.get("plan") or (run.evaluation and run.evaluation.plan) or "",
        "pruning": _said(pruning),
        "calibration": _said(run.pruned.get("calibration") or {}),
        "refit": _said(refit_summary(run.pruned.get("refit") or {})),
        "alignment": "; ".join(_said(each) for each in run.pruned.get("alignments") or [])
        or ("none" if run.pruned else ""),
        "parameters": _parameters(_counts(run) or {}),
        "adapter": _said(run.settings, _ADAPTER),
        "steps": str(run.history[-1].get("step", "")) if run.history else "",
        "warm start": str(training.get("warm_start") or ""),
        "trained on": measured.get("device") or "not recorded" * run.trained,
        "settings": _said(run.record.get("training", {})) if run.kind == "plan" else "",
        "versions of the pruned model": _said(run.pruned.get("versions") or {}),
        "versions of the training": _said(training.get("versions") or {}),
    }
    return facts | (_evaluated(run.evaluation) if run.evaluation else {})


_ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save")


def _evaluated(evaluation: Evaluation) -> dict[str, str]:
    settings = {"seed": evaluation.seed, "batch_size": evaluation.batch_size}
    sources = [f"{name}: {t.source}" for name, t in evaluation.perplexity.items() if t.source]
    return {
        "evaluated on": _said({"device": evaluation.device, "dtype": evaluation.dtype}),
        "evaluation settings": _said(settings),
        "held-out text": "; ".join(sources),
        "versions of the evaluation": _said(evaluation.versions),
    }


def _parameters(counts: Mapping[str, Any]) -> str:
    if not counts:
        return ""
    said = f"{counts['pruned_parameters']:,} of {counts['base_parameters']:,}"
    kept = counts.get("kept_per_pruned_layer")
    if kept and "pruned_layers" in counts and "layers" in counts:
        said += f"; {counts['pruned_layers']} of {counts['layers']} layers pruned, the last of them"
        said += f" to {_said(kept)}"
    if "sparsity" in counts:
        said += f"; {counts['zeros']:,} of them zeros"
    return said


def _said(values: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """Names and values in a line, without what is empty or off."""
    chosen = values if names is None else {n: values[n] for n in names if n in values}
    return ", ".join(
        f"{name.replace('_', ' ')} {_written(value)}"
        for name, value in chosen.items()
        if value is not None and value is not False and value not in ([], {}, "")
    )


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_said(value)})"
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return str(value) if not isinstance(value, bool) else "yes"
