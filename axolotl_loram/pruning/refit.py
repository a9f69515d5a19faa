"""Ridge refit: what stays of a projection learns to stand in for what is removed.

Removing units leaves o_proj and down_proj the kept inputs x_S of x. Instead of the kept columns W_S
alone, they get the W' that reproduces W x best on calibration text,

    min over W'  Σ ‖W x − W' x_S‖² + λ ‖W' − W_S‖²,   so   W' = (W G_:S + λ W_S)(G_SS + λ I)⁻¹

with G = Σ x xᵀ. (The usual form shrinks W' towards 0; shrinking it towards W_S makes plain pruning
the limit of a large λ, so that scarce text can only leave the refit without effect.) Layers come in
order, with x from the model as pruned so far, and a refit is kept only where it lowers the error on
sequences that it has not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from axolotl_loram.architecture.model import readers
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import Weight
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import StoredTensor
from axolotl_loram.models.bits import TORCH_DTYPES, to_bits
from axolotl_loram.models.stream import seen_inputs
from axolotl_loram.models.walk import Walk

LOG = logging.getLogger(__name__)
RIDGES = (1e-3, 1e-2, 1e-1)
"""λ to try, in units of the mean of G_SS's diagonal."""
HELD_OUT = 8
"""One sequence in so many is held out."""
Fit = tuple[str, np.ndarray, dict[str, Any]]
"""Tensor name, the fitted weight's bits, and facts: `accepted`, and errors before and after."""
Key = TypeVar("Key")


@torch.no_grad()
def refit(walk: Walk, plan: PruningPlan) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Refit every projection that loses inputs, layer by layer.

    Args:
        walk: Through the base's layers, up to the last that is pruned.
        plan: The plan.

    Returns:
        Tensor name → the refitted weight of the pruned shape, where accepted; and tensor name →
        held-out errors, relative to ‖W x‖², before and after, λ, and whether it was accepted.
    """

    def of_layer(index: int, layer: nn.Module) -> Iterator[Fit]:
        for weight in readers(walk.stream.config, index):
            (kept,) = plan.features(weight.dims[1:], index)
            if kept is not None:
                family = walk.stream.family
                name = family.stored_name(f"{family.layers}.{index}.{weight.module}.weight")
                yield _refit_one(walk, index, layer, weight, torch.from_numpy(kept), name)

    return layer_by_layer(walk, of_layer)


def layer_by_layer(
    walk: Walk, of_layer: Callable[[int, nn.Module], Iterable[Fit]]
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Fit weights of each layer, resumably; the next layers see what became of it.

    Args:
        walk: Through the layers; its stage names what is kept of the work.
        of_layer: Fits weights of a layer, and puts what was chosen into it.

    Returns:
        Tensor name → the fitted weight, where accepted; and tensor name → facts, of all.
    """
    for index, layer in walk:
        arrays, facts = {}, {}
        for name, bits, fact in of_layer(index, layer):
            facts[name] = fact
            if fact["accepted"]:
                arrays[name] = (walk.stream.checkpoint[name].dtype, bits)
        with walk.advanced(index, layer):
            walk.work.save(f"{walk.stage}-{index}", arrays, facts)
    fitted: dict[str, StoredTensor] = {}
    record: dict[str, Any] = {}
    for index in range(walk.stop):
        tensors, facts = walk.work.load(f"{walk.stage}-{index}")
        fitted |= tensors
        record |= facts
    return fitted, record


def _refit_one(
    walk: Walk, index: int, layer: nn.Module, weight: Weight, kept: torch.Tensor, name: str
) -> Fit:
    """Refit one projection and put it, zero where inputs are removed, into the layer."""
    parameter = layer.get_submodule(weight.module).get_parameter("weight")
    kept, whole = kept.to(walk.stream.device), parameter.float()
    fitted, held_out = split(len(walk.tokens))
    inputs = partial(inputs_of, walk, index, layer, weight.module)
    gram = _gram(inputs(fitted), kept, name)
    candidates = {0.0: whole[:, kept]} | solve(whole, gram, kept, name)
    errors = errors_of(inputs(held_out), kept, whole, candidates)
    best = min(errors, key=lambda ridge: (errors[ridge], ridge))
    dtype = walk.stream.checkpoint[name].dtype
    chosen = candidates[best].to(TORCH_DTYPES[dtype])
    parameter.data.zero_()
    parameter.data[:, kept] = chosen.to(parameter.dtype)
    fact = {
        "heldout_error_before": errors[0.0],
        "heldout_error_after": errors[best],
        "ridge": best or None,
        "accepted": best > 0,
    }
    return name, to_bits(chosen, dtype), fact


