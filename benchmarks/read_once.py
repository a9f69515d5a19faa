"""Under ZeRO-3 the weights are read once: by global rank 0, from which all ranks get their shares.

transformers 5.16 maps a checkpoint's files into memory on every rank and reads them on rank 0 only,
weight by weight, so that host memory holds them once, as page cache. Where a checkpoint stores
experts one by one, however, every rank first stacks all of them, in memory of its own. The other
ranks need their names and shapes alone, so they stack those. The package does not do this: see
NOTES.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import modeling_utils

LOADER = "_load_state_dict_into_zero3_model"


def read_once() -> None:
    """Let ranks other than the first convert shapes instead of weights, from now on."""
    load = getattr(modeling_utils, LOADER)
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_once(model: Any, state_dict: Mapping[str, Any], *rest: Any, **named: Any) -> Any:
        if torch.distributed.get_rank() != 0:
            state_dict = shapes_of(state_dict, model)
        return load(model, state_dict, *rest, **named)

    setattr(modeling_utils, LOADER, load_once)


def shapes_of(state_dict: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A checkpoint's tensors without their values, buffers excepted, which every rank copies."""
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return {
        name: tensor if name.rpartition(".")[2] in buffers else tensor.to("meta")
        for name, tensor in state_dict.items()
    }
