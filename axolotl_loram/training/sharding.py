"""Values of a DeepSpeed or FSDP configuration that would win over the YAML without a word.

Read in axolotl 0.19, accelerate 1.13 and transformers 5.16: an `optimizer` or `scheduler` in a
DeepSpeed file takes the place of the YAML's; a missing `gradient_clipping` turns `max_grad_norm`
off; Axolotl replaces the micro-batch under sample packing; and what is found to differ otherwise is
said only when the model is loaded already.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.zero import read_deepspeed, zero_stage

GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
SEQUENTIAL = "zero_optimization.stage3_allgather_sequential"
FULL = "FULL_STATE_DICT"


def check_sharding(cfg: Mapping[str, Any]) -> None:
    """Refuse settings under which the YAML would not hold, or no complete weights would be saved.

    Args:
        cfg: Axolotl's cfg, with its defaults filled in.
    """
    if cfg.get("deepspeed"):
        check_deepspeed(cfg, read_deepspeed(cfg["deepspeed"]))
    elif cfg.get("fsdp") or cfg.get("fsdp_config"):
        _check_fsdp(cfg)


def check_deepspeed(cfg: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that says otherwise than the YAML."""
    for section, key in (("optimizer", "optimizer"), ("scheduler", "lr_scheduler")):
        if deepspeed.get(section):
            raise LoRAMError(
                f"expected no `{section}` in the DeepSpeed file, found "
                f"{deepspeed[section].get('type')}: it would silently take the place of the YAML's "
                f"`{key}`; take it out, the YAML's runs under DeepSpeed too"
            )
    for name, (value, absent) in _agreed(cfg).items():
        found = _value(deepspeed, name, absent)
        if found not in ("auto", value):
            raise LoRAMError(
                f"expected {name} {value} or auto in the DeepSpeed file, found {found}: the YAML "
                "says otherwise, and only one of them would hold"
            )
    check_gathering(deepspeed)


def check_adapter_saves(cfg: Mapping[str, Any]) -> None:
    """Refuse settings under which an adapter would not be trained or saved whole."""
    whole, reason = cfg.get("lora_modules_to_save"), None
    if cfg.get("deepspeed"):
        deepspeed = read_deepspeed(cfg["deepspeed"])
        check_gathering(deepspeed)
        if zero_stage(deepspeed) == 3:
            reason = "ZeRO-3, found {}: DeepSpeed 0.18 fails in the first step (its issue 7615)"
    elif str(_fsdp_version(cfg)) == "2":
        reason = "FSDP2, found {}: Axolotl 0.19 fails when it saves the adapter in the end"
        config = cfg.get("fsdp_config") or {}
        if config.get("activation_checkpointing"):
            raise LoRAMError(
                "expected no activation_checkpointing in fsdp_config, found it: Axolotl 0.19 saves "
                "the adapter under names that PEFT does not know (_checkpoint_wrapped_module); "
                "write `gradient_checkpointing: true` instead"
            )
        if config.get("state_dict_type") == FULL and cfg.get("save_strategy") != "no":
            raise LoRAMError(
                f"expected fsdp_config.state_dict_type: SHARDED_STATE_DICT, found {FULL}: "
                "accelerate 1.13 restores such a checkpoint's adapter on rank 0 only, and a run "
                "would go on from half of one (the adapter saved in the end is whole with either, "
                "so that `save_strategy: no` does too)"
            )
    if whole and reason:
        raise LoRAMError(
            f"expected no lora_modules_to_save with {reason.format(', '.join(whole))}; adapt them "
            "by LoRA, or use ZeRO-1, ZeRO-2 or DDP"
        )


def settle_checkpointing(cfg: Any) -> None:
    """Under ZeRO-3, have LoRA's layers recomputed reentrantly: the other way fails.

    Non-reentrant checkpointing holds what it recomputes against the shapes of before; but DeepSpeed
    0.18 empties a frozen weight in place when a module's forward pass is over, that of the
    recomputation too (transformers' issue 47254; trained weights are saved detached, so that
    alignment is free of it). Axolotl 0.19 takes the reentrant way by itself, but not with `rl`, for
    which some of TRL's trainers do (DPO's, KTO's) and some do not (ORPO's, CPO's). It is set where
    cfg, with its defaults filled in, does not say it.

    Raises:
        LoRAMError: The YAML asks for the other way.
    """
    if not cfg.get("deepspeed") or zero_stage(read_deepspeed(cfg["deepspeed"])) != 3:
        return
    offloads = cfg.get("activation_offloading")  # all but one of its ways recompute nothing
    if offloads != "hidden_states" and (offloads or not cfg.get("gradient_checkpointing")):
        return
    settings = cfg.get("gradient_checkpointing_kwargs") or {}
    if cfg.get("selective_checkpointing"):
        raise LoRAMError(
            "expected no `selective_checkpointing` with ZeRO-3, found it: it is never reentrant, "
            "and fails in the first backward pass (transformers' issue 47254); take it out"
        )
    if settings.get("use_reentrant") is False:
        raise LoRAMError(
            "expected gradient_checkpointing_kwargs: use_reentrant: true with ZeRO-3, found false: "
            "the first backward pass would end in a CheckpointError, since DeepSpeed 0.18 empties "
            "frozen weights when they were recomputed (transformers' issue 47254); take it out"
        )
    cfg["gradient_checkpointing_kwargs"] = {**settings, "use_reentrant": True}


