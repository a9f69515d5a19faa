"""Setting single weights to zero: a share of them, or N of each M consecutive inputs stay.

All linear weights of all layers that are not protected are made sparse. Shapes stay, so zeros save
no memory by themselves: this is for comparing criteria, as LoRAM-Unst and LoRAM-Semi of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from axolotl_loram.architecture.counts import Sparsity, pattern_of, removed_of
from axolotl_loram.architecture.plan import mask_digest
from axolotl_loram.architecture.spaces import LINEAR
from axolotl_loram.files.resumable import Work
from axolotl_loram.files.tensors import StoredTensor
from axolotl_loram.pruning.evidence import Evidence


def linear_weights(evidence: Evidence, layer: int) -> dict[str, str]:
    """Module of a layer → its linear weight in the checkpoint, in the order of the declaration."""
    family = evidence.family
    modules = (weight.module for weight in family.layer if weight.role == LINEAR)
    return {module: f"{family.layers}.{layer}.{module}.weight" for module in modules}


def magnitude(evidence: Evidence, sparsity: Sparsity) -> None:
    """Zero the smallest weights of each tensor (of each group of M inputs, with a pattern)."""
    done = evidence.progress(len(evidence.layers), "sparsifying", "layer")
    for layer in evidence.layers:
        if not evidence.work.has(f"sparse-{layer}"):
            stored = [evidence.checkpoint[n] for n in linear_weights(evidence, layer).values()]
            arrays = {one.name: (one.dtype, smallest_zeroed(one, sparsity)) for one in stored}
            save_sparse(evidence.work, layer, arrays)
        done(1)


def smallest_zeroed(stored: StoredTensor, sparsity: Sparsity) -> np.ndarray:
    """A tensor's bits with the weights of least magnitude zero; exact, ties go in stored order.

    Without its sign bit, a float's bits order as its magnitude does: nothing is converted.
    """
    bits = stored.read_floats("to compare")
    magnitudes = np.left_shift(bits, 1)
    pattern = pattern_of(sparsity)
    if pattern:
        kept, group = pattern
        rows = magnitudes.reshape(-1, group)
        lowest = np.argsort(rows, axis=1, kind="stable")[:, : group - kept]
        np.put_along_axis(bits.reshape(-1, group), lowest, 0, axis=1)
        return bits
    count = removed_of(bits.size, sparsity)
    flat, values = magnitudes.reshape(-1), bits.reshape(-1)
    if count:
        threshold = np.partition(flat, count - 1)[count - 1]
        below = flat < threshold
        ties = np.flatnonzero(flat == threshold)[: count - int(below.sum())]
        values[below] = 0
        values[ties] = 0
    return bits


def save_sparse(work: Work, layer: int, arrays: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Keep a layer's sparse weights: name → (dtype, bits)."""
    facts = {
        name: {"mask": mask_digest(bits), "nonzero": int(np.count_nonzero(np.left_shift(bits, 1)))}
        for name, (_, bits) in arrays.items()
    }
    work.save(f"sparse-{layer}", arrays, facts)


def load_sparse(
    work: Work, layers: list[int]
) -> Iterator[tuple[str, StoredTensor, dict[str, Any]]]:
    """What was made sparse: name, the tensor, and its "mask" digest and "nonzero" count."""
    for layer in layers:
        stored, facts = work.load(f"sparse-{layer}")
        for name, tensor in stored.items():
            yield name, tensor, facts[name]
