"""The table of memory that people see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl_loram.memory.gpus import GPUS
from axolotl_loram.tables import columns

GIB = 2**30
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
