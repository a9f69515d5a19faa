"""What the command line shows people: lines of name and value, and the table of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_loram.memory.gpus import GPUS

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


def lines(result: Mapping[str, Any]) -> str:
    """Names and values, one to a line."""
    width = max(len(name) for name in result)
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {_written(value)}" for name, value in result.items()
    )


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


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


def evaluation_table(result: Mapping[str, Any]) -> str:
    """Models as rows; perplexities and task scores, with standard errors, as columns."""
    rows: dict[str, list[str]] = {"": [*result["perplexity"], *result["tasks"]]}
    rows |= {name: [] for name in result["models"]}
    for name in result["models"]:
        for held in result["perplexity"].values():
            found = held["models"].get(name)
            error = found and found["perplexity"] and found["standard_error"]
            spread = found["perplexity"] * error if error else None
            rows[name].append(_measured(found and found["perplexity"], spread, 2))
        for task in result["tasks"].values():
            found = task["models"].get(name) or {}
            rows[name].append(_measured(found.get("value"), found.get("standard_error"), 4))
    shares = [
        f"{name}: base+recovered keeps {share:.1%} of {other}'s gain (log perplexity)"
        for name, held in result["perplexity"].items()
        for other, share in held.get("share_of_gain", {}).items()
    ]
    return "\n".join([columns(rows), "", "perplexity or score, ± standard error", *shares])


def _measured(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ±{error:.{digits}f}" if error is not None else "")


def columns(rows: Mapping[str, Sequence[str]]) -> str:
    """Names and cells, one row to a line."""
    left = max(map(len, rows))
    width = max(len(cell) for row in rows.values() for cell in row) + 2
    return "\n".join(
        f"{name:<{left}}{''.join(f'{cell:>{width}}' for cell in row)}".rstrip()
        for name, row in rows.items()
    )
