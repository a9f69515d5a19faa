"""Settings of a training run that decide its memory, as options and as an Axolotl YAML has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from axolotl_loram.config import NATIVE, QLORAM, Section
from axolotl_loram.memory.optimizers import check_optimizer

Head = Literal["native", "nf4"]
Embedding = Literal["native", "cpu"]
PATTERN = re.compile(r"[\\()\[\]*|^$+?{}]")
"""What tells a pattern from names of modules."""


class TrainingArgs(Section):
    """What decides the memory of a run; the defaults are the paper's, or Axolotl's."""

    lora_r: int = Field(default=8, ge=1, description="Rank of LoRA.")
    lora_target_modules: str = Field(
        default="linear",
        description="Modules with LoRA, separated by commas; linear stands for all linear ones "
        "inside the layers.",
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before LoRA.")
    sequence_len: int = Field(default=512, ge=1, description="Tokens in a sequence.")
    micro_batch_size: int = Field(default=1, ge=1, description="Sequences in a forward pass.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=2**20, description="Forward passes in a step (time, not memory)."
    )
    optimizer: str = Field(
        default="adamw_torch_fused", description="Optimizer, by the name Axolotl has for it."
    )
    gradient_checkpointing: bool = Field(
        default=True, description="Recompute each layer in the backward pass."
    )
    attention: Literal["flash", "eager"] = Field(
        default="flash",
        description="flash: flash-attn or PyTorch's own (sdpa), without a matrix of all scores.",
    )
    cross_entropy: Literal["plain", "liger", "cut"] = Field(
        default="plain",
        description="Loss: all logits at once, Liger's in chunks, or cut cross-entropy.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Precision of the computation; bf16 stands for fp16 too."
    )
    fused_kernels: bool = Field(
        default=False,
        description="Axolotl's fused LoRA kernels, which keep less (on by default on a GPU).",
    )
    lm_head_format: Head | None = Field(
        default=None,
        description="How the pruned model's lm_head is kept; in 4 bits nf4 by default, where the "
        "loss allows it.",
    )
    embedding_format: Embedding | None = Field(
        default=None,
        description="How the pruned model's embedding is kept; cpu: in host memory, the default in "
        "4 bits.",
    )
    fused_glu: bool = False
    modules_to_save: tuple[str, ...] = ()
    lora_target_parameters: tuple[str, ...] = ()
    lora_rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    peft_layers_to_transform: tuple[int, ...] = ()
    peft_layers_pattern: tuple[str, ...] = ()
    trainable_tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    peft_use_dora: bool = False
    peft_ensure_weight_tying: bool = False
    load_in_8bit: bool = False
    double_quant: bool = True
    lora_float32: bool = True
    quantize_experts: bool = False
    skips_upcast: bool = False
    prequantized: bool = False
    block_size: int = 64

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        check_optimizer(name)
        return name

    @field_validator(
        "lora_target_modules", "modules_to_save", "lora_rank_pattern", "peft_layers_pattern"
    )
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        """All of these are regular expressions to PEFT, or can be."""
        for text in [value] if isinstance(value, str) else value:
            try:
                re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"expected a pattern, found {text[:80]!r}: {error}") from None
        return value

    @property
    def tokens(self) -> int:
        """Tokens in a forward pass."""
        return self.sequence_len * self.micro_batch_size

    @property
    def compute_bytes(self) -> int:
        """Bytes of a value in the computation, and of a weight that is not quantized."""
        return 2 if self.precision == "bf16" else 4

    @property
    def lora_bytes(self) -> int:
        """Bytes of a LoRA weight: PEFT makes 16-bit adapters float32 unless told not to."""
        return 4 if self.lora_float32 else self.compute_bytes

    def formats(self, four_bit: bool, tied: bool) -> tuple[Head, Embedding]:
        """Formats of lm_head and embedding in a pruned model: as asked, else what suits the run.

        What is trained whole or by tokens stays native, an embedding with LoRA too, and lm_head
        where the loss multiplies by its weight itself; of tied embeddings none is small unless
        both are.
        """
        tokens = bool(self.trainable_tokens)
        whole = {
            name: tokens or name in self.modules_to_save for name in ("lm_head", "embed_tokens")
        }
        whole["embed_tokens"] |= "embed_tokens" in self.lora_target_modules.split(",")
        default: dict[str, Any] = QLORAM if four_bit else dict.fromkeys(QLORAM, NATIVE)
        head: Head = default["lm_head"]
        embedding: Embedding = default["embedding"]
        if whole["lm_head"] or self.cross_entropy != "plain":
            head = "native"
        embedding = "native" if whole["embed_tokens"] else embedding
        head = self.lm_head_format or head
        embedding = self.embedding_format or embedding
        return ("native", "native") if tied and "native" in (head, embedding) else (head, embedding)


OPTIONS = tuple(
    name for name, field in TrainingArgs.model_fields.items() if field.description is not None
)
"""The settings that the command line has options for."""


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an Axolotl config names, or its own cfg, under this schema's names."""
    found = {name: cfg[name] for name in DIRECT if cfg.get(name) is not None}
    eager = cfg.get("attn_implementation") == "eager" or bool(cfg.get("eager_attention"))
    found |= {name: _listed(cfg[name]) for name in LISTS if cfg.get(name)}
    half = cfg.get("bf16", "auto") or cfg.get("fp16") or cfg.get("bfloat16")
    found |= {
        "lora_target_modules": _targets(cfg),
        "optimizer": _optimizer(cfg.get("optimizer")),
        "gradient_checkpointing": bool(cfg.get("gradient_checkpointing")),
        "attention": "eager" if eager else "flash",
        "cross_entropy": _cross_entropy(cfg),
        "precision": "bf16" if half else "fp32",
        "fused_kernels": _fused_kernels(cfg),
        "fused_glu": bool(cfg.get("liger_glu_activation")),
        "modules_to_save": _listed(cfg.get("lora_modules_to_save")),
        "trainable_tokens": _tokens(cfg.get("peft_trainable_token_indices")),
        "double_quant": (cfg.get("bnb_config_kwargs") or {}).get(DOUBLE, True),
        "lora_float32": cfg.get("peft_autocast_adapter_dtype") is not False,
        "quantize_experts": bool(cfg.get("quantize_moe_experts")),
        "skips_upcast": bool(cfg.get("embeddings_skip_upcast")),
    }
    section = cfg.get("loram") or {}
    for name in ("lm_head_format", "embedding_format"):
        found[name] = section.get(name)
    return {name: value for name, value in found.items() if value is not None}


