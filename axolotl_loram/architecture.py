"""Which weight dimensions move together, declared as data: one row per model family.

A decoder's features live in *spaces*. The hidden space is as wide in the pruned model as in the
base. Others are made of *units* that LoRAM keeps or removes whole: an MLP neuron, or a KV group
(one key/value head with the query heads that attend to it). A row says, for each weight, which
space each of its dimensions is in; everything else follows from that:

* pruning gathers, along each dimension, the features of the kept units;
* recovery scatters LoRA's B along a module's output space and A along its input space;
* parameters are counted by multiplying the sizes of the spaces;
* the pruned model's config is the fields that count units, set to what was kept.

Configs are plain dicts, as config.json holds them: this module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.spaces import Dim, Family, Group, Sizes, Space, Weight

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a model: its name, what its dimensions mean, and its shape."""

    name: str
    module: str
    layer: int | None
    dims: tuple[Dim, ...]
    sizes: Sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of features along each dimension."""
        return tuple(sum(space.size(self.sizes) for space in dim) for dim in self.dims)

    @property
    def kinds(self) -> set[str]:
        """Kinds of unit that own features of this tensor."""
        return {space.units for dim in self.dims for space in dim if space.units}


HIDDEN: Dim = (Space(block=("hidden",)),)
VOCABULARY: Dim = (Space(block=("vocabulary",)),)
HEAD: Dim = (Space(block=("head_dim",)),)
QUERY: Dim = (Space("kv_groups", ("queries", "head_dim")),)
KEY_VALUE: Dim = (Space("kv_groups", ("head_dim",)),)
NEURONS: Dim = (Space("neurons"),)

MLP_NEURONS = Group("neurons", "mlp", {"intermediate_size": ()}, noun="MLP neuron")
KV_GROUPS = Group(
    "kv_groups",
    "self_attn",
    {"num_attention_heads": ("queries",), "num_key_value_heads": ()},
    noun="KV group",
    rounds_up_if="queries",
)


def _llama_like(
    model_type: str,
    qkv_bias: bool | str = False,
    output_bias: bool | str = False,
    mlp_bias: bool | str = False,
    head_norms: bool = False,
    **defaults: Any,
) -> Family:
    """A pre-norm decoder with gated MLP and (grouped-query) attention."""
    norms = ("self_attn.q_norm", "self_attn.k_norm") if head_norms else ()
    return Family(
        model_type,
        layer=(
            Weight("self_attn.q_proj", (QUERY, HIDDEN), qkv_bias),
            Weight("self_attn.k_proj", (KEY_VALUE, HIDDEN), qkv_bias),
            Weight("self_attn.v_proj", (KEY_VALUE, HIDDEN), qkv_bias),
            Weight("self_attn.o_proj", (HIDDEN, QUERY), output_bias),
            Weight("mlp.gate_proj", (NEURONS, HIDDEN), mlp_bias),
            Weight("mlp.up_proj", (NEURONS, HIDDEN), mlp_bias),
            Weight("mlp.down_proj", (HIDDEN, NEURONS), mlp_bias),
            Weight("input_layernorm", (HIDDEN,)),
            Weight("post_attention_layernorm", (HIDDEN,)),
            *(Weight(norm, (HEAD,)) for norm in norms),
        ),
        model=(
            Weight("model.embed_tokens", (VOCABULARY, HIDDEN)),
            Weight("model.norm", (HIDDEN,)),
            Weight("lm_head", (VOCABULARY, HIDDEN), tied="tie_word_embeddings"),
        ),
        groups=(MLP_NEURONS, KV_GROUPS),
        defaults=defaults,
    )


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _llama_like("llama", "attention_bias", "attention_bias", "mlp_bias"),
        _llama_like("mistral", num_key_value_heads=8),
        _llama_like("qwen2", qkv_bias=True, num_key_value_heads=32),
        _llama_like(
            "qwen3",
            "attention_bias",
            "attention_bias",
            head_norms=True,
            num_key_value_heads=32,
            head_dim=128,
        ),
    )
}


def family_of(config: Config) -> Family:
    """The row that declares `config`'s model family.

    Raises:
        LoRAMError: No row has this `model_type`.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise LoRAMError(
            f"unknown architecture: expected model_type to be one of {', '.join(FAMILIES)}, found "
            f"{model_type!r}; to add it, write one row in axolotl_loram/architecture.py as "
            'CONTRIBUTING.md ("Add a model family") shows'
        )
    return FAMILIES[model_type]


