"""Bytes of optimizer state, by the name that Axolotl has for the optimizer."""

from __future__ import annotations

import math

from axolotl_loram.errors import LoRAMError

STATES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adopt_adamw", "adamc"), (2, "own")),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), (2, "own")),
    "schedule_free_sgd": (1, "own"),
    "paged_adamw_32bit": (2, "32"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, "8")),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), (1, "32")),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), (1, "8")),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), (3, "32")),
    "adamw_torch_8bit": (2, "torchao 8"),
    "adamw_torch_4bit": (2, "torchao 4"),
    "ao_adamw_fp8": (2, "torchao fp8"),
    "rmsprop": (1, "own"),
    "rmsprop_bnb_32bit": (1, "32"),
    "rmsprop_bnb": (1, "32"),
    "rmsprop_bnb_8bit": (1, "8"),
    "adagrad": (1, "own"),
    "adafactor": (1, "factored"),
    "sgd": (0, "own"),
}
"""Optimizer → states for each parameter, how each is kept: "own" in the parameter's dtype, "32" and
"8" as bitsandbytes does, "torchao …" as torchao does, "factored" as sums of rows and columns.

Paged states are counted as on the device: that is where CUDA moves them to be used, and it moves
them out only when nothing else is left.
"""
AS_ADAMW = (
    *("adamw_anyprecision", "adamw_torch_xla", "adamw_torch_npu_fused", "ademamix_8bit"),
    *("paged_ademamix_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
    *("lomo", "adalomo", "grokadamw", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw"),
    *("optimi_adamw", "came_pytorch", "muon", "dion", "sinkgd", "polora", "q_galore_adamw8bit"),
    *("flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion"),
    *("ao_adamw_4bit", "ao_adamw_8bit"),
)
"""Optimizers that Axolotl has and that are counted as `adamw_torch`, which is said."""
SMALLEST_8BIT = 4096
"""Tensors with fewer values keep full states in bitsandbytes' and torchao's optimizers."""
BLOCK = 256
"""Values that share a float32 scale in a quantized state."""
FLOAT32 = 4
TORCHAO = {"torchao 8": (8, 256), "torchao 4": (4, 16), "torchao fp8": (8, 0)}
"""How torchao keeps a state → bits of a value, and entries of the state's own float32 table."""


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that Axolotl does not have."""
    if name not in STATES and name not in AS_ADAMW:
        raise LoRAMError(
            f"expected an optimizer whose states the planner knows ({', '.join(STATES)}), found "
            f"{name!r}: plan with the one among them that keeps as many states"
        )


def optimizer_bytes(name: str, shape: tuple[int, ...], value_bytes: int = FLOAT32) -> int:
    """Bytes of the optimizer's states of one tensor, without its step counter.

    Args:
        name: One of `STATES`; one of `AS_ADAMW` counts as adamw_torch.
        shape: Of the tensor.
        value_bytes: Bytes of each value: PyTorch's own states are of the tensor's dtype.
    """
    states, kept = STATES.get(name, STATES["adamw_torch"])
    values = math.prod(shape)
    if kept == "factored" and len(shape) > 1:
        return FLOAT32 * (math.prod(shape[:-1]) + values // shape[-2])
    if kept == "8" and values >= SMALLEST_8BIT:
        return states * (values + math.ceil(values / BLOCK) * FLOAT32)
    if kept in TORCHAO and values >= SMALLEST_8BIT and values % BLOCK == 0:
        bits, table = TORCHAO[kept]
        return states * (values * bits // 8 + (values // BLOCK + table) * FLOAT32)
    full = FLOAT32 if kept in ("32", "8", "factored") else value_bytes
    return states * values * full
