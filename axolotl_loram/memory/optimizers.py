"""Bytes of optimizer state, by the name that Axolotl has for the optimizer."""

from __future__ import annotations

import math

from axolotl_loram.errors import LoRAMError

STATES = {
    "adamw_torch": (2, 32),
    "adamw_torch_fused": (2, 32),
    "paged_adamw_32bit": (2, 32),
    "adamw_8bit": (2, 8),
    "adamw_bnb_8bit": (2, 8),
    "paged_adamw_8bit": (2, 8),
    "lion_32bit": (1, 32),
    "paged_lion_32bit": (1, 32),
    "lion_8bit": (1, 8),
    "paged_lion_8bit": (1, 8),
    "rmsprop": (1, 32),
    "adagrad": (1, 32),
    "sgd": (0, 32),
}
"""Optimizer → states for each parameter, bits of each.

Paged states are counted as on the device: that is where CUDA moves them to be used, and it moves
them out only when nothing else is left.
"""
SMALLEST_8BIT = 4096
"""Tensors with fewer values keep 32-bit states in bitsandbytes' 8-bit optimizers."""
BLOCK = 256
"""Values that share a float32 scale in an 8-bit state."""


def check_optimizer(name: str) -> None:
    """Refuse an optimizer whose states are not known.

    Raises:
        LoRAMError: It is none of `STATES`.
    """
    if name not in STATES:
        raise LoRAMError(
            f"expected an optimizer whose states the planner knows ({', '.join(STATES)}), found "
            f"{name!r}: plan with the one among them that keeps as many states"
        )


def optimizer_bytes(name: str, values: int, value_bytes: int = 4) -> int:
    """Bytes of the optimizer's states of one tensor, without its step counter.

    Args:
        name: One of `STATES`.
        values: Number of values of the tensor.
        value_bytes: Bytes of each: PyTorch's own states are of the tensor's dtype.
    """
    states, bits = STATES[name]
    if bits == 8 and values >= SMALLEST_8BIT:
        return states * (values + math.ceil(values / BLOCK) * 4)
    return states * values * (4 if "bit" in name else value_bytes)
