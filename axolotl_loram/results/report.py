"""From artefacts to a report: headline, key figures and sections. What was not measured is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.record import Kind, refit_summary, rounding_summary
from axolotl_loram.errors import LoRAMError
from axolotl_loram.results.artefacts import Artefact, Evaluation, read, training_of
from axolotl_loram.results.comparison import Gain, gains, perplexity_parts, task_parts
from axolotl_loram.results.figures import Lines, Series, Strips
from axolotl_loram.results.footprint import memory_figure, memory_section
from axolotl_loram.results.page import Chapter, KeyFigure, Report, Table, arrow, count, percent

COLORS = {"loram": ("blue", "green", "purple", "grey"), "lora": ("orange", "red", "brown")}
HELDOUT = {"eval_loss": "model in training", "eval_loram_recovered_loss": "base + recovered LoRA"}


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
            " it is damaged, was changed, or is of another version: write it again"
        ) from error


def _build(runs: Sequence[Artefact]) -> Report:
    evaluations = [(run.label, run.evaluation) for run in runs if run.evaluation is not None]
    if len(evaluations) == 1:
        evaluations = [("", evaluations[0][1])]  # nothing to tell it from
    found = [each for label, evaluation in evaluations for each in gains(label, evaluation)]
    sections = [
        _perplexities(evaluations),
        _tasks(evaluations),
        _curves(runs),
        memory_section(runs),
        _widths(runs),
        _provenance(runs),
    ]
    return Report(_headline(runs, found), _lead(runs, found), _figures(runs, found), sections)


def _headline(runs: Sequence[Artefact], found: Sequence[Gain]) -> str:
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
        before, after = found[0].before, found[0].after
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


def _lead(runs: Sequence[Artefact], found: Sequence[Gain]) -> str:
    """What was compared, in a sentence or two."""
    bases = list(dict.fromkeys(filter(None, map(_base_name, runs))))
    about = f"Base model: {', '.join(bases)}. " if bases else ""
    if not found:
        return about + "Held-out perplexity and tasks were not measured."
    first = found[0]
    said = f"{about}Perplexity on {first.set_name} ({first.kind}): {first.before} before, "
    said += f"{first.after} with the adapter that was trained on the pruned model and recovered."
    if first.shares:
        said += " The share is of the gain in loss (log perplexity)."
    others = [o for o in found if o.label == first.label and o.kind != first.kind]
    for other in others[:2]:
        shift = percent(other.difference.exp(less=1).value, signed=True)
        said += f" On {other.set_name} ({other.kind}) perplexity changes by {shift}."
    return said


def _figures(runs: Sequence[Artefact], found: Sequence[Gain]) -> list[KeyFigure]:
    figures = []
    if found:
        first = found[0]
        of = f", {first.label}" * bool(first.label)
        for other, share in first.shares.items():
            value = "–" if share is None else percent(share)
            note = f"of the gain of {other}" if share is not None else f"{other} gained nothing"
            figures.append(KeyFigure("Gain kept", value, f"{note}, {first.kind}{of}", "measured"))
        note = f"base → base + recovered LoRA, {first.set_name}{of}"
        figures.append(KeyFigure("Perplexity", arrow(first.before, first.after), note, "measured"))
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


def _perplexities(evaluations: Sequence[tuple[str, Evaluation]]) -> Chapter:
    section = Chapter("perplexity", "Perplexity")
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


def _tasks(evaluations: Sequence[tuple[str, Evaluation]]) -> Chapter:
    section = Chapter("tasks", "Tasks")
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


def _curves(runs: Sequence[Artefact]) -> Chapter:
    """Training loss and held-out loss of every run that was trained."""
    section, trained = Chapter("curves", "Training"), [r for r in runs if r.trained]
    palettes = {kind: cycle(colors) for kind, colors in COLORS.items()}
    colors = {run.label: next(palettes[run.kind]) for run in trained}
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


def _widths(runs: Sequence[Artefact]) -> Chapter:
    section, shown = Chapter("widths", "What was kept"), set()
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


def _provenance(runs: Sequence[Artefact]) -> Chapter:
    section = Chapter("provenance", "What was run")
    for run in runs:
        rows = [[name, text] for name, text in _facts(run).items() if text]
        section.items.append(Table(f"{run.label}: {_kind(run)}", ["", ""], rows, texts=2))
        files = run.pruned.get("files")
        if isinstance(files, Mapping):
            hashes = [[name, str(digest)] for name, digest in files.items()]
            title = f"SHA-256 of the pruned model’s files, {run.label}"
            section.items.append(Table(title, ["file", "SHA-256"], hashes, 2, hidden=True))
    return section


ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save")
COUNTED = (
    *("base_parameters", "pruned_parameters", "zeros"),
    *("layers", "pruned_layers", "kept_per_pruned_layer"),
)
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


def _facts(run: Artefact) -> dict[str, str]:
    """Name → text of what is recorded about a run; what is not, is left out."""
    training, evaluation = training_of(run.record), run.evaluation or Evaluation()
    measured = (training.get("memory") or {}).get("measured") or {}
    base = run.pruned.get("base") or run.record.get("base") or {}
    sources = [f"{name}: {t.source}" for name, t in evaluation.perplexity.items() if t.source]
    computed = {"seed": evaluation.seed, "batch_size": evaluation.batch_size}
    found = {
        "base model": _base_name(run) or "not recorded",
        "base fingerprint": base.get("fingerprint"),
        "plan": run.record.get("plan") or evaluation.plan,
        "pruning": run.pruned.get("pruning"),
        "calibration": run.pruned.get("calibration"),
        "refit": refit_summary(run.pruned.get("refit") or {}),
        "rounding": rounding_summary(run.pruned.get("rounding") or {}),
        "alignment": run.pruned.get("alignments") or ("none" if run.pruned else None),
        "parameters": {name: (_counts(run) or {}).get(name) for name in COUNTED},
        "adapter": {name: run.settings.get(name) for name in ADAPTER},
        "steps": run.history[-1].get("step") if run.history else None,
        "warm start": training.get("warm_start"),
        "trained on": measured.get("device") or "not recorded" * run.trained,
        "settings": run.record.get("training") if run.kind == "plan" else None,
        "versions of the pruned model": run.pruned.get("versions"),
        "versions of the training": training.get("versions"),
        "evaluated on": {"device": evaluation.device, "dtype": evaluation.dtype},
        "evaluation settings": computed,
        "held-out text": sources,
        "versions of the evaluation": evaluation.versions,
    }
    return {name: _written(value) for name, value in found.items()}


def _said(values: Mapping[str, Any]) -> str:
    """Names and values in a line, without what is empty or off."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'({text})' if isinstance(value, Mapping) else text}"
        for name, value in values.items()
        if (text := _written(value))
    )


def _written(value: Any) -> str:
    if value is None or value is False:
        return ""
    if isinstance(value, Mapping):
        return _said(value)
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(each, Mapping) for each in value) else ", "
        return between.join(filter(None, map(_written, value)))
    if isinstance(value, int) and value >= 10**4:
        return f"{value:,}"
    return "yes" if value is True else str(value)
