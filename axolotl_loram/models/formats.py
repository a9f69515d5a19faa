"""In which format a run keeps the lm_head and the embedding of the pruned model, and why.

bitsandbytes, as Axolotl uses it, quantizes the linear layers inside the decoder. Of a pruned model
the vocabulary's two matrices are then a large part: 4.2 of the 12.3 GB of LLaMA-3.1-70B at 0.85.
Both are frozen in LoRAM, so that they may be kept in fewer bits, and the embedding, of which a step
reads a few rows, in the CPU's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from axolotl_loram.architecture.config_json import Config, family_of, is_tied
from axolotl_loram.architecture.lora_names import is_saved_whole
from axolotl_loram.architecture.spaces import EMBEDDING, HEAD
from axolotl_loram.config import NATIVE, QLORAM
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.zero import zero_stage

LOG = logging.getLogger(__name__)
PARTS = {"lm_head": HEAD, "embedding": EMBEDDING}
"""Part → the role that it has in the declarations."""
FUSED = (
    *("cut_cross_entropy", "liger_fused_linear_cross_entropy"),
    *("dpo_use_liger_kernel", "kd_trainer"),
)
"""Losses that multiply by lm_head.weight themselves, which must be plain numbers then."""


@dataclass(frozen=True)
class Formats:
    """How the two matrices are kept on the way through training.

    Attributes:
        asked: Parts whose format the YAML names: they cannot fall back to another.
    """

    lm_head: str = NATIVE
    embedding: str = NATIVE
    asked: frozenset[str] = frozenset()

    @property
    def small(self) -> dict[str, str]:
        """Part → format, of those that are not native."""
        both = {part: getattr(self, part) for part in PARTS}
        return {part: format for part, format in both.items() if format != NATIVE}

    def without(self, part: str, reason: str) -> Formats:
        """The same with `part` native, and a log line saying why.

        Raises:
            LoRAMError: The YAML asks for its format.
        """
        found = getattr(self, part)
        if part in self.asked:
            raise LoRAMError(
                f"expected `{part}_format: native`, found {found}: {reason}; take "
                f"{part}_format out or make it native"
            )
        LOG.info("keeping the %s in its native format, not %s: %s", part, found, reason)
        native: dict[str, Any] = {part: NATIVE}
        return replace(self, **native)

    def both_or_none(self) -> Formats:
        """For tied embeddings: where one stays native, the other one saves nothing.

        Raises:
            LoRAMError: The YAML asks for the other one's format.
        """
        if len(self.small) != 1:
            return self
        (part,) = self.small
        return self.without(part, "embeddings are tied, and the same matrix stays native anyway")


def choose_formats(section: LoRAMConfig, cfg: Any, config: Config, packed_head: bool) -> Formats:
    """The formats of a run: what the YAML asks for, else what suits it.

    The config is the base's; `packed_head` says whether the checkpoint holds the lm_head in 4 bits.

    Raises:
        LoRAMError: A format is asked for that cannot be had.
    """
    wishes = {part: getattr(section, f"{part}_format") for part in PARTS}
    asked = frozenset(part for part, wish in wishes.items() if wish)
    modules = module_names(config)
    default = QLORAM if cfg.load_in_4bit and modules else dict.fromkeys(PARTS, NATIVE)
    formats = Formats(**{part: wishes[part] or default[part] for part in PARTS}, asked=asked)
    hindrances = dict(hindrances_in(cfg, modules))
    if packed_head:
        _check_packed_head(formats, hindrances)
    for part in formats.small:
        if part in hindrances:
            formats = formats.without(part, hindrances[part])
    return formats.both_or_none() if is_tied(config) else formats


def module_names(config: Config) -> dict[str, str]:
    """Part → what its module is called in the running model, such as ``model.embed_tokens``."""
    weights = {weight.role: weight.module for weight in family_of(config).model}
    return {part: weights[role] for part, role in PARTS.items() if role in weights}


def hindrances_in(cfg: Any, modules: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(part, what in cfg needs it in its native format), as far as cfg tells."""
    for part, module in modules.items():
        if is_saved_whole(module, cfg.lora_modules_to_save):
            yield part, "lora_modules_to_save trains it whole"
        if cfg.peft_trainable_token_indices or cfg.fix_untrained_tokens:
            yield part, "single tokens are trained"
        if is_sharded(cfg):
            yield part, "FSDP and ZeRO-3 shard plain weights"
    if is_targeted(modules.get("embedding", ""), cfg):
        yield "embedding", "lora_target_modules names it"
    for name in fused_losses(cfg):
        yield "lm_head", f"{name} multiplies by its weight itself"


def is_targeted(module: str, cfg: Any) -> bool:
    """Whether PEFT would adapt a module of this path, by names or by a regular expression."""
    chosen = LoraConfig(
        target_modules=cfg.lora_target_modules or [], exclude_modules=cfg.lora_exclude_modules
    )
    return bool(module) and bool(check_target_module_exists(chosen, module))


def fused_losses(cfg: Any) -> list[str]:
    """The settings that fuse lm_head and loss."""
    found = [name for name in FUSED if cfg[name]]
    return found + (["trl.use_liger_loss"] if cfg.trl and cfg.trl.use_liger_loss else [])


def is_sharded(cfg: Any) -> bool:
    """Whether parameters are dealt out to ranks: FSDP, or DeepSpeed at stage 3."""
    return bool(cfg.fsdp or cfg.fsdp_config) or zero_stage(cfg.deepspeed) == 3


def _check_packed_head(formats: Formats, hindrances: Mapping[str, str]) -> None:
    """An lm_head that comes in 4 bits cannot be had in another format.

    Raises:
        LoRAMError: Another is asked for, or needed.
    """
    needed = hindrances.get("lm_head")
    if needed is None and (formats.lm_head == "nf4" or "lm_head" not in formats.asked):
        return
    why = needed or f"lm_head_format is {formats.lm_head}"
    raise LoRAMError(
        f"expected a pruned model with a plain lm_head, because {why}, found one that was pruned "
        "with `quantize: nf4`: prune without it; load_in_4bit quantizes it on loading"
    )


def check_trains_packed(cfg: Any) -> None:
    """Refuse to train a model that comes in 4 bits otherwise than as one: whole, in 4 bits."""
    if not cfg.load_in_4bit:
        raise LoRAMError(
            "expected `adapter: qloram` and `load_in_4bit: true` for a pruned model in 4 bits, "
            "found no load_in_4bit: set them, or prune without quantize"
        )
    if is_sharded(cfg):
        raise LoRAMError(
            "expected one whole model per device for a pruned model in 4 bits, found FSDP or "
            "ZeRO-3, which deal out plain weights: prune without quantize, or use DDP or ZeRO-2"
        )