def check_offloading(cfg: Mapping[str, Any]) -> None:
    """Refuse Axolotl's `layer_offloading` where something else holds the weights, too.

    Raises:
        LoRAMError: Weights are sharded, or there are several processes.
    """
    if not cfg.get("layer_offloading"):
        return
    sharded = [key for key in ("deepspeed", "fsdp", "fsdp_config") if cfg.get(key)]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if sharded or ranks > 1:
        found = sharded[0] if sharded else f"{ranks} processes"
        raise LoRAMError(
            f"expected one GPU with `layer_offloading`, found {found}: ZeRO and FSDP move the "
            "weights themselves, and DDP wants them all on the GPU; take it out, or use ZeRO-3 "
            "with offload_param"
        )


def check_offloads(trainer: Any) -> None:
    """Refuse a trainer that was to offload layers and does not: Axolotl 0.19 only warns.

    Raises:
        LoRAMError: There is no GPU, or no layers whose class is called DecoderLayer.
    """
    if not getattr(getattr(trainer, "_layer_offload_manager", None), "enabled", False):
        raise LoRAMError(
            "expected a GPU and layers that Axolotl's `layer_offloading` knows (DecoderLayer in "
            f"their class's name), found a {type(trainer).__name__} that offloads nothing: all "
            "weights would stay where they are; take it out"
        )


def check_gathering(deepspeed: Mapping[str, Any]) -> None:
    """Refuse a ZeRO-3 configuration under which what is loaded or saved would not be whole.

    DeepSpeed 0.18.9 starts the gathers of a module's weights together and waits for the last. On a
    GPU they end in order. Gloo, on CPUs, has two threads: another may still be under way, and then
    writes over weights that were just loaded, or leaves out of a save what it has not brought yet.
    """
    if zero_stage(deepspeed) != 3:
        return
    if not _true(deepspeed, GATHER):
        raise LoRAMError(
            f"expected {GATHER} true in the DeepSpeed file, found "
            f"{_value(deepspeed, GATHER, None)}: no rank would have the whole weights to save"
        )
    if not _true(deepspeed, SEQUENTIAL) and ranks_on_cpus():
        raise LoRAMError(
            f"expected {SEQUENTIAL} true in the DeepSpeed file for ranks on CPUs, found "
            f"{_value(deepspeed, SEQUENTIAL, None)}: DeepSpeed does not wait there for all weights "
            "that it gathers, and some would be garbage"
        )


def ranks_on_cpus() -> bool:
    """Whether this process is one of several that have no accelerator."""
    import torch

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and torch.accelerator.current_accelerator() is None


def _agreed(cfg: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name in the DeepSpeed file → what the YAML says, and what a file without it stands for."""
    clipping = 1.0 if cfg.get("max_grad_norm") is None else cfg["max_grad_norm"]
    bf16 = bool(cfg.get("bf16") or cfg.get("bfloat16"))
    steps, batch = cfg["gradient_accumulation_steps"], cfg["batch_size"]
    return {
        "train_micro_batch_size_per_gpu": (cfg["micro_batch_size"], "auto"),
        "gradient_accumulation_steps": (steps, 1),
        "train_batch_size": (batch, "auto"),
        "gradient_clipping": (clipping, 0),
        "bf16.enabled": (bf16, "auto"),
        "fp16.enabled": (bool(cfg.get("fp16")) and not bf16, "auto"),
    }


def _check_fsdp(cfg: Mapping[str, Any]) -> None:
    config, version = cfg.get("fsdp_config") or {}, _fsdp_version(cfg)
    if str(version) != "2":
        raise LoRAMError(
            f"expected fsdp_version: 2 with `stage: align`, found {version}: FSDP1 cannot freeze "
            "the lm_head inside a flat parameter"
        )
    kind = config.get("final_state_dict_type") or config.get("state_dict_type")
    if kind != FULL:
        raise LoRAMError(
            f"expected fsdp_config.final_state_dict_type: {FULL} with `stage: align`, found {kind}:"
            " sharded weights are no checkpoint (state_dict_type, which the checkpoints on the way "
            "have, may be SHARDED_STATE_DICT)"
        )


def _fsdp_version(cfg: Mapping[str, Any]) -> Any:
    return cfg.get("fsdp_version") or (cfg.get("fsdp_config") or {}).get("fsdp_version")


def _value(config: Mapping[str, Any], name: str, absent: Any) -> Any:
    """What stands under a dotted name; `absent` where nothing does."""
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return absent if found is None else found


def _true(config: Mapping[str, Any], name: str) -> bool:
    return str(_value(config, name, False)).lower() == "true"
