"""What the rows of `families` are made of: spaces, kinds of unit, sizes, and usual sets of weights.

Configs are plain dicts, as config.json holds them: this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from axolotl_loram.architecture.spaces import (
    EMBEDDING,
    EXPERTS,
    HEAD,
    LINEAR,
    Dim,
    Family,
    Group,
    Space,
    Weight,
)
from axolotl_loram.errors import LoRAMError

Fields = Mapping[str, Any]


def fixed(*block: str) -> Dim:
    """A dimension that is never pruned, as wide as the product of these sizes."""
    return (Space(block=block),)


HIDDEN, VOCABULARY, ONE_HEAD = fixed("hidden"), fixed("vocabulary"), fixed("head_dim")
QUERY: Dim = (Space("kv_groups", ("queries", "head_dim")),)
QUERY_HEADS: Dim = (Space("kv_groups", ("queries",)),)
KEY_VALUE: Dim = (Space("kv_groups", ("head_dim",)),)
KV_HEADS: Dim = (Space("kv_groups"),)
NEURONS: Dim = (Space("neurons"),)
SHARED_NEURONS: Dim = (Space("shared_neurons"),)
ROUTED: Dim = (Space("experts"),)
EXPERT_NEURONS: Dim = (Space("expert_neurons"),)

ALIASES = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}
"""Other names of a config field, which transformers maps to one another."""

MLP_NEURONS = Group("neurons", "mlp", {"intermediate_size": ()}, noun="MLP neuron")
SHARED = Group(
    "shared_neurons",
    "mlp.shared_expert",
    {"shared_expert_intermediate_size": ()},
    noun="neuron of the shared expert",
)
KV_GROUPS = Group(
    "kv_groups",
    "self_attn",
    {"num_attention_heads": ("queries",), "num_key_value_heads": ()},
    noun="KV group",
    rounds_up_if="queries",
    pins={"head_dim": "head_dim"},
)

HEADS = Group(
    "heads",
    "self_attn",
    {"num_attention_heads": (), "num_key_value_heads": ()},
    noun="attention head",
)


def experts(counted_by: str, neurons_field: str) -> tuple[Group, Group]:
    """Whole experts, and neurons within each: one count for a layer, other neurons in each."""
    experts = Group(
        "experts", "mlp.experts", {counted_by: ()}, noun="expert", at_least="fewest_experts"
    )
    neurons = Group(
        "expert_neurons",
        "mlp.expert_neurons",
        {neurons_field: ()},
        noun="neuron of each expert",
        inside="experts",
        optional=True,
        multiple=8,
    )
    return experts, neurons


def positive(fields: Fields, name: str, default: int | None = None) -> int:
    """A size from a config.

    Raises:
        LoRAMError: It is missing, or no positive integer.
    """
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LoRAMError(
            f"expected config field {name} to be a positive integer, found {value!r}: check the "
            "model's config.json"
        )
    return value


def decoder_sizes(fields: Fields, layer: int | None) -> dict[str, int]:
    """Sizes of a decoder with grouped-query attention and one MLP.

    Raises:
        LoRAMError: A field is missing, not a positive integer, or heads do not divide.
    """
    heads, hidden = positive(fields, "num_attention_heads"), positive(fields, "hidden_size")
    kv_groups = positive(fields, "num_key_value_heads", default=heads)
    if heads % kv_groups:
        raise LoRAMError(
            f"expected num_attention_heads to be a multiple of num_key_value_heads, found {heads} "
            f"and {kv_groups}: check the model's config.json"
        )
    return {
        "hidden": hidden,
        "vocabulary": positive(fields, "vocab_size"),
        "neurons": positive(fields, "intermediate_size"),
        "kv_groups": kv_groups,
        "queries": heads // kv_groups,
        "head_dim": positive(fields, "head_dim", default=hidden // heads),
    }


def neox_sizes(fields: Fields, layer: int | None) -> dict[str, int]:
    """Its head width is hidden_size / heads whatever the config says: heads cannot go."""
    hidden = positive(fields, "hidden_size")
    return {
        "hidden": hidden,
        "vocabulary": positive(fields, "vocab_size"),
        "neurons": positive(fields, "intermediate_size"),
        "qkv": 3 * hidden,
    }


def mixtral_sizes(fields: Fields, layer: int | None) -> dict[str, int]:
    """Every layer's MLP is made of experts."""
    sizes = decoder_sizes(fields, layer)
    return sizes | {
        "experts": positive(fields, "num_experts"),
        "fewest_experts": positive(fields, "num_experts_per_tok"),
        "expert_neurons": sizes.pop("neurons"),
        "neurons": 0,
    }


