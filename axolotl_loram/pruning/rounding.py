"""Rounding to 4 bits in which numbers make up for each other's errors (GPTQ, on NF4's values).

QLoRA rounds every number to the nearest of its block's 16 values. Where text is at hand, a weight's
columns are rounded one after the other instead, and what the rounding of a column changes in the
outputs is taken back by the columns that are still to come (arXiv 2210.17323). The result is an
ordinary weight that bitsandbytes rounds to itself, so whatever holds it in NF4, from this
checkpoint or any other, multiplies by exactly these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from axolotl_loram.architecture.model import layer_weights
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import LINEAR
from axolotl_loram.files import nf4
from axolotl_loram.files.tensors import StoredTensor
from axolotl_loram.models.bits import TORCH_DTYPES, from_bits, to_bits
from axolotl_loram.models.packing import Packing
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.refit import Fit, errors_of, inputs_of, layer_by_layer, split
from axolotl_loram.pruning.sparsegpt import BLOCK, input_statistics, inverse_factor

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of a block's largest number: what may become its scale; the one of least error does."""


@torch.no_grad()
def fit_rounding(
    walk: Walk, plan: PruningPlan, replaced: Mapping[str, StoredTensor], packing: Packing
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Round every linear weight of the decoder that will be held in 4 bits, layer by layer.

    Inputs are those of the model as pruned and rounded so far.

    Args:
        walk: Through all of the base's layers.
        plan: The plan.
        replaced: Tensor name → a weight of the pruned shape that takes the gathered one's place.
        packing: Which weights are written in 4 bits, and in what blocks.

    Returns:
        `replaced` with the rounded weights that are nearer than the nearest numbers on sequences
        that they were not fitted on; and tensor name → those errors, relative to ‖W x‖², before
        and after, and whether it was accepted.
    """

    def of_layer(index: int, layer: nn.Module) -> Iterator[Fit]:
        if index not in plan.removed:
            yield from _rounded(walk, index, layer, plan, replaced, packing)

    rounded, record = layer_by_layer(walk, of_layer)
    return {**replaced, **rounded}, record


def _rounded(
    walk: Walk,
    index: int,
    layer: nn.Module,
    plan: PruningPlan,
    replaced: Mapping[str, StoredTensor],
    packing: Packing,
) -> Iterator[Fit]:
    """A layer's weights, pruned and rounded in the layer too.

    The layer stays of the base's width, with zeros where something is removed.
    """
    family, stored, device = walk.stream.family, walk.stream.checkpoint, walk.stream.device
    weights = {}
    for weight in layer_weights(walk.stream.config, index):
        name = family.stored_name(f"{family.layers}.{index}.{weight.module}.weight")
        if weight.role != LINEAR or name not in packing.weights:
            continue
        wide = layer.get_submodule(weight.module).get_parameter("weight")
        features = plan.features(weight.dims, index)
        rows, columns = (
            (torch.arange(size) if kept is None else torch.from_numpy(kept).long()).to(device)
            for size, kept in zip(wide.shape, features, strict=True)
        )
        place = rows[:, None], columns
        new = replaced.get(name)
        narrow = wide[place] if new is None else from_bits(new.read(), new.dtype).to(wide)
        wide.data.zero_()
        wide[place] = narrow
        weights[weight.module] = name, wide, place
    fitted, held_out = split(len(walk.tokens))
    grams = input_statistics(walk, index, layer, list(weights), True, fitted)
    chosen = []
    for module, (name, wide, place) in weights.items():
        (rows, columns), dtype = place, stored[name].dtype
        narrow, how = wide[place].float(), (packing.block, TORCH_DTYPES[dtype])
        gram = grams.pop(module)
        gram = gram if len(columns) == len(gram) else gram[columns][:, columns]
        nearest, fit = nearest_nf4(narrow, *how), round_to_nf4(narrow, gram, *how, name)
        inputs, whole = inputs_of(walk, index, layer, module, held_out), wide[rows[:, 0]].float()
        errors = errors_of(inputs, columns, whole, {"nearest": nearest, "fit": fit})
        accepted = errors["fit"] < errors["nearest"]
        chosen.append((wide, place, (fit if accepted else nearest).to(wide.dtype)))
        fact = {
            "heldout_error_before": errors["nearest"],
            "heldout_error_after": min(errors.values()),
            "accepted": accepted,
        }
        yield name, to_bits(fit.to(how[1]), dtype), fact
    for wide, place, rounded in chosen:  # all of a layer have seen it as it was
        wide[place] = rounded


def round_to_nf4(
    weight: torch.Tensor,
    gram: torch.Tensor,
    block: int = nf4.BLOCK,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "",
) -> torch.Tensor:
    """Numbers that NF4 holds exactly, such that W x changes little.

    Args:
        weight: W (outputs, inputs), float32.
        gram: Σ x xᵀ (inputs, inputs), float32.
        block: Numbers that share a scale, counted through the rows.
        dtype: What the result will be stored in: scales are numbers of it.
        name: What to call W in messages.

    Raises:
        LoRAMError: The Gram matrix is singular, or not finite.
    """
    scale, ends = scales(weight, block, dtype)
    code, middles = code_of(weight.device)
    upper = inverse_factor(gram, gram.diagonal() == 0, name)
    weight, result = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        part, factor = weight[:, start:stop], upper[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for column in range(stop - start):
            own, size, end = part[:, column], scale[:, start + column], ends[:, start + column]
            nearest = code[torch.bucketize(own / size, middles)]
            rounded = torch.where(end != 0, end, nearest) * size
            errors[:, column] = (own - rounded) / factor[column, column]
            part[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
            result[:, start + column] = rounded
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


def nearest_nf4(weight: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes makes of a weight, but for its rounding of the scales."""
    code, middles = code_of(weight.device)
    scale, _ = scales(weight, block, dtype, shares=(1.0,))
    return code[torch.bucketize(weight / scale, middles)] * scale


def code_of(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4's values from -1 to 1, (16,), and what lies in the middle of each two, (15,)."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type("nf4", device=device)
    return code, (code[1:] + code[:-1]) / 2


def scales(
    weight: torch.Tensor, block: int, dtype: torch.dtype, shares: tuple[float, ...] = SHARES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each number, (outputs, inputs): its scale; and ±1 where it gives its block that, else 0.

    A block's largest number has to stay at the end of the scale: bitsandbytes finds it by that.
    """
    code, middles = code_of(weight.device)
    numbers = weight.numel()
    padding = -numbers % block
    blocks = torch.nn.functional.pad(weight.flatten(), (0, padding)).view(-1, block)
    largest, place = blocks.abs().max(1)
    best, found = torch.full_like(largest, torch.inf), largest
    for share in shares:
        scale = (largest * share).to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        nearest = code[torch.bucketize(blocks / scale[:, None], middles)] * scale[:, None]
        error = (nearest - blocks).square().sum(1)
        found = torch.where(error < best, scale, found)
        best = torch.minimum(best, error)
    ends = torch.zeros_like(blocks)
    ends.scatter_(1, place[:, None], blocks.gather(1, place[:, None]).sign())
    whole = found[:, None].expand_as(blocks)
    return tuple(x.flatten()[:numbers].view_as(weight) for x in (whole, ends))  # type: ignore
