"""A PEFT LoRA adapter on disk, opened once: its config, its record and its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.config_json import Config
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, PREFIX, named_model
from axolotl_loram.architecture.record import Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, StoredTensor
from axolotl_loram.files.untrusted import check_types, read_json
from axolotl_loram.recovery.older import of_today

EXACT_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Those of PEFT's initializations that leave the base weights as they are, so that BA is all."""
UNDERSTOOD = {
    *("alpha_pattern", "auto_map", "auto_mapping", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_bias", "megatron_config", "modules_to_save"),
    *("rank_pattern", "target_modules", "target_parameters", "trainable_token_indices"),
    "use_rslora",
}
"""What PEFT's config of LoRA can switch on, or give settings of, and the update still is BA."""
NAMES = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")
PATTERNS = ("rank_pattern", "alpha_pattern")
NOTHING = type(None)
TYPES: dict[str, type | tuple] = {
    **dict.fromkeys(NAMES[:2], (list, str, NOTHING)),
    **dict.fromkeys(NAMES[2:], (list, NOTHING)),
    **dict.fromkeys(PATTERNS, (dict, NOTHING)),
    **dict.fromkeys(("use_rslora", "ensure_weight_tying"), (bool, NOTHING)),
    **{"r": int, "lora_alpha": (int, float), "layers_to_transform": (list, int, NOTHING)},
}
"""What of an adapter's config is read here, or by PEFT on our account."""


@dataclass(frozen=True)
class Adapter:
    """An adapter whose update is BA on the adapted weights."""

    folder: Path
    settings: Mapping[str, Any]
    record: Record
    weights: Checkpoint
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path | Adapter) -> Adapter:
        """Read config, record and the header of the tensors; an open adapter stays as it is.

        Raises:
            LoRAMError: There is no adapter, or one whose recovery is not exact.
        """
        if isinstance(folder, Adapter):
            return folder
        if not (folder / ADAPTER_CONFIG).exists():
            raise LoRAMError(
                f"expected a PEFT adapter with {ADAPTER_CONFIG} in {folder}, found none: give the "
                "folder that training wrote, such as output_dir/pruned or a checkpoint in it"
            )
        settings = read_json(folder / ADAPTER_CONFIG)
        refusal = unrecoverable(settings)
        if refusal:
            raise LoRAMError(f"{folder} cannot be recovered: {refusal}")
        check_settings(settings, folder / ADAPTER_CONFIG)
        weights = Checkpoint(folder, ADAPTER_FILE)
        check_names(weights)
        return cls(folder, settings, Record.load(folder), weights, weights.tensors)

    def of_today(self, config: Config) -> Adapter:
        """The adapter with its modules called, and stacked, as they are today, as PEFT loads it.

        Raises:
            LoRAMError: A tensor is there under both names, or single experts have LoRA that is
                none of their stack.
        """
        tensors, settings = of_today(self.tensors, self.settings, config)
        return replace(self, tensors=tensors, settings=settings)

    @property
    def model(self) -> str:
        """The model that its config says it is for.

        Raises:
            LoRAMError: It names none.
        """
        return named_model(self.settings, self.folder)

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """The parameters that its config targets beside modules."""
        return tuple(self.settings.get("target_parameters") or ())


def unrecoverable(settings: Mapping[str, Any]) -> str | None:
    """Why an adapter with this PEFT config cannot be recovered exactly; None if it can."""
    init = settings.get("init_lora_weights", True)
    if settings.get("peft_type", "LORA") != "LORA":
        return f"expected peft_type LORA, found {settings['peft_type']}, whose update is not BA"
    if settings.get("use_dora"):
        return (
            "DoRA rescales each row of W₀ + BA by its norm, which differs between pruned and "
            "original rows: train without peft_use_dora"
        )
    if init not in EXACT_INITS:
        return (
            f"init_lora_weights {init!r} is none of {EXACT_INITS}, which leave the base weights as "
            "they are, so BA alone may not be the update: use the default"
        )
    if settings.get("layer_replication"):
        return "layer_replication makes layers that the base has not: train without it"
    if settings.get("bias", "none") != "none":
        return f"expected lora bias 'none', found {settings['bias']!r}: trained biases are not BA"
    on = {name for name, said in settings.items() if said and isinstance(said, bool | dict | list)}
    variants = sorted(on - UNDERSTOOD)
    if variants:
        return (
            f"expected plain LoRA, found {variants[0]} in its config, which may make the update "
            "another than BA: train without it"
        )
    return None


def check_settings(settings: Mapping[str, Any], where: Path) -> None:
    """Refuse an adapter's config in which something is of another type, or no finite number."""
    check_types(settings, TYPES, where)
    for name in NAMES:
        named = settings.get(name)
        if isinstance(named, list) and not all(isinstance(part, str) for part in named):
            raise LoRAMError(f"expected names in {name} of {where}, found {str(named)[:80]}")
    patterns = {name: settings.get(name) or {} for name in PATTERNS}
    patterns["lora_alpha"] = {"": settings.get("lora_alpha", 0)}
    for name, numbers in patterns.items():
        for expression, number in numbers.items():
            _check_expression(expression, f"{name} of {where}")
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise LoRAMError(
                    f"expected finite numbers in {name} of {where}, found {number!r:.80}: the file "
                    "is damaged"
                )


def _check_expression(expression: str, where: str) -> None:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise LoRAMError(
            f"expected regular expressions in {where}, found {expression[:80]!r} ({error}): the "
            "file is damaged"
        ) from None


def check_names(weights: Checkpoint) -> None:
    """Refuse tensors under names that PEFT would pass over when it loads the adapter."""
    for name in weights.tensors:
        if not name.startswith(PREFIX):
            raise LoRAMError(
                f"expected names of tensors that begin with {PREFIX}, as PEFT's save_pretrained "
                f"writes them, found {name} in {weights.folder}, which PEFT would not load: save "
                "the adapter again by that"
            )
        if re.search(r"\.lora_(A|B)\.(?!weight$|bias$)|\.lora_embedding_(A|B)\.", name):
            raise LoRAMError(
                f"expected names of tensors as PEFT's save_pretrained writes them, found {name} in "
                f"{weights.folder}, with the adapter's own name in it as in model.state_dict(), "
                "which PEFT would not load: save the adapter again by save_pretrained"
            )
