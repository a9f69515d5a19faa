"""The pictures of `axolotl-loram plan`: the memory of the methods, and the ways to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.memory.gpus import GPUS
from axolotl_loram.memory.tables import memory_rows
from axolotl_loram.results.figures import Bar, Bars, save


def save_memory(methods: Mapping[str, Mapping[str, Any]], file: Path, title: str) -> None:
    """Write a picture of a plan's memory with the GPUs that are not far beyond it.

    Args:
        methods: As in the JSON of `axolotl-loram plan`.
        file: Where.
        title: What is shown.

    Raises:
        LoRAMError: As `figures.save`.
    """
    rows = memory_rows(methods)
    parts = {
        name: row for name, row in rows.items() if name not in ("peak", "host memory: weights")
    }
    bars = [
        Bar(method, {name: row[column] for name, row in parts.items()})
        for column, method in enumerate(methods)
    ]
    most = 1.1 * max(rows.get("peak", ()), default=0)
    limits = {name: size for name, size in GPUS.items() if size <= most}
    save(Bars("memory", f"{title}: GiB on the device, predicted", bars, limits=limits), file)


def save_ways(compared: Mapping[str, Any], file: Path, title: str) -> None:
    """Write a picture of the ways to train: what each holds, and how fast it can be at most.

    Args:
        compared: The JSON of `axolotl-loram plan --compare`.
        file: Where.
        title: What is shown.

    Raises:
        LoRAMError: As `figures.save`.
    """
    sizes = {"GPU": "device_bytes", "host memory": "host_bytes"}
    bars = [
        Bar(
            f"{way['name']}: at most {way['bound_tokens_per_second']:,.0f} tokens/s",
            {part: way[key] / 2**30 for part, key in sizes.items()},
        )
        for way in compared["ways"]
    ]
    card = compared["card"]
    limits = {card["name"]: card["memory_bytes"] / 2**30}
    save(Bars("ways", f"{title}: GiB to hold, predicted", bars, limits=limits), file)
