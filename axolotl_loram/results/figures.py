"""Plots: a memory plan's stacked parts with GPUs as lines; the share of each layer that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import new_file
from axolotl_loram.memory.gpus import GPUS
from axolotl_loram.memory.tables import memory_rows

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
    figure = _figure(8, 5)
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
    with new_file(file) as partial:
        try:
            figure.savefig(partial, dpi=150, format=file.suffix[1:])
        except ValueError as error:  # of an ending that is no format
            raise LoRAMError(f"expected to be able to write {file}, found: {error}") from None


def plot_kept(shares: Mapping[str, Sequence[float | None]], file: Path, title: str) -> None:
    """Write a picture of how much of each layer pruning keeps.

    Args:
        shares: Kind of unit → for each layer, the share kept (0 to 1), None where it has no such.
        file: Where; its ending says the format, such as .png or .svg.
        title: What is shown.

    Raises:
        LoRAMError: matplotlib is missing.
    """
    figure = _figure(8, 3)
    axes = figure.subplots()
    width = 0.8 / max(1, len(shares))
    for place, (kind, column) in enumerate(shares.items()):
        layers = [layer for layer, share in enumerate(column) if share is not None]
        positions = [layer + (place + 0.5) * width - 0.4 for layer in layers]
        heights = [share for share in column if share is not None]
        axes.bar(positions, heights, width, label=kind.replace("_", " "))
    axes.set(xlabel="layer", ylabel="share kept", ylim=(0, 1.05), title=title)
    axes.legend(fontsize=7, loc="upper center")
    figure.savefig(file, dpi=150)


def _figure(width: float, height: float) -> Any:
    """An empty picture, in inches."""
    try:
        from matplotlib.figure import Figure  # draws without a display, and without pyplot's state
    except ImportError:
        raise LoRAMError(
            "expected matplotlib for plots, found none: pip install 'axolotl-loram[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")
