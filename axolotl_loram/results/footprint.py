"""Memory in pictures and tables: predicted by part, and measured where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from axolotl_loram.memory.gpus import GPUS
from axolotl_loram.memory.tables import GIB, memory_rows
from axolotl_loram.results.artefacts import Artefact, training_of
from axolotl_loram.results.figures import Bar, Bars, save
from axolotl_loram.results.page import Chapter, KeyFigure, Table, arrow

TITLES = {"lora": "LoRA", "qlora": "QLoRA", "loram": "LoRAM", "qloram": "QLoRAM"}
LOGGED = "memory/max_allocated (GiB)"  # what Axolotl logs of each step
GPU = ("max_allocated_bytes", "max_allocated_before_training_bytes")


@dataclass
class Footprint:
    """Predictions of one source: method → `Prediction` as a dict, and what runs of it took.

    Attributes:
        label: The run or plan.
        method: What was run; None for a plan.
        methods: Method → what is predicted.
        measured: (method, run) → bytes allocated on a GPU at most.
    """

    label: str
    method: str | None
    methods: dict[str, Mapping[str, Any]]
    measured: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every method, predicted ones first."""
        return list(dict.fromkeys([*self.methods, *(method for method, _ in self.measured)]))

    @property
    def scale(self) -> tuple[str, int]:
        """The unit that suits the sizes, and its bytes."""
        sizes = [method["allocated_bytes"] for method in self.methods.values()]
        large = max([*sizes, *self.measured.values()], default=0) >= GIB
        return ("GiB", GIB) if large else ("MiB", 2**20)


def memory_section(runs: Sequence[Artefact]) -> Chapter:
    """Charts and tables of memory; what was not measured is named."""
    section, prints = Chapter("memory", "Memory"), footprints(runs)
    for found in prints:
        section.items += [_chart(found), _table(found)]
    if prints:
        section.text.append(
            "Predicted is what is allocated on one GPU at the worst moment, calculated from the "
            "model’s shapes and the run’s settings; CUDA context and allocator slack are assumed, "
            "and only in the table. Activations, logits and what loading takes are not at their "
            "highest at once, so the rows of the table add up to more than the peak."
        )
    else:
        section.missing.append(
            "Memory was not predicted: add what `axolotl-loram plan --json` prints"
        )
    for run in runs:
        if used := _memory(run, "measured").get("max_resident_process_bytes"):
            section.text.append(
                f"{run.label}: measured on a CPU, {used / GIB:.2f} GiB resident at most in the "
                "whole process, Python and its libraries included. Not to be compared with what "
                "is predicted for a GPU."
            )
    trained = [run for run in runs if run.trained]
    without = [run.label for run in trained if not _allocated(run)]
    if without or not trained:
        named = f" for {', '.join(without)}" if without else ""
        section.missing.append(f"Memory on a GPU was not measured{named}")
    return section


def memory_figure(runs: Sequence[Artefact]) -> list[KeyFigure]:
    """The peak of a run against its counterpart on the base, of a plan QLoRAM's against LoRA's."""
    for found in footprints(runs):
        pruned = found.method or "qloram"
        base = pruned.replace("loram", "lora") if found.method else "lora"
        if base != pruned and {base, pruned} <= found.methods.keys():
            (unit, size), both = found.scale, (base, pruned)
            peaks = [found.methods[name]["allocated_bytes"] for name in both]
            value = arrow(*(f"{peak / size:.1f}" for peak in peaks)) + f"\N{NO-BREAK SPACE}{unit}"
            note = f"{TITLES[base]} → {TITLES[pruned]}, allocated on one GPU"
            return [KeyFigure("Memory", value, note, "predicted")]
    return []


def footprints(runs: Sequence[Artefact]) -> list[Footprint]:
    """What was predicted, by plan or run, with what was measured of it."""
    found = []
    for run in runs:
        predicted, allocated = _memory(run, "predicted"), _allocated(run)
        methods = run.record.get("methods") if run.kind == "plan" else predicted.get("methods")
        if predicted and not methods:
            methods = {_method(run): predicted}
        if methods or allocated:
            method = None if run.kind == "plan" else _method(run)
            measured = {(_method(run), run.label): allocated} if allocated else {}
            found.append(Footprint(run.label, method, dict(methods or {}), measured))
    return found


def _method(run: Artefact) -> str:
    """Which of the four methods a run is."""
    if run.kind == "loram":
        return str(_memory(run, "predicted").get("method", "loram"))
    return "qlora" if run.quantized else "lora"


