"""What of Axolotl's settings works with LoRAM, as far as a look at cfg can tell."""

from __future__ import annotations

import logging
import os
from typing import Any

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import ADAPTERS
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.zero import read_deepspeed, zero_stage
from axolotl_loram.recovery.adapter import unrecoverable
from axolotl_loram.text.axolotl_text import rl_of

LOG = logging.getLogger(__name__)
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
"""Axolotl's fused LoRA kernels, which it switches on itself where a YAML names none of them."""

PREFERENCES = ("dpo", "ipo", "kto", "orpo", "simpo")
"""Axolotl's `rl` whose answers are all known before training."""

SPLITTING = {
    "tensor_parallel_size": "it splits every layer by the base's head counts",
    "expert_parallel_size": "pruned layers need not have as many experts as ranks can share, and "
    "each rank would save the LoRA of its own alone",
}
"""What deals a layer's weights out to ranks, and why that fails."""


def check_supported(cfg: Any) -> None:
    """Refuse, by name and with the reason, what LoRAM cannot recover; cfg is not validated yet."""
    if not cfg.loram:
        raise LoRAMError(
            "expected a `loram:` section for the LoRAMPlugin, found none: add "
            "`loram: {pruned_model_path: ...}` or take the plugin out"
        )
    if aligns(cfg):
        return check_alignment(cfg)
    if cfg.adapter not in ADAPTERS:
        raise LoRAMError(
            f"expected adapter: {', '.join(ADAPTERS)} with loram:, found {cfg.adapter!r}: LoRAM "
            "recovers LoRA matrices only"
        )
    if cfg.merge_lora and cfg.loram.recovery == "masked":
        raise LoRAMError(
            "expected `recovery: plain` for merge-lora, found masked: output_dir/merged is the "
            "merged model already, and would be replaced by the plainly recovered one"
        )
    refused = {
        "relora": "it merges into the pruned weights as it goes, which the original has not",
        "gptq": "pruned models hold plain weights; use adapter: qlora for 4 bits",
        "reinit_weights": "it would throw the pruned model's weights away",
        "peft_layer_replication": "it makes layers that the original has not",
        "qat": "it rounds the pruned weights, saves nothing, and LoRA learns to mend that",
    }
    _refuse(cfg, refused, "loram:")
    dealt = dict(SPLITTING)
    if not any("ExpertParallelPlugin" in str(name) for name in cfg.plugins or ()):
        del dealt["expert_parallel_size"]  # nobody reads it
    for key, reason in dealt.items():
        if (cfg[key] or 1) > 1:
            raise LoRAMError(f"expected {key} 1 with loram:, found {cfg[key]}: {reason}")
    if cfg.loram.get("anchor") == "base":
        _check_anchored(cfg)
    loftq = cfg.peft and cfg.peft.loftq_config
    adapter = {
        "use_dora": cfg.peft_use_dora,
        "init_lora_weights": "loftq" if loftq else cfg.peft_init_lora_weights or True,
    }
    refusal = unrecoverable(adapter)
    if refusal:
        raise LoRAMError(f"this adapter cannot be recovered: {refusal}")


def _check_anchored(cfg: Any) -> None:
    """Refuse what is not known before training, and losses that an anchor has no part in."""
    streamed = "what the base says is computed before training; name `datasets` that are not"
    scored = "the original has no head that scores"
    refused = {
        **dict.fromkeys(("reward_model", "process_reward_model"), scored),
        **dict.fromkeys(("streaming", "pretraining_dataset"), streamed),
        "kd_trainer": "it has a loss of its own",
        "neftune_noise_alpha": "the pruned model would say another thing at each look",
        "batch_flattening": "rows would not be found again; use sample_packing",
        "precompute_ref_log_probs": "that comes before the hidden states; the trainer's own "
        "reference is the model without its adapter, which needs no memory",
    }
    if cfg.rl and cfg.rl not in PREFERENCES:
        refused["rl"] = "its answers are written during training, when the original is not there"
    _refuse(cfg, refused, "`anchor` in loram:")
    _refuse_parts(cfg, "`anchor` in loram:")


def check_preferences(cfg: Any, upper_layers: bool) -> None:
    """Refuse preference losses with an anchor, unless it trains the original's upper layers."""
    if cfg.rl and cfg.loram.get("anchor") == "base" and not upper_layers:
        raise LoRAMError(
            f"expected no `rl` with `anchor` in loram:, found {rl_of(cfg)}: with the pruned model "
            "as its reference the offset cancels, or there is no such loss; remove whole layers "
            "(`units: layers`), whose reference is the original, or take `anchor` out"
        )


