"""The table of memory that people see."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from textwrap import fill
from typing import Any

from axolotl_loram.config_shares import largest
from axolotl_loram.memory.gpus import GPUS
from axolotl_loram.tables import columns

GIB, GB = 2**30, 10**9
WEIGHTS = ("embedding", "lm_head", "linears", "experts")
ROWS = {
    "LoRA": "lora_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "activations": "activation_bytes",
    "logits": "logits_bytes",
    "embeddings at loading": "loading_bytes",
    "CUDA context (assumed)": "context_bytes",
    "allocator slack (assumed)": "slack_bytes",
    "peak": "peak_bytes",
    "host memory: weights": "weights_host_bytes",
}


def memory_rows(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Part → GiB of each method, from top to bottom of the table."""
    rows = {
        f"{part.replace('linears', 'linear')} weights": [
            m["weights"][part] for m in methods.values()
        ]
        for part in WEIGHTS
    }
    rows["other weights"] = [
        method["weights_device_bytes"] - sum(method["weights"][part] for part in WEIGHTS)
        for method in methods.values()
    ]
    rows |= {name: [method[key] for method in methods.values()] for name, key in ROWS.items()}
    return {name: [value / GIB for value in row] for name, row in rows.items() if any(row)}


def memory_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Parts as rows, methods as columns, in GiB; then which GPUs hold which method."""
    shown = {"GiB": list(methods)}
    shown |= {name: [f"{value:.2f}" for value in row] for name, row in memory_rows(methods).items()}
    shown[""] = [""] * len(methods)
    for name, memory in GPUS.items():
        peaks = [method["peak_bytes"] / GIB for method in methods.values()]
        shown[f"{name} ({memory:.2f})"] = ["fits" if peak <= memory else "–" for peak in peaks]
    note = (
        "Weights, LoRA, gradients and optimizer states are exact. Activations, logits and what "
        "loading takes\nare not at their highest at once: the peak is the worst moment. Nothing "
        "here was measured on a GPU."
    )
    return f"{columns(shown)}\n\n{note}"


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


TRIED = 0.95
"""The largest pruning ratio of the paper, and of this project's measurements."""
WAYS = (
    ("way", lambda way: way["name"]),
    ("GPU, GiB", lambda way: f"{way['device_bytes'] / GIB:.1f}"),
    ("fits", lambda way: "yes" if way["fits"] else "no"),
    ("host, GiB", lambda way: f"{way['host_bytes'] / GIB:.0f}"),
    ("read, GB", lambda way: f"{way['disk_bytes'] / GB:.0f}"),
    ("PCIe, GB a step", lambda way: _three(way["pcie_bytes"] / GB)),
    ("GFLOP a token", lambda way: f"{way['flops_per_token'] / 10**9:.0f}"),
    ("tokens/s ≤", lambda way: f"{way['bound_tokens_per_second']:,.0f} ({way['bound_by']})"),
    ("hours ≥", lambda way: _three(way["bound_hours"])),
)
"""Columns of the comparison: their heads, and what they say of a way."""


def ways_table(result: Mapping[str, Any]) -> str:
    """What `ways.compare_ways` returns, for people: ways as rows."""
    rows = {name: [head for head, _ in WAYS[1:]] for name, _ in WAYS[:1]}
    rows |= {way["name"]: [said(way) for _, said in WAYS[1:]] for way in result["ways"]}
    card, data, training = result["card"], result["data"], result["training"]
    run = ", ".join(f"{name} {value}" for name, value in training.items() if value)
    notes = [
        f"{card['name']}: {card['memory_bytes'] / GIB:.2f} GiB, {card['tflops']:g} TFLOP/s, "
        f"{card['bandwidth']:g} GB/s, PCIe {card['pcie']}.0; {run}",
        f"A step: {result['step_tokens']:,} tokens on each GPU. The data: {data['trained']:,} "
        f"tokens in all ({data['said']}).",
        "Speed and hours are bounds, not predictions: no run is faster. They leave out "
        f"{'; '.join(result['bound_leaves_out'])}.",
        "Of host memory, 2 GiB a process are assumed. Nothing here was measured on a GPU.",
    ]
    notes += [f"not counted: {what}" for what in result["not_counted"]]
    if any(largest(way["pruning_ratio"]) > TRIED for way in result["ways"]):
        notes.append(f"Ratios above {TRIED}: it fits, but no such model was ever tried here.")
    if "anchor" in result:
        notes.append(anchor_line(result["anchor"]))
    wrapped = [fill(note, 100, subsequent_indent="  ") for note in notes]
    return "\n".join([columns(rows), "", *wrapped])


def anchor_line(anchor: Mapping[str, Any]) -> str:
    """What an anchor costs, as a sentence."""
    return (
        f"anchor: base, before the first step: {anchor['flops'] / 10**12:,.0f} TFLOP of the "
        f"original, {anchor['read_bytes'] / GB:,.0f} GB read; disk: at most "
        f"{anchor['disk_bytes'] / GB:.3g} GB, and {anchor['states_bytes'] / GB:.3g} GB meanwhile, "
        f"for {anchor['tokens']:,} tokens."
    )


def ways_markdown(result: Mapping[str, Any], heads: Collection[str] = ()) -> str:
    """The same rows as a table of Markdown, with all columns or those of some heads."""
    shown = [column for column in WAYS if not heads or column[0] in heads]
    rows = [[head for head, _ in shown], ["---"] * len(shown)]
    rows += [[said(way) for _, said in shown] for way in result["ways"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