def layer_fields(config: Config, layer: int) -> dict[str, Any]:
    """The config as layer `layer` sees it: global fields, then its `per_layer_config`."""
    overrides = config.get("per_layer_config") or {}
    own: Config = next((fields for key, fields in overrides.items() if int(key) == layer), {})
    return {**config, **own}


def sizes_of(fields: Config) -> dict[str, int]:
    """Sizes that spaces are made of, read from a (layer's) config.

    Raises:
        LoRAMError: A field is missing, not a positive integer, or heads do not divide.
    """
    heads = _positive(fields, "num_attention_heads")
    kv_groups = _positive(fields, "num_key_value_heads", default=heads)
    hidden = _positive(fields, "hidden_size")
    if heads % kv_groups:
        raise LoRAMError(
            f"expected num_attention_heads to be a multiple of num_key_value_heads, found {heads} "
            f"and {kv_groups}: check the model's config.json"
        )
    return {
        "hidden": hidden,
        "vocabulary": _positive(fields, "vocab_size"),
        "neurons": _positive(fields, "intermediate_size"),
        "kv_groups": kv_groups,
        "queries": heads // kv_groups,
        "head_dim": _positive(fields, "head_dim", default=hidden // heads),
    }


def _positive(fields: Config, name: str, default: int | None = None) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LoRAMError(
            f"expected config field {name} to be a positive integer, found {value!r}: check the "
            "model's config.json"
        )
    return value


def layer_count(config: Config) -> int:
    """Number of decoder layers."""
    return _positive(config, "num_hidden_layers")


def tensors(config: Config) -> Iterator[Tensor]:
    """Every tensor that a checkpoint of this config stores, those outside the layers first."""
    family = family_of(config)
    yield from _tensors_of(family.model, config, sizes_of(config), prefix="", layer=None)
    for layer in range(layer_count(config)):
        fields = layer_fields(config, layer)
        prefix = f"{family.layers}.{layer}."
        yield from _tensors_of(family.layer, fields, sizes_of(fields), prefix, layer)


def _tensors_of(
    weights: tuple[Weight, ...], fields: Config, sizes: Sizes, prefix: str, layer: int | None
) -> Iterator[Tensor]:
    for weight in weights:
        if weight.tied and fields.get(weight.tied):
            continue
        module = prefix + weight.module
        yield Tensor(f"{module}.weight", module, layer, weight.dims, sizes)
        if fields.get(weight.bias) if isinstance(weight.bias, str) else weight.bias:
            yield Tensor(f"{module}.bias", module, layer, weight.dims[:1], sizes)


def parameter_count(config: Config) -> int:
    """Parameters of a model with this config; a tied lm_head is not counted twice."""
    return sum(math.prod(tensor.shape) for tensor in tensors(config))


def readers(family: Family) -> tuple[Weight, ...]:
    """A layer's linear weights whose inputs are units': o_proj and down_proj, in running order.

    What a removed unit did, it did through them: importance is measured at their inputs, and they
    are what a refit changes.
    """
    return tuple(
        weight
        for weight in family.layer
        if len(weight.dims) == 2 and any(space.units for space in weight.dims[1])
    )


def config_changes(config: Config, counts: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """What the pruned model's config says differently from the base's.

    Args:
        config: The base model's config.
        counts: Layer → kind → units kept. Layers and kinds that are missing are whole.

    Returns:
        The fields of a plain homogeneous config if all layers come out equal and transformers
        accepts that (it wants hidden_size divisible by num_attention_heads), else a
        `per_layer_config`. `head_dim` is always explicit: it no longer follows from the heads.
    """
    family, own = family_of(config), {}
    if not counts:
        return {}
    for layer, kept in sorted(counts.items()):
        sizes = sizes_of(layer_fields(config, layer))
        own[layer] = {
            field: kept[group.kind] * math.prod(sizes[name] for name in factors)
            for group in family.groups
            if group.kind in kept
            for field, factors in group.fields.items()
        }
    head_dim = {"head_dim": sizes_of(config)["head_dim"]}
    first = own.get(0, {})
    uniform = len(own) == layer_count(config) and all(fields == first for fields in own.values())
    heads = first.get("num_attention_heads", config["num_attention_heads"])
    if uniform and config["hidden_size"] % heads == 0:
        return head_dim | first
    return head_dim | {"per_layer_config": {str(layer): fields for layer, fields in own.items()}}