def qwen_moe_sizes(fields: Fields, layer: int | None) -> dict[str, int]:
    """Some layers have experts, others one MLP."""
    sizes, step = decoder_sizes(fields, layer), fields.get("decoder_sparse_step") or 1
    dense = layer in (fields.get("mlp_only_layers") or ()) or ((layer or 0) + 1) % step != 0
    return sizes | {
        "neurons": sizes["neurons"] if dense else 0,
        "experts": 0 if dense else positive(fields, "num_experts"),
        "fewest_experts": positive(fields, "num_experts_per_tok"),
        "expert_neurons": 0 if dense else positive(fields, "moe_intermediate_size"),
        "shared_neurons": 0 if dense else fields.get("shared_expert_intermediate_size") or 0,
        "one": 0 if dense else 1,
    }


def deepseek_sizes(fields: Fields, layer: int | None) -> dict[str, int]:
    """Latent attention; the first layers dense, the others with routed and shared experts."""
    dense = layer is not None and layer < (fields.get("first_k_dense_replace") or 0)
    experts, width = positive(fields, "num_experts"), positive(fields, "moe_intermediate_size")
    nope, rope = positive(fields, "qk_nope_head_dim"), positive(fields, "qk_rope_head_dim")
    value, latent = positive(fields, "v_head_dim"), positive(fields, "kv_lora_rank")
    groups = fields.get("n_group") or 1  # equal ones, among which the router picks first
    return {
        "hidden": positive(fields, "hidden_size"),
        "vocabulary": positive(fields, "vocab_size"),
        "heads": positive(fields, "num_attention_heads"),
        "query_dim": nope + rope,
        "key_value_dim": nope + value,
        "value_dim": value,
        "query_latent": fields.get("q_lora_rank") or 0,
        "latent": latent,
        "latent_and_rope": latent + rope,
        "neurons": positive(fields, "intermediate_size") if dense else 0,
        "experts": 0 if dense else experts,
        "router_groups": groups,
        "fewest_experts": experts if groups > 1 else positive(fields, "num_experts_per_tok"),
        "expert_width": width,
        "shared_width": 0 if dense else width * positive(fields, "n_shared_experts", default=1),
    }


