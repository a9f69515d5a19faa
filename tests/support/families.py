"""Every declared family as a pico model; run as a script, prints the table of docs/families.md."""

from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR

PICO = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
OWN_SIZES = {
    "cohere": {"use_qk_norm": True},
    "gpt_neox": {"head_dim": None},
    "mixtral": MOE,
    "olmoe": MOE,
    "qwen2_moe": MOE | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": MOE | {"moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "gpt_oss": MOE
    | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"n_group": 1, "topk_group": 1, "v_head_dim": 8, "first_k_dense_replace": 2}
    | {"num_key_value_heads": 4, "head_dim": 4},
    "gemma3": {
        "text_config": {**PICO, "model_type": "gemma3_text"},
        "vision_config": VISION | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 260,
    },
    "qwen2_5_vl": {
        "text_config": PICO | {"rope_parameters": MROPE},
        "vision_config": {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24}
        | {"out_hidden_size": 32, "patch_size": 8, "fullatt_block_indexes": [1]},
        "image_token_id": 260,
    },
    "qwen3_vl": {
        "text_config": PICO | {"rope_parameters": MROPE},
        "vision_config": {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24}
        | {"out_hidden_size": 32, "patch_size": 8, "deepstack_visual_indexes": [0]}
        | {"num_position_embeddings": 16},
        "image_token_id": 260,
    },
    "vit": {"image_size": 16, "patch_size": 8, "num_labels": 5, "head_dim": 8},
}


def pico_config(family: str, **sizes):
    """A config of a family's real class, small in every way."""
    from transformers import AutoConfig

    own = OWN_SIZES.get(family, {})
    general = {} if FAMILIES[family].section else PICO
    wanted = {**general, **own, **sizes}
    config = AutoConfig.for_model(family, **{k: v for k, v in wanted.items() if v is not None})
    return config


def at_depth(family: str, layers: int) -> dict:
    """What makes a family's pico model as deep as real ones are."""
    section, depth = FAMILIES[family].section, {"num_hidden_layers": layers}
    return {section: {**OWN_SIZES[family][section], **depth}} if section else depth


TOWERS = tuple(name for name, family in FAMILIES.items() if family.section)
"""Families with a vision tower, whose language tower is pruned."""
TRAINED = ("qwen3", "gemma3_text", "phi3", "mixtral")
"""Families that test_training_families.py trains with `axolotl train`, beside Llama."""
ALSO = {
    "llama": "Llama 2, 3, 3.x, Falcon 3, Yi, SmolLM 1/2",
    "qwen2": "Qwen 2, 2.5, QwQ",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "phi": "Phi-1, 1.5, 2",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "deepseek_v3": "DeepSeek V3, R1, Moonlight",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gemma3": "Gemma 3 with its vision tower (the language tower is pruned)",
    "qwen2_5_vl": "Qwen2.5-VL (the language tower is pruned)",
    "qwen3_vl": "Qwen3-VL (the language tower is pruned)",
    "vit": "Vision Transformer (through Python)",
}
"""Model type → the models that have it, where its name does not say so."""


def table() -> str:
    """What is pruned of each family, as Markdown; every row is tested in test_families.py."""
    lines = [
        "| model type | MLP neurons | KV groups | experts | LoRA targets | NF4 | trained in CI |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in FAMILIES.items():
        kinds = set(row.kinds)
        heads = "heads" if "heads" in kinds else "yes" if "kv_groups" in kinds else "–"
        whole = {"experts": "whole", "expert_neurons": "neurons of each"}
        experts = ", ".join(text for kind, text in whole.items() if kind in kinds) or "–"
        weights = {weight.role: weight.module.rpartition(".")[2] for weight in row.layer}
        linear = [w.module.rpartition(".")[2] for w in row.layer if w.role == LINEAR]
        stacked = [f"`{w.parameter}`" for w in row.layer if w.role == EXPERTS]
        targets = f"{len(dict.fromkeys(linear))} linear"
        targets += f", {len(stacked)} stacked" if EXPERTS in weights else ""
        language = row.auto_class != "AutoModelForImageClassification"
        four_bits = ("yes, experts packed" if stacked else "yes") if language else "–"
        trained = "yes" if name in ("llama", *TRAINED) else ""
        title = f"`{name}`" + (f": {ALSO[name]}" if name in ALSO else "")
        neurons = "yes" if {"neurons", "shared_neurons"} & kinds else "–"
        cells = (title, neurons, heads, experts, targets, four_bits, trained)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
