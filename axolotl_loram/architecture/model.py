"""What follows from the declarations: tensors and their shapes, counts, and the pruned config.

`families` declares, for each weight, which space each of its dimensions is in; everything else
follows from that:

* pruning gathers, along each dimension, the features of the kept units;
* recovery scatters LoRA's B along a module's output space and A along its input space;
* parameters are counted by multiplying the sizes of the spaces;
* the pruned model's config is the fields that count units, set to what was kept.

Configs are plain dicts, as config.json holds them: this module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from axolotl_loram.architecture.blocks import ALIASES
from axolotl_loram.architecture.config_json import (
    PER_LAYER,
    Config,
    family_of,
    layer_count,
    layer_fields,
    places,
    section_of,
    sizes_of,
)
from axolotl_loram.architecture.spaces import (
    EMBEDDING,
    EXPERTS,
    LINEAR,
    Dim,
    Family,
    Group,
    Sizes,
    Weight,
)

HEAD_WEIGHT = "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: its name, what its dimensions mean, and its shape.

    Attributes:
        name: As the running model calls it, or (of `tensors`) as checkpoints do.
        module: The module of the running model that it belongs to.
        layer: Decoder layer, None outside the layers.
        role: As `Weight.role`.
        expert: Whose it is, where checkpoints store experts one by one.
        transposed: As `Weight.transposed`.
    """

    name: str
    module: str
    layer: int | None
    dims: tuple[Dim, ...]
    sizes: Sizes
    role: str
    expert: int | None = None
    bias: bool = False
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of features along each dimension."""
        return tuple(sum(space.size(self.sizes) for space in dim) for dim in self.dims)

    @cached_property
    def kinds(self) -> set[str]:
        """Kinds of unit that own features of this tensor."""
        owning = {space.units for dim in self.dims for space in dim if space.units}
        return owning | ({"experts"} if self.expert is not None else set())

    @property
    def linear(self) -> bool:
        """Whether it is the weight of a linear layer in a decoder layer."""
        return self.role == LINEAR and not self.bias

    def of_expert(self, expert: int) -> str:
        """The name that the same tensor of another expert has in checkpoints."""
        return self.name.replace(f".experts.{self.expert}.", f".experts.{expert}.")


def parameters(config: Config) -> Iterator[Tensor]:
    """Every declared parameter of the running model, those outside the layers first."""
    for layer in places(config):
        for placed in _weights(config, layer):
            yield from _tensors_of(*placed)


def tensors(config: Config) -> Iterator[Tensor]:
    """Every declared tensor that a checkpoint of this config stores, under its stored name."""
    for layer in places(config):
        for pieces in layer_pieces(config, layer).values():
            yield from (piece for of_expert in pieces for piece in of_expert)


def layer_pieces(config: Config, layer: int | None) -> dict[str, list[list[Tensor]]]:
    """What checkpoints store for each parameter of a layer (or of what lies outside the layers).

    Returns:
        Name in the running model → for each expert (one, if it has none of its own), the tensors
        that make it up when they are laid end to end along their first dimension.
    """
    family, found = family_of(config), {}
    for placed in _weights(config, layer):
        for tensor in _tensors_of(*placed):
            pieces = _pieces(placed[0], tensor)
            found[tensor.name] = _as_stored(pieces, family) if family.stored else pieces
    return found


def stack_shape(pieces: list[list[Tensor]]) -> tuple[int, ...]:
    """The shape of the parameter that pieces of experts, as `layer_pieces` gives them, make up."""
    rows = sum(piece.shape[0] for piece in pieces[0])
    return (len(pieces), rows, *pieces[0][0].shape[1:])


def _as_stored(pieces: list[list[Tensor]], family: Family) -> list[list[Tensor]]:
    return [
        [replace(piece, name=family.stored_name(piece.name)) for piece in of_expert]
        for of_expert in pieces
    ]


def _pieces(weight: Weight, tensor: Tensor) -> list[list[Tensor]]:
    if not weight.each or tensor.bias:
        return [[tensor]]
    rows = [(space,) for space in tensor.dims[1]] if len(weight.each) > 1 else [tensor.dims[1]]
    return [
        [
            replace(
                tensor,
                name=f"{tensor.module}.{expert}.{name}",
                dims=(row, *tensor.dims[2:]),
                expert=expert,
            )
            for name, row in zip(weight.each, rows, strict=True)
        ]
        for expert in range(tensor.shape[0])
    ]


Placed = tuple[Weight, str, int | None, Config, Sizes]


def _weights(config: Config, layer: int | None) -> Iterator[Placed]:
    """The declared weights that a layer (or what lies outside the layers) has, and their place."""
    family, fields = family_of(config), layer_fields(config, layer)
    sizes, declared = sizes_of(config, layer), family.model if layer is None else family.layer
    prefix = "" if layer is None else f"{family.layers}.{layer}."
    return ((w, prefix, layer, fields, sizes) for w in declared if _exists(w, fields, sizes))


def _exists(weight: Weight, fields: Config, sizes: Sizes) -> bool:
    if weight.tied and fields.get(weight.tied):
        return False
    if weight.when and bool(fields.get(weight.when.lstrip("!"))) == weight.when.startswith("!"):
        return False
    return all(sum(space.size(sizes) for space in dim) > 0 for dim in weight.dims)


def _tensors_of(
    weight: Weight, prefix: str, layer: int | None, fields: Config, sizes: Sizes
) -> Iterator[Tensor]:
    module = prefix + weight.module
    name = f"{module}.{weight.parameter}"
    role, transposed = weight.role, weight.transposed
    yield Tensor(name, module, layer, weight.dims, sizes, role, transposed=transposed)
    if fields.get(weight.bias) if isinstance(weight.bias, str) else weight.bias:
        dims = weight.dims[:1]
        yield Tensor(f"{module}.bias", module, layer, dims, sizes, role, bias=True)


def parameter_count(config: Config) -> int:
    """Parameters of a model with this config; a tied lm_head is not counted twice."""
    return sum(math.prod(tensor.shape) for tensor in tensors(config))


def embedding_module(config: Config) -> str | None:
    """The module of the input embedding, if one is declared."""
    found = (weight.module for weight in family_of(config).model if weight.role == EMBEDDING)
    return next(found, None)


def layer_weights(config: Config, layer: int) -> tuple[Weight, ...]:
    """The weights that a decoder layer has."""
    return tuple(placed[0] for placed in _weights(config, layer))


def layer_groups(config: Config, layer: int) -> tuple[Group, ...]:
    """The kinds of unit that a decoder layer has."""
    sizes = sizes_of(config, layer)
    return tuple(group for group in family_of(config).groups if sizes.get(group.kind, 0) > 0)


def readers(config: Config, layer: int) -> tuple[Weight, ...]:
    """A layer's linear weights whose inputs are units': o_proj and down_proj, in running order.

    What a removed unit did, it did through them: importance is measured at their inputs, and they
    are what a refit changes.
    """
    return tuple(
        weight
        for weight in layer_weights(config, layer)
        if weight.role == LINEAR and any(space.units for space in weight.dims[1])
    )


def has_experts(config: Config) -> bool:
    """Whether some layer is a mixture of experts."""
    return any(weight.role == EXPERTS for weight in family_of(config).layer)


def config_changes(config: Config, counts: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """What the pruned model's config says differently from the base's, of its own section.

    Args:
        config: The base model's config.
        counts: Layer → kind → units kept. Layers and kinds that are missing are whole.

    Returns:
        The fields of a plain homogeneous config if all layers come out equal and transformers
        accepts that (it wants hidden_size divisible by num_attention_heads), else a
        `per_layer_config`. Fields that no longer follow from the others, as `head_dim` from the
        heads, are explicit.
    """
    family, own = family_of(config), {}
    if not counts:
        return {}
    for layer, kept in sorted(counts.items()):
        sizes = sizes_of(config, layer)
        own[layer] = {
            field: kept[group.kind] * math.prod(sizes[name] for name in factors)
            for group in family.groups
            if group.kind in kept
            for field, factors in group.fields.items()
        }
    gone = {kind for kept in counts.values() for kind in kept}
    pinned = [pin for group in family.groups if group.kind in gone for pin in group.pins.items()]
    explicit = {field: sizes_of(config)[size] for field, size in pinned}
    first, fields = own.get(0, {}), layer_fields(config, None)
    uniform = len(own) == layer_count(config) and all(fields == first for fields in own.values())
    heads = first.get("num_attention_heads", fields["num_attention_heads"])
    if uniform and fields["hidden_size"] % heads == 0:
        return explicit | first
    return explicit | {PER_LAYER: {str(layer): fields for layer, fields in own.items()}}


def changed(config: Config, changes: Config) -> dict[str, Any]:
    """A config with changes to its own section, under the names that it uses for the fields."""
    family = family_of(config)
    section = dict(section_of(config, family))
    names = {ALIASES.get(name, name): name for name in section}
    section |= {names.get(ALIASES.get(name, name), name): new for name, new in changes.items()}
    if family.section is None:
        return section
    if family.section not in config:  # an early config: its own section from now on
        section.pop("vision_config", None)
        section.pop("model_type", None)
    return {**config, family.section: section}
