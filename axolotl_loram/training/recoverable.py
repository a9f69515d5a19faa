"""Whether what a run is about to train can be recovered in the end: asked before its first step.

What PEFT would save of the model as it stands is held, by names and shapes alone, against all that
recovery, filling and masked merging ask of an adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict

from axolotl_loram.architecture.model import embedding_module
from axolotl_loram.architecture.record import Kind, Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, StoredTensor
from axolotl_loram.recovery.adapter import Adapter, unrecoverable
from axolotl_loram.recovery.fitted import check_free_rows
from axolotl_loram.recovery.merge import check_mergeable
from axolotl_loram.recovery.whole import check_adapter, trained_shapes
from axolotl_loram.training.run import Run


@dataclass(frozen=True)
class _Unwritten(StoredTensor):
    """A tensor that is still to be trained: of the same values as another only if it is that."""

    number: int = 0

    def read(self) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.number, self.bits), self.shape)


def check_recoverable(run: Run, model: Any) -> Adapter:
    """Refuse, before the first step, an adapter that the run could not recover after the last.

    Returns the one that PEFT would write, without values; ZeRO-3 may have sharded the model.

    Raises:
        LoRAMError: Something is trained that PEFT will not save, or saved that is not recovered.
    """
    adapter = adapter_to_be(run, model)
    refusal = unrecoverable(adapter.settings)
    if refusal:
        raise LoRAMError(f"this adapter cannot be recovered: {refusal}")
    unsaved = sorted(trained_shapes(model).keys() - adapter.tensors.keys())
    if unsaved:
        raise LoRAMError(
            f"expected all that is trained to be in the adapter, found {unsaved[0]}, which PEFT "
            f"does not save ({len(unsaved)} such): take it out of unfrozen_parameters, or name its "
            "module in lora_modules_to_save"
        )
    below = f".{embedding_module(run.plan.config)}."
    unseen = [name for name in adapter.tensors if below in name]
    if run.plan.removed and unseen:
        raise LoRAMError(
            f"expected nothing trained below the removed layers, found {unseen[0]}: what they gave "
            "is the original's, whatever the embedding learns; prune inside layers, or leave it out"
        )
    moved = check_adapter(adapter, run.plan, run.pruned, of_run=True)
    if run.fill is not None:
        check_free_rows(moved)
    if run.merges:
        base = Checkpoint(find_folder(run.base.id, run.base.revision))
        check_mergeable(adapter, moved, run.plan, base)
    return adapter


def adapter_to_be(run: Run, model: Any) -> Adapter:
    """The adapter that PEFT would write now, without its values."""
    folder = run.trained
    state = model.state_dict(keep_vars=True)
    held = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    empty = {
        id(value): torch.empty(getattr(value, "ds_shape", value.shape), device="meta")
        for value in held.values()
    }
    shapes = {key: empty[id(value)] for key, value in held.items()}
    saved = get_peft_model_state_dict(model, shapes)
    numbers = {id(value): number for number, value in enumerate(saved.values(), start=1)}
    file = folder / ADAPTER_FILE
    tensors = {
        key: _Unwritten(key, "F32", tuple(value.shape), file, 0, numbers[id(value)])
        for key, value in saved.items()
    }
    settings = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    record = Record(Kind.TRAINED_ADAPTER, run.base, run.plan.digest, masked=run.masked)
    return Adapter(folder, settings, record, Checkpoint(run.pruned), tensors)
