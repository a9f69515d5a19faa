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
from functools import cache, cached_property
from typing import Any

from axolotl_loram.architecture.blocks import ALIASES, positive
from axolotl_loram.architecture.families import FAMILIES
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
from axolotl_loram.errors import LoRAMError

Config = Mapping[str, Any]
MOST_LAYERS, MOST_EXPERTS, MOST_FEATURES = 1_000, 1_024, 2**31
"""Bounds beyond any model, so that what a config claims takes bounded time."""
TIED = "tie_word_embeddings"
PER_LAYER = "per_layer_config"
"""Where transformers keeps what differs between layers; `own_fields` reads it."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: its name, what its dimensions mean, and its shape.

    Attributes:
        name: As the running model calls it, or (of `tensors`) as checkpoints do.
        module: The module of the running model that it belongs to.
        layer: Decoder layer, None outside the layers.
        dims: What its dimensions mean.
        sizes: Sizes of its layer.
        role: As `Weight.role`.
        expert: Whose it is, where checkpoints store experts one by one.
        bias: Whether it is a bias.
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


def family_of(config: Config) -> Family:
    """The row that declares `config`'s model family.

    Raises:
        LoRAMError: No row has this `model_type`, or its structure is not the declared one.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise LoRAMError(
            f"unknown architecture: expected model_type to be one of {', '.join(FAMILIES)}, found "
            f"{model_type!r}: `axolotl-loram inspect MODEL --propose` drafts its row, and "
            'CONTRIBUTING.md ("Add a model family") says where to put it'
        )
    family = FAMILIES[model_type]
    fields = {**config, **section_of(config, family)}
    refused = {**family.refused, "num_kv_shared_layers": "layers that share keys and values"}
    for name, reason in refused.items():
        if fields.get(name):
            raise LoRAMError(
                f"expected a {model_type} model without {name}, found {fields[name]!r} in its "
                f"config: {reason}"
            )
    return family


def section_of(config: Config, family: Family) -> Config:
    """The part of a config that describes the decoder layers (all of it in text models).

    Early configs of vision-language models have the fields of the language tower at the top.
    """
    own = config.get(family.section) if family.section else None
    return own if isinstance(own, dict) else config


def with_defaults(config: Config) -> dict[str, Any]:
    """A config as config.json holds it, with the size fields that it leaves out."""
    family = family_of(config)
    own = section_of(config, family)
    known = _canonical(own)
    section = {name: v for name, v in family.defaults.items() if name not in known} | dict(own)
    whole = {**config, family.section: section} if family.section else section
    whole[TIED] = is_tied(config)
    check_config(whole)
    return whole


def is_tied(config: Config) -> bool:
    """Whether the output embedding is the input embedding.

    What is said of the language tower alone counts only where `tied_by_section`.
    """
    family = family_of(config)
    tied = config.get(TIED, family.defaults.get(TIED))
    return bool(tied or (family.tied_by_section and section_of(config, family).get(TIED)))


def check_config(config: Config) -> None:
    """Refuse a config whose sizes cannot be worked out, in bounded time whatever it says.

    Raises:
        LoRAMError: A field is missing, of another type, or beyond any model.
    """
    family = family_of(config)
    own_fields(config)
    try:
        for layer in _places(config):
            found = sizes_of(config, layer)
            if max(found.values()) > MOST_FEATURES or found.get("experts", 0) > MOST_EXPERTS:
                raise LoRAMError(
                    f"expected sizes of at most {MOST_FEATURES} and {MOST_EXPERTS} experts, found "
                    f"{dict(found)} in layer {layer}: check the model's config.json"
                )
    except LoRAMError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise LoRAMError(
            f"expected config fields of a {family.model_type} model, found one of another type "
            f"({error}): check the model's config.json"
        ) from None


def _canonical(fields: Config) -> dict[str, Any]:
    return {ALIASES.get(name, name): value for name, value in fields.items()}


def layer_fields(config: Config, layer: int | None) -> dict[str, Any]:
    """The config as layer `layer` sees it: global fields, then its `per_layer_config`."""
    section = section_of(config, family_of(config))
    given = {} if layer is None else section.get(PER_LAYER) or {}
    own: Config = next((given[key] for key in _keys_of(layer) if key in given), {}) if given else {}
    return {**config, **_canonical(section), **_canonical(own), TIED: is_tied(config)}


def own_fields(config: Config) -> dict[int, Config]:
    """Layer → the fields of its own that `per_layer_config` gives it, however it is numbered.

    Raises:
        LoRAMError: Something is no number of a layer, or two are of one, or their fields are none.
    """
    given = section_of(config, family_of(config)).get(PER_LAYER) or {}
    layers = {key: layer for layer in range(layer_count(config)) for key in _keys_of(layer)}
    pairs: Any = given.items() if isinstance(given, dict) else [(None, given)]
    found: dict[int, Config] = {
        layers[key]: own for key, own in pairs if key in layers and isinstance(own, dict)
    }
    if len(found) != len(pairs):
        raise LoRAMError(
            f"expected {PER_LAYER} to give fields of layers 0…{layer_count(config) - 1}, each "
            f"once, found {str(given)[:80]}: check the model's config.json"
        )
    return found


@cache
def _keys_of(layer: int) -> tuple[int | str, ...]:
    """What stands for a layer in `per_layer_config`: 4, "4", or "04" as transformers saves it.

    It pads the numbers (5.16) to as many digits as the last layer with fields of its own has.
    """
    most = len(str(MOST_LAYERS - 1))
    return (layer, *dict.fromkeys(str(layer).zfill(digits) for digits in range(1, most + 1)))


def sizes_of(config: Config, layer: int | None = None) -> Sizes:
    """Sizes that the spaces of a layer (or of what lies outside the layers) are made of.

    Raises:
        LoRAMError: A field is missing or does not suit the others.
    """
    return family_of(config).sizes(layer_fields(config, layer), layer)


def layer_count(config: Config) -> int:
    """Number of decoder layers."""
    count = positive(layer_fields(config, None), "num_hidden_layers")
    if count > MOST_LAYERS:
        raise LoRAMError(
            f"expected at most {MOST_LAYERS} layers, found {count}: check the model's config.json"
        )
    return count


def parameters(config: Config) -> Iterator[Tensor]:
    """Every declared parameter of the running model, those outside the layers first."""
    for layer in _places(config):
        for placed in _weights(config, layer):
            yield from _tensors_of(*placed)


def tensors(config: Config) -> Iterator[Tensor]:
    """Every declared tensor that a checkpoint of this config stores, under its stored name."""
    for layer in _places(config):
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
    sizes, declared = family.sizes(fields, layer), family.model if layer is None else family.layer
    prefix = "" if layer is None else f"{family.layers}.{layer}."
    return ((w, prefix, layer, fields, sizes) for w in declared if _exists(w, fields, sizes))


def _places(config: Config) -> Iterator[int | None]:
    yield None
    yield from range(layer_count(config))


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
