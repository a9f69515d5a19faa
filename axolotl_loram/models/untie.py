"""Tied embeddings that an adapter changes apart from one another: a merged model holds two."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def untie_adapted(model: Any) -> None:
    """Give the lm_head of a PEFT model a weight of its own, where merging would need one.

    PEFT adapts each of two tied modules, or one of them, by itself; merged into the one weight that
    both have, the model would be another. One that PEFT ties too stays tied.

    Args:
        model: A model with its adapter, before it is merged; its config says afterwards what it is.
    """
    base, settings = model.get_base_model(), model.peft_config["default"]
    parts = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = any(isinstance(part, LoraLayer | ModulesToSaveWrapper) for part in parts)
    inner = [_inner(part) for part in parts if part is not None]
    if not adapted or settings.ensure_weight_tying or len(inner) < 2:
        return
    embedding, head = inner
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def _inner(part: Any) -> Any:
    for name in ("base_layer", "original_module"):
        part = getattr(part, name, part)
    return part
