"""How much each unit of a layer matters: the higher the score, the later it is removed."""

from __future__ import annotations

import numpy as np

from axolotl_loram.architecture import Sizes, Tensor
from axolotl_loram.checkpoint import StoredTensor
from axolotl_loram.errors import LoRAMError


def random_scores(units: int, seed: int, layer: int, kind: str) -> np.ndarray:
    """Scores (units,) that depend on seed, layer and kind alone, whatever the order of calls."""
    return np.random.default_rng([seed, layer, *kind.encode()]).random(units)


def magnitude_scores(tensors: list[tuple[Tensor, np.ndarray]], kind: str) -> np.ndarray:
    """Σ w² over everything that goes when a unit goes (group L2, as in LLM-Pruner's `l2`).

    Args:
        tensors: The layer's tensors, each with its values.
        kind: The kind of unit.

    Returns:
        Scores (units,), float64.
    """
    total = np.zeros(tensors[0][0].sizes[kind])
    for tensor, values in tensors:
        for axis, dim in enumerate(tensor.dims):
            if any(space.units == kind for space in dim):
                energy = _energy_along(values, axis)
                total += _per_unit(energy, tensor.sizes, dim, kind)
    return total


def _energy_along(values: np.ndarray, axis: int) -> np.ndarray:
    """Sum of squares over all axes but one, without a copy of the squares."""
    axes = list(range(values.ndim))
    return np.einsum(values, axes, values, axes, [axis], dtype=np.float32).astype(np.float64)


def _per_unit(energy: np.ndarray, sizes: Sizes, dim: tuple, kind: str) -> np.ndarray:
    """Fold a vector along a dimension into one number per unit, segments added up."""
    total, start = np.zeros(sizes[kind]), 0
    for space in dim:
        size = space.size(sizes)
        if space.units == kind:
            total += energy[start : start + size].reshape(sizes[kind], -1).sum(axis=1)
        start += size
    return total


def as_float(stored: StoredTensor) -> np.ndarray:
    """A stored tensor's values as float32.

    Raises:
        LoRAMError: It holds no plain floats, or holds a NaN or an infinity.
    """
    bits = stored.read()
    if stored.dtype == "BF16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    elif stored.dtype in ("F16", "F32", "F64"):
        values = bits.view(f"f{bits.itemsize}").astype(np.float32, copy=False)
    else:
        raise LoRAMError(
            f"expected weights of F16, BF16, F32 or F64 to score, found {stored.name} of "
            f"{stored.dtype}: prune the unquantized model, or use --method random"
        )
    if not np.isfinite(values).all():
        raise LoRAMError(
            f"expected finite weights, found NaN or infinity in {stored.name}: the base model is "
            "damaged"
        )
    return values


def select(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, ascending int32; ties go to the lower index."""
    best = np.argsort(-scores, kind="stable")[:count]
    return np.sort(best).astype(np.int32)
