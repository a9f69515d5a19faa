"""Training with LoRA's update confined to the weights that sparse pruning left.

A sparse pruned model has the base's shapes, and zeros. With the mask M = (W ≠ 0) its adapted layers
compute y = x Wᵀ + s · x ((B A) ∘ M)ᵀ, so that the update has the sparsity of the weights.
(B A) ∘ M has no low rank, so it is made, used and dropped block by block of output rows, forward
and again backward: neither it nor the gradient with respect to it is ever there as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant, ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations import is_deepspeed_zero3_enabled

from axolotl_loram.architecture.lora_names import PREFIX
from axolotl_loram.architecture.plan import PruningPlan, mask_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint

BLOCK_ELEMENTS = 1 << 24
"""Most elements of a block of (B A) ∘ M: 64 MB in float32."""


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows with at most BLOCK_ELEMENTS elements each (one row at least)."""
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def pack(support: np.ndarray) -> Tensor:
    """A mask (rows, columns) as 1 bit per weight: uint8 (rows, ⌈columns / 8⌉)."""
    return torch.from_numpy(np.packbits(support, axis=1))


def confined(block: Tensor, mask: Tensor) -> Tensor:
    """Set to zero, in place, what of a block of rows lies where the mask has none.

    Args:
        block: (rows, columns).
        mask: The same rows of the weights themselves, or of what `pack` makes.
    """
    if mask.dtype == torch.uint8:
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
        bits = (mask.unsqueeze(-1) >> shifts) & 1
        mask = bits.flatten(1)[:, : block.shape[1]]
    return block.masked_fill_(mask == 0, 0)


class MaskedUpdate(torch.autograd.Function):
    """x, A, B, M → x ((B A) ∘ M)ᵀ, in the dtype of x, A and B.

    In place of LoRA's thin matrix products it takes one of the layer's own size forward and two
    backward, for the gradients of x and of (B A); it keeps x, A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
        """From x (tokens, in), A (r, in), B (out, r), mask as in `confined`: (tokens, out)."""
        ctx.save_for_backward(x, A, B)
        ctx.mask = mask  # not saved: hooks that offload activations would carry it to and fro
        update = x.new_empty(len(x), len(B))
        for rows in row_blocks(len(B), A.shape[1]):
            update[:, rows] = x @ confined(B[rows] @ A, mask[rows]).T
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to x (where it wants one), A and B."""
        x, A, B = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_A = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32))
        grad_B = torch.empty_like(B)
        for rows in row_blocks(len(B), A.shape[1]):
            if grad_x is not None:
                grad_x.addmm_(grad[:, rows], confined(B[rows] @ A, ctx.mask[rows]))
            grad_BA = confined(grad[:, rows].T @ x, ctx.mask[rows])
            grad_B[rows] = grad_BA @ A.T
            grad_A += B[rows].T @ grad_BA
        return grad_x, grad_A.to(A.dtype), grad_B, None