def vit_sizes(fields: Fields, layer: int | None) -> dict[str, int]:
    """Plain multi-head attention and one MLP."""
    heads, hidden = positive(fields, "num_attention_heads"), positive(fields, "hidden_size")
    return {
        "hidden": hidden,
        "neurons": positive(fields, "intermediate_size"),
        "kv_groups": heads,
        "queries": 1,
        "head_dim": positive(fields, "head_dim", default=hidden // heads),
    }


def linear(module: str, outputs: Dim, inputs: Dim, bias: bool | str = False, **more: Any) -> Weight:
    """A linear layer, with a bias where `bias` (or the config field it names) says so."""
    return Weight(module, (outputs, inputs), bias, role=LINEAR, **more)


def norms(*modules: str, bias: bool = False) -> tuple[Weight, ...]:
    """Norms over the hidden features."""
    return tuple(Weight(module, (HIDDEN,), bias) for module in modules)


def attention(bias: bool | str = False, output_bias: bool | str = False) -> tuple[Weight, ...]:
    """Llama's four projections."""
    return (
        linear("self_attn.q_proj", QUERY, HIDDEN, bias),
        linear("self_attn.k_proj", KEY_VALUE, HIDDEN, bias),
        linear("self_attn.v_proj", KEY_VALUE, HIDDEN, bias),
        linear("self_attn.o_proj", HIDDEN, QUERY, output_bias),
    )


def fused_attention() -> tuple[Weight, ...]:
    """Phi-3's: queries, keys and values in one projection, end to end."""
    return (
        linear("self_attn.qkv_proj", QUERY + KEY_VALUE + KEY_VALUE, HIDDEN),
        linear("self_attn.o_proj", HIDDEN, QUERY),
    )


def latent_attention() -> tuple[Weight, ...]:
    """DeepSeek's: queries and key/values go through narrow latents that all heads share."""
    query, latent = (Space("heads", ("query_dim",)),), fixed("latent")
    return (
        linear("self_attn.q_proj", query, HIDDEN, when="!q_lora_rank"),
        linear(
            "self_attn.q_a_proj",
            fixed("query_latent"),
            HIDDEN,
            "attention_bias",
            when="q_lora_rank",
        ),
        Weight("self_attn.q_a_layernorm", (fixed("query_latent"),), when="q_lora_rank"),
        linear("self_attn.q_b_proj", query, fixed("query_latent"), when="q_lora_rank"),
        linear("self_attn.kv_a_proj_with_mqa", fixed("latent_and_rope"), HIDDEN, "attention_bias"),
        Weight("self_attn.kv_a_layernorm", (latent,)),
        linear("self_attn.kv_b_proj", (Space("heads", ("key_value_dim",)),), latent),
        linear("self_attn.o_proj", HIDDEN, (Space("heads", ("value_dim",)),), "attention_bias"),
    )


HEAD_NORMS = (Weight("self_attn.q_norm", (ONE_HEAD,)), Weight("self_attn.k_norm", (ONE_HEAD,)))
"""One norm for every head."""
JOINT_NORMS = (Weight("self_attn.q_norm", (QUERY,)), Weight("self_attn.k_norm", (KEY_VALUE,)))
"""One norm over all heads: what is left is normalized by itself, as an estimate of the whole."""
OWN_NORMS = (
    Weight("self_attn.q_norm", (QUERY_HEADS, ONE_HEAD), when="use_qk_norm"),
    Weight("self_attn.k_norm", (KV_HEADS, ONE_HEAD), when="use_qk_norm"),
)
"""Each head has its own norm weight."""
PRE_NORMS = norms("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
POST_NORMS = norms("post_attention_layernorm", "post_feedforward_layernorm")


def gated_mlp(
    bias: bool | str = False, module: str = "mlp", width: Dim = NEURONS
) -> tuple[Weight, ...]:
    """Llama's MLP."""
    return (
        linear(f"{module}.gate_proj", width, HIDDEN, bias),
        linear(f"{module}.up_proj", width, HIDDEN, bias),
        linear(f"{module}.down_proj", HIDDEN, width, bias),
    )


FUSED_MLP = (
    linear("mlp.gate_up_proj", NEURONS + NEURONS, HIDDEN),
    linear("mlp.down_proj", HIDDEN, NEURONS),
)


def plain_mlp(up: str, down: str, bias: bool | str = True) -> tuple[Weight, ...]:
    """An MLP of two matrices, without a gate."""
    return (
        linear(f"mlp.{up}", NEURONS, HIDDEN, bias),
        linear(f"mlp.{down}", HIDDEN, NEURONS, bias),
    )


def stacked(
    each: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), width: Dim = EXPERT_NEURONS
) -> tuple[Weight, ...]:
    """Router and experts: stacked in the running model, one by one in checkpoints."""
    gate, up, down = (f"{name}.weight" for name in each)
    experts: dict[str, Any] = {"module": "mlp.experts", "role": EXPERTS}
    return (
        Weight("mlp.gate", (ROUTED, HIDDEN)),
        Weight(
            dims=(ROUTED, width + width, HIDDEN),
            parameter="gate_up_proj",
            each=(gate, up),
            **experts,
        ),
        Weight(dims=(ROUTED, HIDDEN, width), parameter="down_proj", each=(down,), **experts),
    )


def gpt_oss_experts() -> tuple[Weight, ...]:
    """Stored as they run: (input, output), gates and ups taking turns, with biases."""
    turns: Dim = (Space("expert_neurons", ("gate_and_up",)),)
    experts: dict[str, Any] = {"module": "mlp.experts", "role": EXPERTS}
    weights = (
        Weight(dims=(ROUTED, HIDDEN, turns), parameter="gate_up_proj", transposed=True, **experts),
        Weight("mlp.experts", (ROUTED, turns), parameter="gate_up_proj_bias"),
        Weight(
            dims=(ROUTED, EXPERT_NEURONS, HIDDEN), parameter="down_proj", transposed=True, **experts
        ),
        Weight("mlp.experts", (ROUTED, HIDDEN), parameter="down_proj_bias"),
    )
    return (Weight("mlp.router", (ROUTED, HIDDEN), bias=True), *weights)


def outside(
    prefix: str = "model.",
    embedding: str = "embed_tokens",
    norm: str = "norm",
    norm_bias: bool = False,
    head_bias: bool = False,
) -> tuple[Weight, ...]:
    """Embedding, last norm and output embedding."""
    return (
        Weight(f"{prefix}{embedding}", (VOCABULARY, HIDDEN), role=EMBEDDING),
        Weight(f"{prefix}{norm}", (HIDDEN,), norm_bias),
        Weight("lm_head", (VOCABULARY, HIDDEN), head_bias, "tie_word_embeddings", HEAD),
    )


def decoder(
    model_type: str,
    attention: tuple[Weight, ...] = attention(),
    mlp: tuple[Weight, ...] = gated_mlp(),
    norms: tuple[Weight, ...] = PRE_NORMS,
    **more: Any,
) -> Family:
    """A decoder with (grouped-query) attention; fields of `Family` not given are Llama's."""
    own = {each.name for each in fields(Family)}
    defaults = {key: more.pop(key) for key in list(more) if key not in own}
    row: dict[str, Any] = {
        "model": outside(),
        "groups": (MLP_NEURONS, KV_GROUPS),
        "sizes": decoder_sizes,
    } | more
    return Family(model_type, layer=(*attention, *mlp, *norms), defaults=defaults, **row)


def vision_language(
    model_type: str, text: Family, whole: tuple[str, ...], stored: tuple[tuple[str, str], ...] = ()
) -> Family:
    """A model whose language tower is `text`; its other parts stay as they are."""
    return replace(
        text,
        model_type=model_type,
        model=tuple(
            replace(weight, module=weight.module.replace("model.", "model.language_model."))
            for weight in text.model
        ),
        layers="model.language_model.layers",
        section="text_config",
        whole=whole,
        stored=stored,
        auto_class="AutoModelForImageTextToText",
    )