def check_upper_layers(cfg: Any, section: LoRAMConfig, plan: PruningPlan) -> None:
    """Refuse what needs the first layers, where pruning removed them whole."""
    count = len(plan.removed)
    model = f"a model whose first {count} layers are removed"
    if section.anchor != "base" or section.fill != "zeros":
        found = "another anchor" if section.anchor != "base" else f"fill: {section.fill}"
        raise LoRAMError(
            f"expected `anchor: base` and no fill with {model}, found {found}: the original's "
            "hidden states take their place"
        )
    if cfg.deepspeed and zero_stage(read_deepspeed(cfg.deepspeed)) == 3:
        raise LoRAMError(
            f"expected ZeRO-2, FSDP2 or DDP with {model}, found ZeRO-3: it shards each layer as it "
            "is built, before its weights are taken away"
        )
    chosen = cfg.peft_layers_to_transform
    gone = set(plan.removed) & set([chosen] if isinstance(chosen, int) else chosen or ())
    if gone:
        raise LoRAMError(
            f"expected peft_layers_to_transform to name layers from {count} on, found "
            f"{sorted(gone)}, which pruning removed: leave them out"
        )
    written = "a model without its first layers writes nothing; use `axolotl-loram evaluate`"
    _refuse(cfg, dict.fromkeys(("do_causal_lm_eval", "eval_table_size"), written), model)


def aligns(cfg: Any) -> bool:
    """Whether this is the align stage, in which base_model is the pruned model itself."""
    return bool(cfg.loram) and cfg.loram.get("stage") == "align"


def check_alignment(cfg: Any) -> None:
    """Refuse, by name and with the reason, what does not go with `stage: align`."""
    whole = "all weights are trained; adapters come after, with `stage: train`"
    sharded = "no rank would have the whole weights to save"
    refused = {
        **dict.fromkeys(("adapter", "lora_model_dir"), whole),
        **dict.fromkeys(("load_in_4bit", "gptq"), "weights in 4 bits cannot be trained"),
        "load_in_8bit": "weights in 8 bits cannot be trained",
        **dict.fromkeys(
            ("rl", "reward_model", "process_reward_model"),
            "alignment is continual pre-training, on plain text",
        ),
        "qat": "the pruned checkpoint's weights are not quantized",
        "reinit_weights": "it would throw the pruned model's weights away",
        "load_best_model_at_end": "the aligned checkpoint is the last step's",
        "hub_model_id": "the trainer would upload its own folder; use `axolotl-loram publish` then",
    }
    _refuse(cfg, refused, "`stage: align`")
    if cfg.loram.get("objective") == "distillation":
        _check_distillation(cfg)
    for key in ("tensor_parallel_size", "expert_parallel_size"):
        if (cfg[key] or 1) > 1:
            raise LoRAMError(f"expected {key} 1 with `stage: align`, found {cfg[key]}: {sharded}")


def _check_distillation(cfg: Any) -> None:
    """Refuse what would take a batch's sequences apart, or together: they are looked up whole."""
    refused = {
        "sample_packing": "what the base says is kept by whole sequences; set it to false",
        "kd_trainer": "it distils by itself",
    }
    _refuse(cfg, refused, "`objective: distillation`")
    _refuse_parts(cfg, "`objective: distillation`")
    if (cfg.streaming or cfg.pretraining_dataset) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoRAMError(
            "expected data that is not streamed, or one process, with `objective: distillation`, "
            f"found {os.environ['WORLD_SIZE']} processes, each with its own part of the stream: "
            "set streaming to false and name `datasets`"
        )


def _refuse_parts(cfg: Any, where: str) -> None:
    if (cfg.context_parallel_size or 1) > 1:
        raise LoRAMError(
            f"expected context_parallel_size 1 with {where}, found {cfg.context_parallel_size}: "
            "what the base says is kept by whole sequences"
        )


def _refuse(cfg: Any, refused: dict[str, str], where: str) -> None:
    for key, reason in refused.items():
        if cfg[key]:
            raise LoRAMError(f"expected no `{key}` with {where}, found {cfg[key]!r}: {reason}")


def trains_masked(section: LoRAMConfig, plan: PruningPlan) -> bool:
    """Whether the update is to be confined to the weights that pruning left.

    Raises:
        LoRAMError: It is asked for, but pruning removed whole units, and left no zeros.
    """
    if (section.masked or section.recovery == "masked") and not plan.masks:
        raise LoRAMError(
            "expected a sparse pruned model with `masked: true` or `recovery: masked`, found one "
            "that lost whole units, which has no mask: take them out"
        )
    return bool(plan.masks) and section.masked is not False


def check_router_losses(config: Any, plan: PruningPlan) -> None:
    """Refuse a load-balancing loss over layers that have different numbers of experts.

    transformers would stack the routers' outputs of all layers, and fail.
    """
    pruned = any("experts" in kept for kept in plan.counts.values())
    if pruned and getattr(config, "output_router_logits", False):
        raise LoRAMError(
            "expected output_router_logits false with pruned experts, found true: the "
            "load-balancing loss takes equally many experts in each layer; add "
            "`overrides_of_model_config: {output_router_logits: false}`"
        )


def switch_off_kernels(cfg: Any) -> None:
    """Keep Axolotl from fusing LoRA: its kernels multiply by A and B themselves, without the mask.

    Takes effect before the model is loaded: that is when Axolotl patches it as cfg says.
    """
    on = [name for name in KERNELS if cfg[name]]
    if on:
        LOG.warning("switching %s off: the masked update does not go through them", ", ".join(on))
    for name in on:
        cfg[name] = False
