"""How PEFT calls the tensors of an adapter, and what its config names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
ORIGINAL = "original_module.weight"
PARTNERS = {
    "lora_A.weight": "lora_B.weight",
    "lora_B.weight": "lora_A.weight",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}


def named_model(settings: Mapping[str, Any], adapter: Path) -> str:
    """The model that an adapter's config says it is for.

    Raises:
        LoRAMError: It names none.
    """
    found = settings.get("base_model_name_or_path")
    if not isinstance(found, str) or not found:
        raise LoRAMError(
            f"expected {adapter / ADAPTER_CONFIG} to name a model as base_model_name_or_path, "
            f"found {found!r}: give the pruned model (--pruned-model)"
        )
    return found


def is_saved_whole(module: str, named: Iterable[str] | None) -> bool:
    """Whether PEFT (0.20) trains a module whole under such `modules_to_save`: ends of its path."""
    return any(f"{PREFIX}{module}".endswith(name) for name in named or ())


def depth_of(name: str) -> int:
    """How deep a LoRA tensor lies in the wrappers that PEFT puts around one another."""
    return name.count(".base_layer.")


def split_name(name: str) -> tuple[str, str]:
    """``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`` → module, ``lora_A.weight``.

    A module that is saved whole is "weight", also below the wrappers of PEFT. Where the vocabulary
    grew, it saves (0.20) such a module twice, and what it was before as `ORIGINAL`.
    """
    path = re.sub(r"\.(base_layer|token_adapter|modules_to_save)\b", "", name.removeprefix(PREFIX))
    found = re.fullmatch(r"(.+?)\.(lora_.+|original_module\..+)", path)
    return (found[1], found[2]) if found else (path.rpartition(".")[0], path.rpartition(".")[2])
