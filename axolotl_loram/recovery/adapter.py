"""A PEFT LoRA adapter on disk, opened once: its config, its record and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, named_model
from axolotl_loram.architecture.record import Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, StoredTensor
from axolotl_loram.files.untrusted import read_json

EXACT_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Those of PEFT's initializations that leave the base weights as they are, so that BA is all."""


@dataclass(frozen=True)
class Adapter:
    """An adapter whose update is BA on the adapted weights.

    Attributes:
        folder: Where it lies.
        settings: Its adapter_config.json.
        record: Its `loram.json`.
        weights: Its file of tensors.
    """

    folder: Path
    settings: Mapping[str, Any]
    record: Record
    weights: Checkpoint

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
        return cls(folder, settings, Record.load(folder), Checkpoint(folder, ADAPTER_FILE))

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Its tensors by name."""
        return self.weights.tensors

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
            f"init_lora_weights {init!r} changes the base weights when training starts, so BA "
            "alone is not the update: use the default"
        )
    if settings.get("layer_replication"):
        return "layer_replication makes layers that the base has not: train without it"
    if settings.get("bias", "none") != "none":
        return f"expected lora bias 'none', found {settings['bias']!r}: trained biases are not BA"
    return None
