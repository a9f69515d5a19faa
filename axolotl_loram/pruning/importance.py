"""How much each unit of a layer matters: the higher the score, the later it is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from axolotl_loram.architecture.model import Tensor, tensors
from axolotl_loram.architecture.spaces import Dim, Sizes, per_unit
from axolotl_loram.errors import not_finite
from axolotl_loram.files.tensors import StoredTensor, ahead, as_floats
from axolotl_loram.pruning.evidence import Evidence


def random(evidence: Evidence) -> None:
    """Any unit is as good as another."""
    for layer in evidence.layers:
        shapes, seed = evidence.shapes(layer), evidence.seed
        scores = {kind: random_scores(shape, seed, layer, kind) for kind, shape in shapes.items()}
        evidence.save(layer, scores)


def magnitude(evidence: Evidence) -> None:
    """Σ w² over all weights that go with the unit (group L2, LLM-Pruner's `l2`)."""
    members: dict[int | None, list[tuple[Tensor, StoredTensor]]] = {}
    for tensor in tensors(evidence.config):
        members.setdefault(tensor.layer, []).append((tensor, evidence.checkpoint[tensor.name]))
    jobs = {
        layer: {
            kind: [pair for pair in members[layer] if kind in pair[0].kinds]
            for kind in evidence.shapes(layer)
        }
        for layer in evidence.layers
    }
    sizes = {
        layer: sum(stored.nbytes for pairs in job.values() for _, stored in pairs)
        for layer, job in jobs.items()
    }
    done = evidence.progress(sum(sizes.values()), "scoring", "B")
    for layer, job in jobs.items():
        if evidence.has(layer):
            done(sizes[layer])
            continue
        shapes = evidence.shapes(layer)
        scores = {kind: magnitude_scores(job[kind], kind, done, shapes[kind]) for kind in job}
        evidence.save(layer, scores)


def random_scores(shape: Sequence[int], seed: int, layer: int, kind: str) -> np.ndarray:
    """Scores that depend on seed, layer and kind alone, whatever the order of calls."""
    return np.random.default_rng([seed, layer, *kind.encode()]).random(shape)


def magnitude_scores(
    members: list[tuple[Tensor, StoredTensor]],
    kind: str,
    done: Callable[[int], object] | None = None,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Σ w² over everything that goes when a unit goes (group L2, as in LLM-Pruner's `l2`).

    Args:
        members: The layer's tensors, and where their values are; read block by block.
        kind: The kind of unit.
        done: Called with the bytes read since the last call.
        shape: Of the scores: (units,) by default, or (experts, units) of units inside experts.

    Returns:
        Scores of that shape, float64.

    Raises:
        LoRAMError: A tensor holds no plain floats, or a NaN or an infinity.
    """
    total = np.zeros(shape or members[0][0].sizes[kind])
    for tensor, stored in members:
        if tensor.expert is not None:
            total[tensor.expert] += _energy(stored, tensor.dims, tensor.sizes, kind, done)
        elif total.ndim == 2:  # experts stacked in one tensor
            for expert, own in enumerate(total):
                own += _energy(stored.part(expert), tensor.dims[1:], tensor.sizes, kind, done)
        else:
            total += _energy(stored, tensor.dims, tensor.sizes, kind, done)
    return total


def _energy(
    stored: StoredTensor,
    dims: tuple[Dim, ...],
    sizes: Sizes,
    kind: str,
    done: Callable[[int], object] | None,
) -> np.ndarray:
    """Σ w² by unit, (units,); of all of a tensor that no single unit of the kind is in, ()."""
    axes = [a for a, dim in enumerate(dims) if any(space.units == kind for space in dim)]
    if not axes:
        return _energies(stored, [0], done)[0].sum()
    energies = _energies(stored, axes, done)
    found = [per_unit(e, dims[axis], sizes, kind) for axis, e in zip(axes, energies, strict=True)]
    return np.sum(found, axis=0)


def _energies(
    stored: StoredTensor, axes: list[int], done: Callable[[int], object] | None
) -> list[np.ndarray]:
    """Along each of `axes`, the sum of squares over all others, in float64."""
    stored.check_floats("to score")
    energies, first = [np.zeros(stored.shape[axis]) for axis in axes], 0
    for bits in ahead(stored.blocks()):
        values = as_floats(bits, stored.dtype)
        for axis, energy in zip(axes, energies, strict=True):
            part = energy[first : first + len(bits)] if axis == 0 else energy
            part += _energy_along(values, axis, stored)
        first += len(bits)
        if done:
            done(bits.nbytes)
    return energies


def _energy_along(values: np.ndarray, axis: int, stored: StoredTensor) -> np.ndarray:
    """Sum of squares over all axes but one, without a copy of the squares."""
    axes = list(range(values.ndim))
    with np.errstate(over="ignore", invalid="ignore"):
        energy = np.einsum(values, axes, values, axes, [axis])
        if not np.isfinite(energy).all():  # a weight is not finite, or the square of one is not
            if not np.isfinite(values).all():
                raise not_finite(stored.name)
            wide: np.ndarray = values.astype(np.float64)
            energy = np.einsum(wide, axes, wide, axes, [axis])
    return energy


def select(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores along the last axis, ascending int32.

    Ties go to the lower index.
    """
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    return np.sort(best, axis=-1).astype(np.int32)


def choose(
    scores: Mapping[int, np.ndarray],
    counts: Mapping[int, int],
    compete: bool,
    comparable: bool,
    fewest: Mapping[int, int] | None = None,
) -> dict[int, np.ndarray]:
    """Which units of one kind to keep.

    Args:
        scores: Layer → scores (units,).
        counts: Layer → how many to keep.
        compete: Whether all layers' units compete for the sum of the counts; units of a kind weigh
            the same in every layer, so the budget is the same. Units inside experts do not compete:
            each expert of a layer has equally many.
        comparable: Whether scores of different layers are on one scale; they are standardized
            within their layer before they compete otherwise.
        fewest: Layer → how many it keeps whatever the others score, by default one: of experts, as
            many as a token goes through.

    Returns:
        Layer → kept units, ascending int32.
    """
    if not compete or not counts or any(own.ndim == 2 for own in scores.values()):
        return {layer: select(scores[layer], counts[layer]) for layer in counts}
    ranked = []
    for layer in counts:
        own = scores[layer] if comparable else standardized(scores[layer])
        own = own.copy()
        own[select(own, fewest[layer] if fewest else 1)] = np.inf
        ranked.append(own)
    best = select(np.concatenate(ranked), sum(counts.values()))
    starts = np.cumsum([0, *(len(own) for own in ranked)])
    layers = np.searchsorted(starts, best, side="right") - 1
    return {
        layer: (best[layers == place] - starts[place]).astype(np.int32)
        for place, layer in enumerate(counts)
    }


def standardized(scores: np.ndarray) -> np.ndarray:
    """Scores of mean 0 and standard deviation 1 (all 0 where they are all the same)."""
    spread = scores.std()
    return (scores - scores.mean()) / (spread if spread > 0 else 1.0)
