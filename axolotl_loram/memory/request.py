"""What `axolotl-loram plan` is asked: by options, or by an Axolotl YAML that options override."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.config import Pruning, PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import untrusted
from axolotl_loram.memory.data import ANY_DATA, Data, data_of
from axolotl_loram.memory.optimizers import AS_ADAMW
from axolotl_loram.memory.settings import DOUBLE, TrainingArgs, settings_of

NOT_COUNTED = (
    *("deepspeed", "fsdp", "fsdp_config", "context_parallel_size", "tensor_parallel_size"),
    *("expert_parallel_size", "activation_offloading", "layer_offloading", "ple_cpu_offload"),
    *("tiled_mlp", "selective_checkpointing", "torch_compile", "rl", "reward_model", "ebft"),
    *("peft_layer_replication", "lora_exclude_modules", "unfrozen_parameters", "relora"),
    *("resize_token_embeddings_to_32x", "gptq", "model_quantization_config"),
    *("llama4_linearized_experts", "use_scattermoe", "use_sonicmoe", "use_kernels"),
    *("experts_implementation", "fused_attn_kernel", "lora_on_cpu", "processor_type"),
)
"""Keys of an Axolotl config that change the memory in ways that are not predicted."""
NOTHING = type(None)
TYPES: dict[str, type | tuple] = {
    **dict.fromkeys(("base_model", "revision_of_model"), (str, NOTHING)),
    **dict.fromkeys(("loram", "lora_rank_pattern", "bnb_config_kwargs"), (dict, NOTHING)),
    **dict.fromkeys(("plugins", "lora_modules_to_save", "datasets"), (list, NOTHING)),
    **dict.fromkeys(("lora_target_modules", "lora_target_parameters"), (list, str, NOTHING)),
    "peft_layers_pattern": (list, str, NOTHING),
    "peft_layers_to_transform": (list, int, NOTHING),
    "peft_trainable_token_indices": (list, dict, NOTHING),
    "num_epochs": (int, float, NOTHING),
    "max_steps": (int, NOTHING),
}
SECTION_TYPES: dict[str, type | tuple] = {
    "pruning": (dict, NOTHING),
    "pruned_model_path": (str, NOTHING),
    "pruned_model_revision": (str, NOTHING),
    "anchor": (str, NOTHING),
}
"""Of settings that are read before Axolotl, or a schema, has looked at them."""
SIZED = {"ratio", "sparsity", "indices_path"}
"""Settings of pruning that say how much is left."""
UNITS = {"": 1} | {
    unit: base**power
    for base, end in ((1000, ""), (1024, "I"))
    for power, letter in enumerate("KMGT", start=1)
    for unit in (letter + end,)
}


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        pruning: How it is pruned; None where `pruned` says so.
        pruned: Folder or hub id of a model that is pruned already, and its revision.
        adapter: "loram" or "qloram": what has to fit the budget.
        budget: Bytes; the ratio in `pruning` then only stands for the smallest that fits.
        not_counted: What of the config is not predicted, or only in part.
        anchor: "here" where `anchor: base` computes it, "brought" where a path names it.
    """

    model: str
    revision: str | None
    pruning: Pruning | None
    pruned: tuple[str, str | None] | None
    run: TrainingArgs
    adapter: str
    budget: int | None = None
    not_counted: tuple[str, ...] = ()
    data: Data = ANY_DATA
    anchor: str | None = None


