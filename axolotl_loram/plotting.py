"""The plot of a memory plan: stacked parts of each method, and the GPUs' memory as lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.gpus import GPUS
from axolotl_loram.tables import memory_rows

NOT_STACKED = ("peak", "host memory: weights")


def plot_memory(methods: Mapping[str, Mapping[str, Any]], file: Path, title: str) -> None:
    """Write a picture of the table of memory.

    Args:
        methods: As in the JSON of `axolotl-loram plan`.
        file: Where; its ending says the format, such as .png or .svg.
        title: What is shown.

    Raises:
        LoRAMError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # draws without a display, and without pyplot's state
    except ImportError:
        raise LoRAMError(
            "expected matplotlib for --plot, found none: pip install 'axolotl-loram[plot]'"
        ) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rows = memory_rows(methods)
    peaks, height = rows["peak"], [0.0] * len(methods)
    for name, row in rows.items():
        if name not in NOT_STACKED:
            axes.bar(list(methods), row, bottom=height, label=name)
            height = [below + value for below, value in zip(height, row, strict=True)]
    axes.plot(list(methods), peaks, "k_", markersize=40, label="peak")
    for name, memory in GPUS.items():
        if memory <= 1.1 * max(peaks):
            axes.axhline(memory, color="grey", linewidth=0.5)
            axes.annotate(name, (1, memory), xycoords=("axes fraction", "data"), fontsize=7)
    axes.set(ylabel="GiB on the device (predicted)", title=title)
    axes.legend(fontsize=7)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise LoRAMError(f"expected to be able to write {file}, found: {error}") from None