def split(samples: int) -> tuple[list[int], list[int]]:
    """Sequences to fit on, and sequences to hold out (one in `HELD_OUT`, at least one)."""
    held_out = list(range(HELD_OUT - 1, samples, HELD_OUT)) or [samples - 1]
    return [sample for sample in range(samples) if sample not in set(held_out)], held_out


def solve(
    whole: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, name: str
) -> dict[float, torch.Tensor]:
    """W' for each ridge.

    Args:
        whole: W, (outputs, inputs).
        gram: G_S:, (kept, inputs).
        kept: S, (kept,).
        name: What to call the projection in messages.

    Returns:
        Relative ridge → W', (outputs, kept); empty where the text does not excite the kept inputs.

    Raises:
        LoRAMError: G_S: is not finite: the activations overflow. (Singular at a ridge: a warning,
            and that ridge is left out.)
    """
    square = gram[:, kept]
    scale = square.diagonal().mean()
    if not torch.isfinite(gram).all():
        raise LoRAMError(
            f"expected a finite Gram matrix of the inputs of {name}, found NaN or infinity: its "
            "activations overflow, so use --no-refit or --device cpu"
        )
    if scale <= 0:
        LOG.warning("%s is not refitted: its kept inputs are zero on all calibration text", name)
        return {}
    right, narrow = whole @ gram.T, whole[:, kept]
    solved = {}
    for ridge in RIDGES:
        penalty = ridge * scale
        factor, failed = torch.linalg.cholesky_ex(
            square + penalty * torch.eye(len(kept), device=square.device)
        )
        if failed:
            LOG.warning("the Gram matrix of %s is singular at ridge %g", name, ridge)
            continue
        solved[ridge] = torch.cholesky_solve((right + penalty * narrow).T, factor).T
    return solved


def _gram(batches: Iterator[torch.Tensor], kept: torch.Tensor, name: str) -> torch.Tensor:
    """G_S: = Σ x_S xᵀ / N over all tokens of the inputs, (kept, inputs), float32."""
    gram, count = torch.zeros((), device=kept.device), 0
    for inputs in batches:
        gram = gram + inputs[:, kept].T @ inputs
        count += len(inputs)
    if count < len(kept):
        LOG.warning(
            "the Gram matrix of %s is singular: %d calibration tokens for %d kept inputs; the "
            "ridge carries it, more --calibration-samples would fit better",
            *(name, count, len(kept)),
        )
    return gram / count


def errors_of(
    batches: Iterator[torch.Tensor],
    kept: torch.Tensor,
    whole: torch.Tensor,
    candidates: dict[Key, torch.Tensor],
) -> dict[Key, float]:
    """Σ ‖W x − W' x_S‖² / Σ ‖W x‖² of each candidate on the inputs.

    Args:
        batches: x, (tokens, inputs).
        kept: S, (kept,).
        whole: W, (outputs, inputs).
        candidates: W', each (outputs, kept).
    """
    errors, energy = dict.fromkeys(candidates, 0.0), 0.0
    for inputs in batches:
        wanted, narrow = inputs @ whole.T, inputs[:, kept]
        energy += wanted.square().sum().item()
        for key, candidate in candidates.items():
            errors[key] += (wanted - narrow @ candidate.T).square().sum().item()
    return {key: error / max(energy, 1e-30) for key, error in errors.items()}


class _Seen(Exception):
    """The input that was waited for has been seen: the rest of the layer need not run."""


def inputs_of(
    walk: Walk, index: int, layer: nn.Module, module: str, samples: Sequence[int] | None = None
) -> Iterator[torch.Tensor]:
    """Inputs of one of a layer's modules, (tokens, features) in float32, batch by batch."""
    for batch in walk.batches(samples):
        seen: list[torch.Tensor] = []

        def see(name: str, inputs: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
            seen.append(inputs.reshape(-1, inputs.shape[-1]).float())
            raise _Seen

        hidden = walk.inputs(index).read(batch).to(walk.stream.device)
        with seen_inputs(layer, [module], see), suppress(_Seen):
            walk.stream.run(index, layer, hidden)
        yield seen[0]