def request(
    model: str,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    fit: str | None = None,
    tokens: int | None = None,
    room: int | None = None,
) -> Request:
    """From a model, or from an Axolotl YAML, whose settings options override.

    See `api.plan_memory`, which says what the arguments mean. Of `options` (fields of `PruningArgs`
    and `TrainingArgs`), None stands for not given; `room` is bytes to fit where nothing says how to
    prune.

    Raises:
        LoRAMError: The YAML cannot be read, nothing says how to prune, or a setting is not allowed.
    """
    given, training = options_of(options or {})
    cfg = read_yaml(Path(model)) if model.endswith((".yml", ".yaml")) else {}
    section = cfg.get("loram") or {}
    if fit is not None and "ratio" in given:
        raise LoRAMError(
            f"expected a pruning ratio or a size to fit, found both ({given['ratio']} and {fit}): "
            "the ratio is what --fit finds"
        )
    named = {**(section.get("pruning") or {}), **given}
    sized = section.get("pruned_model_path") or SIZED & named.keys()
    budget = parse_size(fit) if fit is not None else None if sized else room
    pruning = {**({"ratio": 0.5} if budget else {}), **named}
    pruned = None if pruning else section.get("pruned_model_path")
    whole = bool(pruned) or (bool(cfg) and not section and not pruning)  # plain Axolotl: as it is
    how = None if whole else PruningArgs.parse(**pruning).resolve(own_text=bool(cfg))
    in_4_bits = {
        "prequantized": bool(how and how.quantize),
        "block_size": how.quantize_block_size if how else 64,
    }
    four_bit = "q" in str(cfg.get("adapter") or "q") or bool(cfg.get("load_in_4bit"))
    run = TrainingArgs.parse(**(settings_of(cfg) if cfg else {}) | training | in_4_bits)
    return Request(
        str(cfg.get("base_model") or model),
        revision or cfg.get("revision_of_model"),
        how,
        (str(pruned), section.get("pruned_model_revision")) if pruned else None,
        run,
        adapter or ("qloram" if four_bit else "loram"),
        budget,
        tuple(_not_counted(cfg, run)),
        data_of(cfg, run, tokens),
        _anchor(section) or ("here" if how and how.whole_layers else None),
    )


def _anchor(section: Mapping[str, Any]) -> str | None:
    if section.get("anchor") != "base":
        return None
    return "brought" if section.get("anchor_path") else "here"


def _not_counted(cfg: Mapping[str, Any], run: TrainingArgs) -> Iterator[str]:
    """Keys that are not predicted, and in brackets what of a key is not where the rest is."""
    yield from (key for key in NOT_COUNTED if cfg.get(key))
    others = sorted(str(name) for name in (cfg.get("bnb_config_kwargs") or {}) if name != DOUBLE)
    partly = {
        f"bnb_config_kwargs ({', '.join(others)})": others,
        f"gradient_checkpointing ({cfg.get('gradient_checkpointing')})": isinstance(
            cfg.get("gradient_checkpointing"), str
        ),
        f"optimizer ({run.optimizer}: counted as adamw_torch)": run.optimizer in AS_ADAMW,
        "load_in_8bit (LoRAM has no 8-bit form: counted for lora alone)": run.load_in_8bit,
        "peft_use_dora (its activations)": run.peft_use_dora,
        "lora_target_parameters (PEFT's copies of the experts)": run.lora_target_parameters,
        "peft_trainable_token_indices (PEFT's copies of the matrices)": run.trainable_tokens,
    }
    yield from (name for name, found in partly.items() if found)


def options_of(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options, as fields of `PruningArgs` and of `TrainingArgs`; None stands for not given."""
    given = {name: value for name, value in options.items() if value is not None}
    training = {name: given.pop(name) for name in list(given) if name in TrainingArgs.model_fields}
    return given, training


def read_yaml(file: Path) -> dict[str, Any]:
    """An Axolotl config.

    Raises:
        LoRAMError: There is no such file, it does not parse, or it names no base_model.
    """
    cfg = untrusted.read_yaml(file)
    check_settings(cfg, file)
    if not cfg.get("base_model"):
        raise LoRAMError(
            f"expected {file} to name a base_model, found none: give an Axolotl config, or a model"
        )
    return cfg


def check_settings(cfg: Mapping[str, Any], file: Path) -> None:
    """Refuse an Axolotl config in which a setting that is read here is of another type."""
    untrusted.check_types(cfg, TYPES, file)
    for name in ("loram", "pruning"):
        cfg = cfg.get(name) or {}
        untrusted.check_types(cfg, SECTION_TYPES, file)
        if not all(isinstance(key, str) for key in cfg):
            raise LoRAMError(f"expected names of settings in `{name}:` of {file}, found a number")


def parse_size(text: str) -> int:
    """Bytes of a size such as 20GiB, 24 GB or 8.5g (GB is 10⁹ bytes, GiB 2³⁰).

    Raises:
        LoRAMError: It is not such a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]I?)B?", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise LoRAMError(f"expected a size such as 20GiB or 24GB, found {text!r}: give a unit")
    return int(float(found[1]) * UNITS[found[2]])
