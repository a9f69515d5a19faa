"""Decoder layers that pruning removed whole: they stay as places, without weights of units.

What the original's layers would have given can be put in the place of the last of them (`given`):
then the layers above see what they see in the original, and their LoRA is the original's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from axolotl_loram.errors import LoRAMError


def replace_whole(build: Callable[..., None], layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Build a layer as large as the original's, and take its matrices away; its norms stay.

    That costs nothing where models are built without their weights, as `from_pretrained` does.
    """
    build(layer, *args, **kwargs)
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if any(weight.ndim > 1 for weight in child.parameters(recurse=False)):
                delattr(module, name)
    layer.given = None  # type: ignore[assignment]
    layer.forward = functools.partial(_forward, layer)


def removed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that hand their input on, in order."""
    return [module for module in model.modules() if hasattr(module, "given")]


def _forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.given is None:
        return hidden_states
    if layer.given.shape != hidden_states.shape:
        raise LoRAMError(
            f"expected hidden states of shape {list(hidden_states.shape)} in the place of removed "
            f"layers, found {list(layer.given.shape)}: they are another batch's"
        )
    # A leaf that wants a gradient where embeddings do: checkpointing (reentrant) goes by that.
    given = layer.given.to(hidden_states.device, hidden_states.dtype)
    return given.requires_grad_(hidden_states.requires_grad)
