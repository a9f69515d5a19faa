"""Index files of the LoRAM reference code (github.com/junzhang-zj/LoRAM) as a plan.

Each is a dict with `pruned_idx`, the *removed* positions: neurons in
``model.layers.{i}.mlp.gate_proj.pt``, and rows of k_proj (head_dim of them for each removed KV
group) in ``model.layers.{i}.self_attn.k_proj.pt``. Layers without a file are whole.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture import sizes_of
from axolotl_loram.errors import LoRAMError
from axolotl_loram.plan import entries_of

INDEX_OF = {"neurons": ("gate_proj", None), "kv_groups": ("k_proj", "head_dim")}
"""Kind → the projection whose rows a file lists, and the size that counts one unit's rows."""


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
            removed = np.unique(_removed_positions(file, sizes[group.kind] * rows) // rows)
            kept[entry] = np.setdiff1d(np.arange(sizes[group.kind]), removed).astype(np.int32)
    if not kept:
        example = next(entries_of(config))[0]
        raise LoRAMError(
            f"expected index files such as {example}.gate_proj.pt below {folder}, found none"
        )
    return kept


def _removed_positions(file: Path, size: int) -> np.ndarray:
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise LoRAMError(
            f"expected a dict of tensors in {file}, found something else "
            f"({str(error).splitlines()[0]})"
        ) from None
    removed = loaded.get("pruned_idx") if isinstance(loaded, dict) else None
    if not isinstance(removed, torch.Tensor) or removed.is_floating_point():
        raise LoRAMError(f"expected a tensor of integers 'pruned_idx' in {file}, found {removed!r}")
    positions = removed.reshape(-1).numpy().astype(np.int64)
    if len(positions) and (positions.min() < 0 or positions.max() >= size):
        raise LoRAMError(
            f"expected positions in 0…{size - 1} in {file}, found {positions.min()}…"
            f"{positions.max()}: the index files are for another model"
        )
    return positions
