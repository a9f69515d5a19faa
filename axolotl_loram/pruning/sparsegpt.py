"""Sparse weights by what comes into them: Wanda and SparseGPT, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from axolotl_loram.architecture.counts import Sparsity, pattern_of, removed_of
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.bits import TORCH_DTYPES, to_bits
from axolotl_loram.models.stream import seen_inputs
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.evidence import Evidence
from axolotl_loram.pruning.sparse import linear_weights, save_sparse

LOG = logging.getLogger(__name__)
BLOCK = 128
"""Columns that SparseGPT prunes before it corrects the ones to their right."""
DAMPINGS = (0.01, 0.1, 1.0)
"""Added to the Gram matrix's diagonal, in units of its mean; the first that can be inverted."""


def by_wanda(evidence: Evidence, sparsity: Sparsity) -> None:
    """`wanda` of every linear weight."""
    _by_inputs(evidence, sparsity, lambda *given: wanda(*given[:3]), full=False)


def by_sparsegpt(evidence: Evidence, sparsity: Sparsity) -> None:
    """`sparsegpt` of every linear weight."""
    _by_inputs(evidence, sparsity, sparsegpt, full=True)


@torch.no_grad()
def _by_inputs(evidence: Evidence, sparsity: Sparsity, prune: Callable, full: bool) -> None:
    """Layer by layer, on inputs from the model as sparse so far; `full` as `input_statistics`'."""
    if all(evidence.work.has(f"sparse-{layer}") for layer in evidence.layers):
        return
    walk = evidence.walk("sparsifying", max(evidence.layers) + 1)
    for index, layer in walk:
        arrays = {}
        if index in evidence.layers:
            names = linear_weights(evidence, index)
            statistics = input_statistics(walk, index, layer, list(names), full)
            for module, name in names.items():
                parameter = layer.get_submodule(module).get_parameter("weight")
                dtype = evidence.checkpoint[name].dtype
                pruned = prune(parameter.float(), statistics[module], sparsity, name)
                rounded = pruned.to(TORCH_DTYPES[dtype])
                arrays[name] = (dtype, to_bits(rounded, dtype))
                parameter.data.copy_(rounded)
        with walk.advanced(index, layer):
            if arrays:
                save_sparse(evidence.work, index, arrays)


def wanda(weight: torch.Tensor, squares: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Zero the least |W_ij| ‖x_j‖ of each output row (arXiv 2306.11695).

    Args:
        weight: W (outputs, inputs), float32.
        squares: ‖x_j‖² of each input, (inputs,).
        sparsity: Share or pattern.
    """
    scores = weight.abs() * squares.sqrt()
    return weight.masked_fill(lowest(scores, sparsity), 0.0)


def lowest(scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Where the lowest scores (rows, columns) of each row, or of each group of M, are."""
    pattern = pattern_of(sparsity)
    rows = scores if pattern is None else scores.reshape(-1, pattern[1])
    count = removed_of(rows.shape[1], sparsity) if pattern is None else pattern[1] - pattern[0]
    chosen = rows.argsort(dim=1, stable=True)[:, :count]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.view(scores.shape)


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, sparsity: Sparsity, name: str = ""
) -> torch.Tensor:
    """SparseGPT (arXiv 2301.00774): zero a weight, and let those to its right make up for it.

    Args:
        weight: W (outputs, inputs), float32.
        gram: Σ x xᵀ (inputs, inputs), float32.
        sparsity: Share, chosen within blocks of `BLOCK` inputs, or pattern.
        name: What to call W in messages.
    """
    pattern = pattern_of(sparsity)
    dead = gram.diagonal() == 0
    weight = weight.masked_fill(dead, 0.0)
    upper = inverse_factor(gram, dead, name)
    size = BLOCK if pattern is None else max(1, BLOCK // pattern[1]) * pattern[1]
    for start in range(0, weight.shape[1], size):
        stop = min(start + size, weight.shape[1])
        block, factor = weight[:, start:stop], upper[start:stop, start:stop]
        errors = _prune_block(block, factor, sparsity)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def _prune_block(block: torch.Tensor, factor: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Prune a block of columns in place; returns the errors that those to the right make up."""
    pattern, diagonal = pattern_of(sparsity), factor.diagonal()
    errors = torch.zeros_like(block)
    mask = torch.zeros_like(block, dtype=torch.bool)
    if pattern is None:
        scores = (block / diagonal).square().reshape(1, -1)
        mask = lowest(scores, sparsity).view(block.shape)
    for column in range(block.shape[1]):
        if pattern and column % pattern[1] == 0:
            group = slice(column, column + pattern[1])
            mask[:, group] = lowest((block[:, group] / diagonal[group]).square(), sparsity)
        removed = torch.where(mask[:, column], block[:, column], 0.0)
        errors[:, column] = removed / diagonal[column]
        block[:, column:] -= errors[:, column, None] * factor[column, column:]
        block[mask[:, column], column] = 0.0
    return errors


def inverse_factor(gram: torch.Tensor, dead: torch.Tensor, name: str) -> torch.Tensor:
    """Upper Cholesky factor of (G + damping)⁻¹, inputs that are always zero left out of it.

    Raises:
        LoRAMError: Singular even with the largest damping, or not finite.
    """
    scale = torch.where(dead, 1.0, gram.diagonal()).mean()
    for damping in DAMPINGS:
        damped = gram.clone()  # no more than three such matrices at a time: they can take 3 GB each
        damped.diagonal().add_(dead + damping * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(factor.diagonal()).all():
            del damped
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        LOG.warning("the Gram matrix of %s is singular with damping %g", name, damping)
    raise LoRAMError(
        f"expected the Gram matrix of the inputs of {name} to be invertible, found it singular "
        f"with damping {DAMPINGS[-1]}: use more --calibration-samples"
    )


def input_statistics(
    walk: Walk,
    index: int,
    layer: nn.Module,
    modules: list[str],
    full: bool,
    samples: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Module → Σ x xᵀ of its inputs (or only the diagonal), float32; shared where inputs are.

    q, k and v read the same tensor, as do gate and up: it is accumulated once.
    """
    leaders: dict[str, str] = {}
    found: dict[str, torch.Tensor] = {}
    alive: list[tuple[str, torch.Tensor]] = []

    def see(name: str, inputs: torch.Tensor) -> None:
        if name not in leaders:
            leaders[name] = next((other for other, seen in alive if seen is inputs), name)
            alive.append((name, inputs))
        if leaders[name] == name:
            flat = inputs.reshape(-1, inputs.shape[-1]).float()
            new = flat.T @ flat if full else flat.square().sum(0)
            found[name] = found[name] + new if name in found else new

    with seen_inputs(layer, modules, see):
        for _ in walk.run(index, layer, samples):
            alive.clear()
    return {name: found[leader] for name, leader in leaders.items()}
