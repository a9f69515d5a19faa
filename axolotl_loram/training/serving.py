"""Whether servers will take the adapter that a run is about to train: asked before its work."""

from __future__ import annotations

import logging
from typing import Any

from axolotl_loram.architecture.config_json import Config
from axolotl_loram.architecture.model import parameters
from axolotl_loram.config_loram import LoRAMConfig, Server
from axolotl_loram.errors import LoRAMError
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.servable import MERGE, Verdict, verdicts
from axolotl_loram.recovery.servers import Subject
from axolotl_loram.training.checkpoints import is_first_rank

LOG = logging.getLogger(__name__)
COMMON: tuple[Server, ...] = ("vllm", "llama.cpp")
"""Those that a warning tells of."""
YAML_KEYS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "peft_use_rslora",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "modules_to_save": "lora_modules_to_save",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "trainable_token_indices": "peft_trainable_token_indices",
}
"""PEFT's setting → Axolotl's."""


def check_yaml(cfg: Any, section: LoRAMConfig, base: Config) -> None:
    """Refuse, before the base is pruned, a YAML whose adapter a server of `serve_with` refuses.

    The YAML is as Axolotl validated it: what it says, not all that PEFT makes of it.
    """
    settings = {name: cfg[key] for name, key in YAML_KEYS.items()}
    if cfg.lora_target_linear:
        named = settings["target_modules"] or []
        linear = {t.module.rpartition(".")[2] for t in parameters(base) if t.linear}
        settings["target_modules"] = [*([named] if isinstance(named, str) else named), *linear]
    _refuse(verdicts(Subject(settings, config=base), section.serve_with or ()))


def check_adapter_to_be(adapter: Adapter, section: LoRAMConfig, base: Config) -> None:
    """Refuse what a server of `serve_with` would not take; warn of other common ones."""
    shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    made = verdicts(Subject(adapter.settings, shapes, base), section.serve_with or COMMON)
    if section.serve_with:
        return _refuse(made)
    refused = [f"{v.server} ({v.because[0]})" for v in made if not v.serves]
    if refused and is_first_rank():
        LOG.warning(
            "this adapter will not be taken as it is by %s; `axolotl-loram inspect ADAPTER "
            "--servable` says more, `serve_with` in loram: makes it an error",
            " and ".join(refused),
        )


def _refuse(made: list[Verdict]) -> None:
    for verdict in made:
        if not verdict.serves:
            raise LoRAMError(
                f"expected an adapter that {verdict.server} takes as it is (`serve_with` in "
                f"loram:), found {verdict.because[0]}{MERGE if verdict.mergeable else ''}"
            )