DIRECT = (
    *("lora_r", "lora_dropout", "lora_rank_pattern", "sequence_len", "micro_batch_size"),
    *("gradient_accumulation_steps", "peft_use_dora", "peft_ensure_weight_tying", "load_in_8bit"),
)
LISTS = ("lora_target_parameters", "peft_layers_to_transform", "peft_layers_pattern")
DOUBLE = "bnb_4bit_use_double_quant"


def _listed(value: Any) -> tuple[Any, ...]:
    """One or several, as several."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) if value else ()


def _targets(cfg: Mapping[str, Any]) -> str | None:
    """Names with commas between; `lora_target_linear` adds all linear modules in the layers.

    One string is a pattern to PEFT, and reads as one here; in a list patterns match nothing.
    """
    named, linear = cfg.get("lora_target_modules"), bool(cfg.get("lora_target_linear"))
    if isinstance(named, str) and not linear and named != "all-linear":
        return named if PATTERN.search(named) else f"(?:{named})"
    if not named and not linear:
        return "" if cfg.get("adapter") else None
    names = [str(name) for name in _listed(named) if not PATTERN.search(str(name))]
    return ",".join(names + ["linear"] * linear)


def _tokens(indices: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name of a matrix → rows that are trained; the input embedding's where none is named."""
    named = indices if isinstance(indices, Mapping) else {"": indices} if indices else {}
    return tuple((name, _listed(rows)) for name, rows in named.items())


def _optimizer(name: Any) -> str | None:
    return None if name is None else str(getattr(name, "value", name))


def _fused_kernels(cfg: Mapping[str, Any]) -> bool:
    """Axolotl 0.19 turns its LoRA kernels on where a config names none of them."""
    named = [cfg.get(f"lora_{part}_kernel") for part in ("mlp", "qkv", "o", "embedding")]
    if any(value is not None for value in named):
        return bool(named[0])
    return not (cfg.get("rl") or cfg.get("trust_remote_code") or cfg.get("load_in_8bit"))


def _cross_entropy(cfg: Mapping[str, Any]) -> str:
    """Cut cross-entropy is on by default where its plugin is named, Liger's only where asked."""
    plugins = [str(name) for name in cfg.get("plugins") or []]
    cut = cfg.get("cut_cross_entropy")
    if cut or (cut is None and any("CutCrossEntropyPlugin" in name for name in plugins)):
        return "cut"
    return "liger" if cfg.get("liger_fused_linear_cross_entropy") else "plain"
