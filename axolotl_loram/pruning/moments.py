"""Importance of units by what comes into the projections that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from axolotl_loram.architecture.model import readers
from axolotl_loram.architecture.spaces import per_unit
from axolotl_loram.models.stream import seen_inputs, seen_routing
from axolotl_loram.pruning.evidence import Evidence


@dataclass
class Moments:
    """First two moments of a module's inputs, each (features,), in float64."""

    count: int = 0
    sums: Any = 0.0
    squares: Any = 0.0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in (..., features)."""
        flat = inputs.reshape(-1, inputs.shape[-1]).double()
        self.count += len(flat)
        self.sums = self.sums + flat.sum(0)
        self.squares = self.squares + flat.square().sum(0)

    @property
    def variance(self) -> torch.Tensor:
        """Population variance."""
        return self.squares / self.count - (self.sums / self.count).square()


def activation(evidence: Evidence) -> None:
    """Wanda's (arXiv 2306.11695) per unit: √Σ_c ‖W_:c‖² ‖x_c‖² over inputs c of its reader."""
    score_by_moments(evidence, lambda norms, moments: norms * moments.squares)


def fluctuation(evidence: Evidence) -> None:
    """FLAP's (arXiv 2312.11983): √Σ_c ‖W_:c‖² Var(x_c). What hardly varies is easily replaced.

    FLAP adds the mean of what it removes to a bias; here the refit takes that part.
    """
    score_by_moments(evidence, lambda norms, moments: norms * moments.variance)


@torch.no_grad()
def score_by_moments(
    evidence: Evidence, energy: Callable[[torch.Tensor, Moments], torch.Tensor]
) -> None:
    """Score units by an energy of each input c, from ‖W_:c‖² (inputs,) and its moments.

    A unit's score is the root of its inputs' energies added up. An expert's are those of what it
    adds to the hidden state, each feature as it is.
    """
    walk = evidence.walk("calibration", max(evidence.layers) + 1)
    for index, layer in walk:
        reading = readers(evidence.config, index)
        moments = {weight.module: Moments() for weight in reading}
        weights = {w.module: layer.get_submodule(w.module) for w in reading}
        routed = [g for g in evidence.groups(index) if g.kind == "experts"]
        added = [Moments() for _ in range(evidence.sizes(index).get("experts", 0))]
        with (
            seen_inputs(layer, list(moments), partial(_take_in, moments)),
            seen_routing(layer, routed[0].module, partial(_take_in_added, added))
            if routed
            else nullcontext(),
            walk.advanced(index, layer),
        ):
            if index in evidence.layers:
                energies = {
                    name: energy(_column_energy(weights[name]), found)
                    for name, found in moments.items()
                }
                scores = _fold(evidence, index, energies)
                if routed:
                    ones = torch.ones((), dtype=torch.float64)
                    by_expert = [float(energy(ones, own).clamp(min=0).sum()) for own in added]
                    scores["experts"] = np.sqrt(by_expert)
                evidence.save(index, scores)


def _take_in(moments: dict[str, Moments], module: str, inputs: torch.Tensor) -> None:
    moments[module].add(inputs)


def _take_in_added(
    added: list[Moments],
    experts: nn.Module,
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Note what each expert adds to each token's hidden state (nothing, if it is not chosen)."""
    for expert, moments in enumerate(added):
        tokens, place = torch.where(indices == expert)
        if len(tokens):
            chosen = torch.full((len(tokens), 1), expert, device=indices.device)
            output = experts.forward(hidden[tokens], chosen, weights[tokens, place, None])
            moments.add(output)
        moments.count += len(hidden) - len(tokens)


def _column_energy(module: Any) -> torch.Tensor:
    """‖W_:c‖² of each input c, (inputs,), in float64; 4-bit weights as they compute."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.float().square().sum(0).double()


def _fold(
    evidence: Evidence, layer: int, energies: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Root of the sum of each unit's energies, over all projections that read it."""
    scores, sizes = {}, evidence.sizes(layer)
    for group in evidence.groups(layer):
        found = [
            per_unit(energies[w.module].clamp(min=0).cpu().numpy(), w.dims[1], sizes, group.kind)
            for w in readers(evidence.config, layer)
        ]
        scores[group.kind] = np.sqrt(sum(found))
    return scores
