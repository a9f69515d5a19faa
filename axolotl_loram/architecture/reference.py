"""Index files of the LoRAM reference code (github.com/junzhang-zj/LoRAM) as a plan.

Each is a dict with `pruned_idx`, the *removed* positions: neurons in
``model.layers.{i}.mlp.gate_proj.pt``, and rows of k_proj (head_dim of them for each removed KV
group) in ``model.layers.{i}.self_attn.k_proj.pt``. Layers without a file are whole.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import sizes_of
from axolotl_loram.architecture.plan import entries_of
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.untrusted import own_file

INDEX_OF = {"neurons": ("gate_proj", None), "kv_groups": ("k_proj", "head_dim")}
"""Kind → the projection whose rows a file lists, and the size that counts one unit's rows."""
MOST_FILE_BYTES = 2**24
"""Of one file: two million positions."""


def read_indices(folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Kept units by plan entry, ascending int32, from a folder (searched below) of index files.

    Raises:
        LoRAMError: No index file is there, or one is not what the reference code writes.
    """
    files = {file.name: file for file in sorted(folder.rglob("model.layers.*.pt"))}
    kept = {}
    for entry, layer, group in entries_of(config):
        projection, block = INDEX_OF.get(group.kind, ("", None))
        file = files.get(f"{entry}.{projection}.pt")
        if file is not None:
            sizes = sizes_of(config, layer)
            rows = sizes[block] if block else 1
            removed = _removed_units(file, sizes[group.kind], rows)
            kept[entry] = np.setdiff1d(np.arange(sizes[group.kind]), removed).astype(np.int32)
    if not kept:
        example = next(entries_of(config))[0]
        raise LoRAMError(
            f"expected index files such as {example}.gate_proj.pt below {folder}, found none"
        )
    return kept


def _removed_units(file: Path, units: int, rows: int) -> np.ndarray:
    """Ascending numbers of the units that a file removes, of `units` with `rows` rows each."""
    positions = np.unique(_removed_positions(file, units * rows))
    removed, found = np.unique(positions // rows, return_counts=True)
    if (found != rows).any():
        raise LoRAMError(
            f"expected {file} to remove units of {rows} rows whole, found "
            f"{found[found != rows][0]} rows of unit {removed[found != rows][0]}: the index files "
            "are for another model"
        )
    return removed


def _removed_positions(file: Path, size: int) -> np.ndarray:
    loaded = _load(file)
    removed: Any = loaded.get("pruned_idx") if isinstance(loaded, dict) else None
    if not _is_integers(removed):
        raise LoRAMError(
            f"expected a tensor of integers 'pruned_idx' in {file}, found {str(removed)[:80]!r}"
        )
    if removed.numel() > size:  # it may claim more than the file has, all the same few
        raise LoRAMError(
            f"expected at most {size} positions in {file}, found {removed.numel()}: the index "
            "files are for another model"
        )
    positions = removed.reshape(-1).numpy().astype(np.int64)
    if len(positions) and (positions.min() < 0 or positions.max() >= size):
        raise LoRAMError(
            f"expected positions in 0…{size - 1} in {file}, found {positions.min()}…"
            f"{positions.max()}: the index files are for another model"
        )
    return positions


def _load(file: Path) -> Any:
    """What a file holds, of tensors and plain values alone.

    Raises:
        LoRAMError: It is too large, packed smaller than it is, or holds something else.
    """
    import torch

    try:
        size = own_file(file).stat().st_size
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
        if size > MOST_FILE_BYTES:
            raise LoRAMError(f"expected at most {MOST_FILE_BYTES} bytes in {file}, found {size}")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except LoRAMError:
        raise
    except Exception as error:  # whatever torch's unpickler stumbles over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LoRAMError(
            f"expected a dict of tensors in {file}, found something else ({reason[:200]})"
        ) from None


def _is_integers(value: Any) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_floating_point() or value.is_complex() or value.is_quantized)
    )
