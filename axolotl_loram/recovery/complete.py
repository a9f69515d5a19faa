"""Whether the adapter that a run saved is all that it trained.

Each way of sharding saves in its own manner (axolotl 0.19): ZeRO-3 leaves tensors of no elements
where nothing was gathered, and FSDP's sharded saves leave no adapter at all. So what is saved is
held against what the model trained, before anything is recovered from it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.recovery.whole import broken_tensors, is_untrained, untrained_tensors

LOG = logging.getLogger(__name__)
Shape = tuple[int, ...]


def trained_shapes(model: Any, adapter: str = "default") -> dict[str, Shape]:
    """Name, as PEFT saves it → shape of each tensor that a PEFT model is about to train.

    Args:
        model: The PEFT model, before the trainer shards it; ZeRO-3 may have done so already.
        adapter: The name that the adapter has in it.
    """
    shapes = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            saved = name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", "")
            shapes[saved] = tuple(getattr(weight, "ds_shape", weight.shape))
    return shapes


def check_complete(folder: Path, trained: Mapping[str, Shape]) -> None:
    """Refuse a saved adapter that is not all that was trained, or not finite.

    Args:
        folder: With adapter_model.safetensors.
        trained: What `trained_shapes` said.

    Raises:
        LoRAMError: One sentence.
    """
    again = f"the run's checkpoints are in {folder}: go on from the last with other settings"
    try:
        saved = Checkpoint(folder, ADAPTER_FILE)
    except LoRAMError as error:
        raise LoRAMError(f"the adapter was not saved whole: {error}; {again}") from None
    shapes = {name: tensor.shape for name, tensor in saved.tensors.items()}
    lost = [name for name, shape in trained.items() if shapes.get(name) != shape]
    if lost:
        found = shapes.get(lost[0])
        raise LoRAMError(
            f"expected {lost[0]} of shape {list(trained[lost[0]])} in the saved adapter, found "
            f"{'none' if found is None else f'shape {list(found)}'} ({len(lost)} of {len(trained)} "
            f"tensors are not whole): it was not gathered when it was saved, and is not recovered; "
            f"{again}"
        )
    broken = broken_tensors(saved)
    if broken:
        raise LoRAMError(
            f"expected finite weights in the saved adapter, found {broken[0]} infinite or not a "
            f"number ({len(broken)} of {len(shapes)}): training diverged; {again}"
        )
    idle = untrained_tensors(saved)
    if is_untrained(saved):
        LOG.warning(
            "every B of the adapter in %s is zero: it changes nothing, as training did no step at "
            "a learning rate above 0",
            folder,
        )
    elif idle:
        LOG.warning("%d tensors are still all zero, such as %s: not trained", len(idle), idle[0])
