"""The rows: which weight dimensions of each model family move together, declared as data.

A decoder's features live in *spaces*. The hidden space is as wide in the pruned model as in the
base. Others are made of *units* that LoRAM keeps or removes whole: an MLP neuron, a KV group (one
key/value head with the query heads that attend to it), an expert (with its row of the router), a
neuron of an expert. A row says, for each weight, which space each of its dimensions is in.

`axolotl-loram inspect MODEL --propose` drafts the row of a model that has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from axolotl_loram.architecture.blocks import (
    FOUR_NORMS,
    FUSED_MLP,
    HEAD_NORMS,
    HEADS,
    HIDDEN,
    JOINT_NORMS,
    KEY_VALUE,
    KV_GROUPS,
    MLP_NEURONS,
    OWN_NORMS,
    POST_NORMS,
    PRE_NORMS,
    QUERY,
    QUERY_HEADS,
    ROUTED,
    SHARED,
    SHARED_NEURONS,
    attention,
    decoder,
    deepseek_sizes,
    experts,
    fixed,
    fused_attention,
    gated_mlp,
    gpt_oss_experts,
    latent_attention,
    linear,
    mixtral_sizes,
    neox_sizes,
    norms,
    outside,
    plain_mlp,
    qwen_moe_sizes,
    stacked,
    vision_language,
    vit_sizes,
)
from axolotl_loram.architecture.spaces import Family, Weight

ATTENTION_BIAS = attention("attention_bias", "attention_bias")
QWEN_ATTENTION = (*attention(True), *HEAD_NORMS)
GEMMA_3 = decoder(
    "gemma3_text",
    (*ATTENTION_BIAS, *HEAD_NORMS),
    norms=FOUR_NORMS,
    vocab_size=262208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
)
QWEN_2 = decoder("qwen2", attention(True), num_key_value_heads=32)
QWEN_3 = decoder("qwen3", (*ATTENTION_BIAS, *HEAD_NORMS), num_key_value_heads=32, head_dim=128)
LAYER_NORMS = norms("input_layernorm", "post_attention_layernorm", bias=True)

ROWS = (
    decoder("llama", ATTENTION_BIAS, gated_mlp("mlp_bias")),
    decoder("mistral", num_key_value_heads=8),
    QWEN_2,
    QWEN_3,
    decoder(
        "gemma", ATTENTION_BIAS, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True
    ),
    decoder(
        "gemma2",
        ATTENTION_BIAS,
        norms=FOUR_NORMS,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
    ),
    GEMMA_3,
    decoder("phi3", fused_attention(), FUSED_MLP),
    decoder("olmo2", (*ATTENTION_BIAS, *JOINT_NORMS), norms=POST_NORMS),
    decoder("olmo3", (*ATTENTION_BIAS, *JOINT_NORMS), norms=POST_NORMS),
    decoder("granite", ATTENTION_BIAS, gated_mlp("mlp_bias")),
    decoder(
        "smollm3",
        ATTENTION_BIAS,
        gated_mlp("mlp_bias"),
        num_key_value_heads=4,
        tie_word_embeddings=True,
    ),
    decoder(
        "seed_oss",
        attention("attention_bias", "attention_out_bias"),
        gated_mlp("mlp_bias"),
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
    ),
    decoder(
        "cohere",
        (*ATTENTION_BIAS, *OWN_NORMS),
        norms=norms("input_layernorm"),
        tie_word_embeddings=True,
    ),
    decoder("cohere2", ATTENTION_BIAS, norms=norms("input_layernorm"), tie_word_embeddings=True),
    decoder(
        "glm",
        attention("attention_bias"),
        FUSED_MLP,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
    ),
    decoder(
        "glm4",
        attention("attention_bias"),
        FUSED_MLP,
        norms=(*PRE_NORMS, *norms("post_self_attn_layernorm", "post_mlp_layernorm")),
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
    ),
    decoder(
        "starcoder2",
        attention("use_bias", "use_bias"),
        plain_mlp("c_fc", "c_proj", "use_bias"),
        LAYER_NORMS,
        model=outside(norm_bias=True),
        num_key_value_heads=2,
        use_bias=True,
        tie_word_embeddings=True,
    ),
    decoder(
        "phi",
        (*attention(True)[:3], linear("self_attn.dense", HIDDEN, QUERY, True)),
        plain_mlp("fc1", "fc2"),
        norms("input_layernorm", bias=True),
        model=outside(norm="final_layernorm", norm_bias=True, head_bias=True),
        refused={
            "qk_layernorm": "its head norms are as wide as hidden_size / heads",
            "tie_word_embeddings": "its lm_head has a bias of its own",
        },
    ),
    decoder(
        "gpt_neox",
        (
            linear("attention.query_key_value", fixed("qkv"), HIDDEN, "attention_bias"),
            linear("attention.dense", HIDDEN, HIDDEN, "attention_bias"),
        ),
        plain_mlp("dense_h_to_4h", "dense_4h_to_h"),
        LAYER_NORMS,
        model=outside("gpt_neox.", "embed_in", "final_layer_norm", norm_bias=True),
        groups=(MLP_NEURONS,),
        sizes=neox_sizes,
        layers="gpt_neox.layers",
        stored=(("lm_head.", "embed_out."),),
        ignored=(r"attention.bias", r"attention.masked_bias"),
        attention_bias=True,
    ),
    decoder(
        "mixtral",
        mlp=stacked(("w1", "w3", "w2")),
        sizes=mixtral_sizes,
        groups=(KV_GROUPS, *experts("num_local_experts", "intermediate_size")),
        stored=((".mlp.", ".block_sparse_moe."),),
        num_key_value_heads=8,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    decoder(
        "olmoe",
        (*ATTENTION_BIAS, *JOINT_NORMS),
        stacked(),
        sizes=mixtral_sizes,
        groups=experts("num_experts", "intermediate_size"),  # heads are hidden_size / heads wide
        num_experts=64,
        num_experts_per_tok=8,
    ),
    decoder(
        "qwen2_moe",
        attention("qkv_bias"),
        (
            *gated_mlp(),
            *stacked(),
            *gated_mlp(module="mlp.shared_expert", width=SHARED_NEURONS),
            linear("mlp.shared_expert_gate", fixed("one"), HIDDEN),
        ),
        sizes=qwen_moe_sizes,
        groups=(MLP_NEURONS, KV_GROUPS, *experts("num_experts", "moe_intermediate_size"), SHARED),
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        qkv_bias=True,
    ),
    decoder(
        "qwen3_moe",
        (*ATTENTION_BIAS, *HEAD_NORMS),
        (*gated_mlp(), *stacked()),
        sizes=qwen_moe_sizes,
        groups=(MLP_NEURONS, KV_GROUPS, *experts("num_experts", "moe_intermediate_size")),
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    decoder(
        "gpt_oss",
        (*ATTENTION_BIAS, Weight("self_attn", (QUERY_HEADS,), parameter="sinks")),
        gpt_oss_experts(),
        sizes=lambda fields, layer: mixtral_sizes(fields, layer) | {"gate_and_up": 2},
        groups=(KV_GROUPS, *experts("num_local_experts", "intermediate_size")),
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        attention_bias=True,
        num_experts=128,
        num_experts_per_tok=4,
    ),
    decoder(
        "deepseek_v3",
        latent_attention(),
        (
            *gated_mlp(),
            *stacked(width=fixed("expert_width")),
            Weight("mlp.gate", (ROUTED,), parameter="e_score_correction_bias"),
            *gated_mlp(module="mlp.shared_experts", width=fixed("shared_width")),
        ),
        sizes=deepseek_sizes,
        groups=(MLP_NEURONS, HEADS, experts("n_routed_experts", "moe_intermediate_size")[0]),
        ignored=(r"model\.layers\.61.*",),  # predicts a further token
        num_key_value_heads=128,
        num_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        first_k_dense_replace=3,
        moe_intermediate_size=2048,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    vision_language(
        "gemma3",
        GEMMA_3,
        whole=("model.vision_tower.", "model.multi_modal_projector."),
        stored=(
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", "language_model.lm_head."),
        ),
    ),
    vision_language("qwen3_vl", QWEN_3, whole=("model.visual.",)),
    vision_language(
        "qwen2_5_vl",
        # Its heads are hidden_size / heads wide whatever the config says.
        replace(
            QWEN_2, groups=(MLP_NEURONS,), defaults={"num_key_value_heads": 8}, tied_by_section=True
        ),
        whole=("model.visual.",),
        stored=(("model.language_model.", "model."), ("model.visual.", "visual.")),
    ),
    decoder(
        "vit",
        (
            linear("attention.q_proj", QUERY, HIDDEN, "qkv_bias"),
            linear("attention.k_proj", KEY_VALUE, HIDDEN, "qkv_bias"),
            linear("attention.v_proj", KEY_VALUE, HIDDEN, "qkv_bias"),
            linear("attention.o_proj", HIDDEN, QUERY, True),
        ),
        plain_mlp("fc1", "fc2"),
        norms("layernorm_before", "layernorm_after", bias=True),
        model=(),
        sizes=vit_sizes,
        groups=(
            MLP_NEURONS,
            replace(KV_GROUPS, module="attention", fields={"num_attention_heads": ()}),
        ),
        layers="vit.layers",
        whole=("vit.embeddings.", "vit.layernorm.", "classifier."),
        stored=(
            ("vit.layers.", "vit.encoder.layer."),
            (".attention.q_proj.", ".attention.attention.query."),
            (".attention.k_proj.", ".attention.attention.key."),
            (".attention.v_proj.", ".attention.attention.value."),
            (".attention.o_proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ),
        auto_class="AutoModelForImageClassification",
        qkv_bias=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in ROWS}