def _memory(run: Artefact, how: str) -> Mapping[str, Any]:
    """What training recorded of its memory: "predicted" or "measured"."""
    return (training_of(run.record).get("memory") or {}).get(how) or {}


def _allocated(run: Artefact) -> float:
    """Bytes allocated on a GPU at most, loading included; 0 where that was not measured."""
    peak = max(_memory(run, "measured").get(name) or 0 for name in GPU)
    return float(peak or GIB * max((v for _, v in run.curve(LOGGED)), default=0.0))


def _chart(found: Footprint) -> Bars:
    (unit, size), bars = found.scale, []
    for name in found.names:
        parts = _parts(found.methods[name]) if name in found.methods else {}
        scaled = {part: value / size for part, value in parts.items() if value > 0}
        measured = {f"run {r}": v / size for (m, r), v in found.measured.items() if m == name}
        bars.append(Bar(TITLES.get(name, name), scaled, measured))
    kinds = ["predicted by part"] * bool(found.methods) + ["measured"] * bool(found.measured)
    title = f"Memory on one GPU, {found.label}: {' and '.join(kinds)}"
    return Bars(f"memory-{found.label}", title, bars, unit)


def save_memory(methods: Mapping[str, Mapping[str, Any]], file: Path, title: str) -> None:
    """Write a picture of the methods in a plan's JSON, with the GPUs that are not far beyond it."""
    found = Footprint(title, None, dict(methods))
    chart, (_, size) = _chart(found), found.scale
    bars = []
    for bar, method in zip(chart.bars, methods.values(), strict=True):
        assumed = (method["context_bytes"] + method["slack_bytes"]) / size
        bars.append(replace(bar, parts={**bar.parts, "context and slack (assumed)": assumed}))
    most = max((method["peak_bytes"] for method in methods.values()), default=0) / GIB
    limits = {name: held * GIB / size for name, held in GPUS.items() if held <= 1.1 * most}
    save(replace(chart, bars=bars, limits=limits), file)


def save_ways(compared: Mapping[str, Any], file: Path, title: str) -> None:
    """Write a picture of the ways in the JSON of `plan --compare`: sizes, and speed at most."""
    sizes = {"GPU": "device_bytes", "host memory": "host_bytes"}
    bars = [
        Bar(
            f"{way['name']}: at most {way['bound_tokens_per_second']:,.0f} tokens/s",
            {part: way[key] / GIB for part, key in sizes.items()},
        )
        for way in compared["ways"]
    ]
    limits = {compared["card"]["name"]: compared["card"]["memory_bytes"] / GIB}
    save(Bars("ways", f"{title}: GiB to hold, predicted", bars, limits=limits), file)


def _parts(method: Mapping[str, Any]) -> dict[str, float]:
    """Bytes by part, whose sum is what is allocated at the worst moment.

    A training step holds the weights, LoRA's states, and at its worst moment so much more; where
    loading takes more than any moment of a step, what it takes beyond that is a part of its own.
    """
    weights, device = method["weights"], method["weights_device_bytes"]
    head = weights["embedding"] + weights["lm_head"]
    linears = weights["linears"] + weights["experts"]
    states = 2 * method["lora_bytes"] + method["optimizer_bytes"]
    step = max(value for name, value in method["moments"].items() if name != "loading")
    return {
        "linear weights": linears,
        "embedding and lm_head": head,
        "other weights": device - head - linears,
        "LoRA, gradients, optimizer": states,
        "activations and logits": step - device - states,
        "more at loading": method["allocated_bytes"] - step,
    }


def _table(found: Footprint) -> Table:
    """Parts as rows, methods as columns; then what was measured, a row for each run."""
    rows: list[list[str]] = []
    (unit, size), names = found.scale, found.names
    for name, values in memory_rows(found.methods).items() if found.methods else ():
        name = "peak with what is assumed" if name == "peak" else name
        if name.startswith("CUDA"):
            peaks = [method["allocated_bytes"] / size for method in found.methods.values()]
            rows.append(["peak, allocated", *(f"{peak:,.2f}" for peak in peaks)])
        rows.append([name, *(f"{value * GIB / size:,.2f}" for value in values)])
    for row in rows:
        row += ["not predicted"] * (len(names) - len(found.methods))
    for (method, run), value in found.measured.items():
        cells = [f"{value / size:,.2f}" if name == method else "not measured" for name in names]
        rows.append([f"peak, allocated, measured in {run}", *cells])
    title = f"{unit} on one GPU, {found.label}" + ": predicted" * bool(found.methods)
    return Table(title, ["part", *(TITLES.get(name, name) for name in names)], rows)
