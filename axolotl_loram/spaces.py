"""Spaces, units and weights: what declarations of model families are made of.

A weight dimension is a run of spaces; a space is a run of units, each with a block of features, or
what is never pruned. `kept_features` alone turns units into indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Sizes = Mapping[str, int]
Kept = Mapping[str, np.ndarray]
"""Kept units by kind: ascending indices, each in [0, number of units in the base)."""


@dataclass(frozen=True)
class Space:
    """A run of features along a weight dimension: `units` × `block` of them.

    Attributes:
        units: The kind of unit that owns the features; None where nothing is ever pruned.
        block: Names of the sizes that multiply to the features one unit owns, adjacent in memory.
    """

    units: str | None = None
    block: tuple[str, ...] = ()

    def block_size(self, sizes: Sizes) -> int:
        """Features per unit (or in all, where there are no units)."""
        return math.prod(sizes[name] for name in self.block)

    def size(self, sizes: Sizes) -> int:
        """Number of features."""
        return (sizes[self.units] if self.units else 1) * self.block_size(sizes)


Dim = tuple[Space, ...]
"""A weight dimension: spaces laid end to end (several in fused projections, segment by segment)."""


@dataclass(frozen=True)
class Weight:
    """A module that holds `weight`, and `bias` along the first dimension.

    Attributes:
        module: Path below the decoder layer, or below the model for the ones outside layers.
        dims: The dimensions of `weight`; for a linear layer (output, input).
        bias: Whether there is a bias, or the config field that says so.
        tied: Config field which, when true, makes this weight an alias that is not stored.
    """

    module: str
    dims: tuple[Dim, ...]
    bias: bool | str = False
    tied: str | None = None


@dataclass(frozen=True)
class Group:
    """A kind of unit that is kept or removed whole.

    Attributes:
        kind: Name of the kind, and of the size that counts its units in a layer.
        module: Path below the decoder layer under which a plan lists the kept units.
        fields: Config fields that count it → names of the sizes one unit adds to the field.
        noun: What to call one unit in messages.
        rounds_up_if: Name of a size; where it exceeds 1, the number kept is rounded up, not down.
            The reference code keeps n − ceil(n·r) neurons, int(h·(1−r)) heads of plain multi-head
            attention, but kv − int(kv·r) KV groups when query heads share them.
    """

    kind: str
    module: str
    fields: Mapping[str, tuple[str, ...]]
    noun: str
    rounds_up_if: str | None = None

    def keep_count(self, ratio: float, sizes: Sizes) -> int:
        """Units kept of a layer at pruning ratio `ratio`, exact in decimal (0.9 is 9/10)."""
        kept = sizes[self.kind] * (1 - Fraction(str(ratio)))
        rounds_up = self.rounds_up_if is not None and sizes[self.rounds_up_if] > 1
        return math.ceil(kept) if rounds_up else math.floor(kept)


@dataclass(frozen=True)
class Family:
    """One row: how the weights of a model family hang together.

    Attributes:
        model_type: As config.json names it.
        layer: Weights of each decoder layer.
        model: Weights outside the layers.
        groups: Kinds of unit.
        defaults: What transformers' config class takes optional size fields for where config.json
            leaves them out, if not what `sizes_of` does.
        layers: Path of the list of layers.
    """

    model_type: str
    layer: tuple[Weight, ...]
    model: tuple[Weight, ...]
    groups: tuple[Group, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"

    def entry(self, layer: int, group: Group) -> str:
        """Name under which a plan lists the kept units, e.g. ``model.layers.17.mlp``."""
        return f"{self.layers}.{layer}.{group.module}"

    @property
    def sized_fields(self) -> tuple[str, ...]:
        """Config fields that pruning changes."""
        return tuple(field for group in self.groups for field in group.fields)


def kept_features(dim: Dim, sizes: Sizes, kept: Kept) -> np.ndarray | None:
    """Positions along `dim` of the features whose units are kept.

    This is the only place that turns units into indices: pruning gathers along the result,
    recovery scatters along the same.

    Args:
        dim: The dimension, in a layer of the base model.
        sizes: Sizes of that layer in the base model.
        kept: Kept units by kind; a kind that is missing is whole.

    Returns:
        Ascending int64 positions, or None where all features are kept.
    """
    if not any(space.units in kept for space in dim):
        return None
    positions, start = [], 0
    for space in dim:
        size, block = space.size(sizes), space.block_size(sizes)
        if space.units and space.units in kept:
            units = np.asarray(kept[space.units], dtype=np.int64)
            run = (units[:, None] * block + np.arange(block)).reshape(-1)
        else:
            run = np.arange(size)
        positions.append(start + run)
        start += size
    return np.concatenate(positions)


def per_unit(values: np.ndarray, dim: Dim, sizes: Sizes, kind: str) -> np.ndarray:
    """Add up, for each unit, what belongs to its features.

    Args:
        values: (..., features) along the last axis.
        dim: The dimension that axis is.
        sizes: Sizes of the layer.
        kind: The kind of unit.

    Returns:
        (..., units); segments of a fused dimension are added up too.
    """
    total = np.zeros((*values.shape[:-1], sizes[kind]), values.dtype)
    start = 0
    for space in dim:
        stop = start + space.size(sizes)
        if space.units == kind:
            total += values[..., start:stop].reshape((*total.shape, -1)).sum(axis=-1)
        start = stop
    return total
