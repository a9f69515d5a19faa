"""How PEFT calls the tensors of an adapter, and what its config names."""

from __future__ import annotations

import re
from pathlib import Path

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.untrusted import read_json

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
PARTNERS = {
    "lora_A.weight": "lora_B.weight",
    "lora_B.weight": "lora_A.weight",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}


def named_model(adapter: Path) -> str:
    """The model that an adapter's config says it is for.

    Raises:
        LoRAMError: It names none.
    """
    found = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(found, str) or not found:
        raise LoRAMError(
            f"expected {adapter / ADAPTER_CONFIG} to name a model as base_model_name_or_path, "
            f"found {found!r}: give the pruned model (--pruned-model)"
        )
    return found


def read_targets(adapter: Path) -> tuple[str, ...]:
    """The parameters that an adapter's config targets beside modules."""
    file = adapter / ADAPTER_CONFIG
    return tuple((read_json(file).get("target_parameters") or ()) if file.exists() else ())


def depth_of(name: str) -> int:
    """How deep a LoRA tensor lies in the wrappers that PEFT puts around one another."""
    return name.count(".base_layer.")


def split_name(name: str) -> tuple[str, str]:
    """``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`` → module, ``lora_A.weight``."""
    path = re.sub(r"\.(base_layer|token_adapter)\b", "", name.removeprefix(PREFIX))
    found = re.fullmatch(r"(.+?)\.(lora_.+)", path)
    return (found[1], found[2]) if found else (path.rpartition(".")[0], path.rpartition(".")[2])