@torch.no_grad()
def add_update(weight: Tensor, A: Tensor, B: Tensor, scale: float, mask: Tensor | None) -> None:
    """Add scale · (B A) ∘ M to a weight, in place, in float32 (or float64) and block by block.

    Args:
        weight: (out, in).
        A: (r, in).
        B: (out, r).
        scale: LoRA's scaling, negative to take the update away.
        mask: As in `confined`; None for all of B A.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    for rows in row_blocks(*weight.shape):
        update = B[rows].to(wide) @ A.to(wide)
        if mask is not None:
            confined(update, mask[rows])
        weight[rows] = weight[rows].to(wide).add_(update.to(weight.device), alpha=scale)


class MaskedLora(LoraVariant):
    """How PEFT computes one confined LoRA layer; kept in `module.lora_variant`, never saved.

    PEFT's own variants have static methods, and their state in the module. This one has its own.

    Attributes:
        bits: The mask as `pack` makes it, moved to where it is first used; None where the layer's
            own zeros are the mask. No buffer: DDP would broadcast those at every step.
    """

    def __init__(self, bits: Tensor | None) -> None:
        self.bits = bits

    def mask(self, module: Any, device: torch.device) -> Tensor:
        """What `confined` takes for this layer."""
        if self.bits is None:
            return module.get_base_layer().weight
        self.bits = self.bits.to(device)
        return self.bits

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The base layer's result plus the confined update of the (dropped out) input."""
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else A.dtype
        x = module.lora_dropout[active_adapter](x).to(dtype)
        mask, flat = self.mask(module, x.device), x.reshape(-1, x.shape[-1])
        update = MaskedUpdate.apply(flat, A.to(dtype), B.to(dtype), mask)
        bias = module.lora_B[active_adapter].bias
        update = (update if bias is None else update + bias).view(*x.shape[:-1], len(B))
        return result + update * module.scaling[active_adapter]

    def merge_safe(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """A copy of the (dequantized) weight with the update."""
        merged = orig_weight.clone()
        self._add(module, active_adapter, merged, 1)
        return merged

    def merge_unsafe(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> None:
        """Add the update to the weight."""
        self._add(module, active_adapter, orig_weight.data, 1)

    def unmerge(  # type: ignore[override]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """A copy of the weight without the update."""
        restored = orig_weight.data.clone()
        self._add(module, active_adapter, restored, -1)
        return restored

    def _add(self, module: Any, adapter: str, weight: Tensor, sign: int) -> None:
        if self.bits is None:  # once merged, the layer may have other zeros than the mask
            self.bits = pack((weight != 0).cpu().numpy())
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        add_update(weight, A, B, sign * module.scaling[adapter], self.mask(module, B.device))


def confine(
    model: nn.Module, plan: PruningPlan, folder: Path, adapter_name: str = "default"
) -> int:
    """Confine the update of every LoRA layer on a weight made sparse; returns how many there are.

    Args:
        model: PEFT model on the pruned model.
        plan: The pruned model's plan.
        folder: Its folder: the masks are read from there, as a quantized or partitioned layer does
            not show them (NF4 rounds small weights to zero).
        adapter_name: Which adapter.

    Raises:
        LoRAMError: The checkpoint's weights no longer have the zeros that the plan was made with,
            or an update cannot be confined.
    """
    checkpoint, count = Checkpoint(folder), 0
    for path, module in model.named_modules():
        name = f"{path.removeprefix(PREFIX)}.weight"
        if name not in plan.masks or not isinstance(module, LoraLayer):
            continue
        if adapter_name in module.lora_A:
            if isinstance(module, ParamWrapper):
                raise LoRAMError(
                    f"expected LoRA on linear layers with a masked update, found it on {name} as a "
                    "parameter, which PEFT computes without the mask: name the layer in "
                    "target_modules (lora_target_modules) instead of lora_target_parameters"
                )
            support = read_support(checkpoint, plan, name)
            layer: Any = module.get_base_layer()
            own = has_these_zeros(layer.weight, support)
            module.lora_variant[adapter_name] = MaskedLora(None if own else pack(support))
            count += 1
    return count


def read_support(checkpoint: Checkpoint, plan: PruningPlan, name: str) -> np.ndarray:
    """Where a weight of a sparse pruned model is not zero, as bool of its shape.

    Raises:
        LoRAMError: It is no longer where the plan says.
    """
    support = (checkpoint[name].read() << 1) != 0  # without the sign: −0 is a zero
    if mask_digest(support) != plan.masks[name]:
        raise LoRAMError(
            f"expected {name} in {checkpoint.folder} to have the zeros it was pruned to, found "
            "others: the checkpoint was changed after pruning, so prune or download it again"
        )
    return support


def has_these_zeros(weight: Tensor, support: np.ndarray) -> bool:
    """Whether a layer's own weight is there, whole, to be asked for the mask at every step."""
    sharded = is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    plain = type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta
    if sharded or not plain or weight.shape != support.shape:
        return False
    return torch.equal((weight.data != 0).cpu(), torch.from_numpy(support))
