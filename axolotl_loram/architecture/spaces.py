"""Spaces, units and weights: what declarations of model families are made of.

A weight dimension is a run of spaces; a space is a run of units, each with a block of features, or
what is never pruned. `kept_features` alone turns units into indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Sizes = Mapping[str, int]
Kept = Mapping[str, np.ndarray]
"""Kept units by kind: ascending indices, each in [0, number of units in the base).

Of a kind inside another (neurons of an expert): (kept experts, units), one ascending row for each.
"""


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

LINEAR, EXPERTS, EMBEDDING, HEAD, OTHER = "linear", "experts", "embedding", "head", "other"
"""Roles of weights: `linear` is a linear layer of a decoder layer, which QLoRA holds in 4 bits;
`experts` a parameter that stacks the same weight of all experts."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the running model, and how checkpoints store it.

    It is there in the layers where none of its dimensions is empty: a router where experts are.

    Attributes:
        module: Path below the decoder layer, or below the model for the ones outside layers.
        dims: The dimensions; for a linear layer (output, input), for stacked experts those of the
            experts first.
        bias: Whether there is a bias along the first dimension, or the config field that says so.
        tied: Config field which, when true, makes this weight an alias that is not stored.
        role: What it is to LoRA and quantization.
        parameter: Its name in the module.
        when: Config field without which it is not there.
        each: Of stacked experts that checkpoints store one by one: the names below
            ``module.{expert}`` of the segments of `dims[1]` (one, or one for each space).
        transposed: Whether a linear map is stored (input, output).
    """

    module: str
    dims: tuple[Dim, ...]
    bias: bool | str = False
    tied: str | None = None
    role: str = OTHER
    parameter: str = "weight"
    when: str | None = None
    each: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def kinds(self) -> set[str]:
        """Kinds of unit that own features of it."""
        return {space.units for dim in self.dims for space in dim if space.units}


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
        at_least: Name of the size below which the number kept must not fall; 1 where None.
        pins: Config fields that no longer follow from the others once units are gone → sizes.
        inside: Kind of the units that each have units of this kind.
        optional: Whether it is pruned only on demand (`units:`).
        multiple: The number kept is rounded down to a multiple of this (up, to the first): grouped
            matrix products of experts want rows of whole 16 bytes.
    """

    kind: str
    module: str
    fields: Mapping[str, tuple[str, ...]]
    noun: str
    rounds_up_if: str | None = None
    at_least: str | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    inside: str | None = None
    optional: bool = False
    multiple: int = 1

    def keep_count(self, ratio: float, sizes: Sizes) -> int:
        """Units kept of a layer at pruning ratio `ratio`, exact in decimal (0.9 is 9/10)."""
        kept = sizes[self.kind] * (1 - Fraction(str(ratio)))
        rounds_up = self.rounds_up_if is not None and sizes[self.rounds_up_if] > 1
        count = math.ceil(kept) if rounds_up else math.floor(kept)
        return max(count // self.multiple, min(count, 1)) * self.multiple

    def fewest(self, sizes: Sizes) -> int:
        """Units that a layer must keep."""
        return sizes[self.at_least] if self.at_least else 1


@dataclass(frozen=True)
class Family:
    """One row: how the weights of a model family hang together.

    Attributes:
        groups: Kinds of unit; one inside another comes after it.
        sizes: Sizes of a layer (outside the layers where None) from the config's fields.
        defaults: What transformers' config class takes optional size fields for where config.json
            leaves them out, if not what `sizes` does.
        layers: Path of the list of layers.
        section: Part of the config that describes the layers, in models of several parts.
        whole: Prefixes of parameters that are no part of the declaration and stay as they are.
        stored: Replacements that turn a parameter's name into the one checkpoints have, in order.
        ignored: Expressions in names of stored tensors that transformers passes over.
        tied_by_section: Whether embeddings are tied also where only the section says so.
        refused: Config fields that change the structure in ways not declared → why.
    """

    model_type: str
    layer: tuple[Weight, ...]
    model: tuple[Weight, ...]
    groups: tuple[Group, ...]
    sizes: Callable[[Mapping[str, Any], int | None], Sizes]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    section: str | None = None
    whole: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    auto_class: str = "AutoModelForCausalLM"
    tied_by_section: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    def entry(self, layer: int, group: Group) -> str:
        """Name under which a plan lists the kept units, e.g. ``model.layers.17.mlp``."""
        return f"{self.layers}.{layer}.{group.module}"

    def stored_name(self, name: str) -> str:
        """What checkpoints call a parameter of the running model."""
        for ours, theirs in self.stored:
            name = name.replace(ours, theirs)
        return name

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of unit."""
        return tuple(group.kind for group in self.groups)


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
            units = kept[space.units].astype(np.int64)
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
