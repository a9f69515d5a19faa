"""Importance of units by what comes into the projections that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture import readers
from axolotl_loram.evidence import Evidence, Scores
from axolotl_loram.spaces import per_unit
from axolotl_loram.streaming import seen_inputs


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


@torch.no_grad()
def score_by_moments(
    evidence: Evidence, energy: Callable[[torch.Tensor, Moments], torch.Tensor]
) -> None:
    """Score units by an energy of each input c, from ‖W_:c‖² (inputs,) and its moments.

    A unit's score is the root of its inputs' energies added up.
    """
    reading = readers(evidence.family)
    walk = evidence.walk("calibration", max(evidence.layers) + 1)
    for index, layer in walk:
        moments = {weight.module: Moments() for weight in reading}
        weights = {w.module: layer.get_submodule(w.module) for w in reading}
        with (
            seen_inputs(layer, list(moments), partial(_take_in, moments)),
            walk.advanced(index, layer),
        ):
            if index in evidence.layers:
                energies = {
                    name: energy(_column_energy(weights[name]), found)
                    for name, found in moments.items()
                }
                evidence.save(index, _fold(evidence, index, energies))


def _take_in(moments: dict[str, Moments], module: str, inputs: torch.Tensor) -> None:
    moments[module].add(inputs)


def _column_energy(module: Any) -> torch.Tensor:
    """‖W_:c‖² of each input c, (inputs,), in float64; 4-bit weights as they compute."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.float().square().sum(0).double()


def _fold(evidence: Evidence, layer: int, energies: Mapping[str, torch.Tensor]) -> Scores:
    """Root of the sum of each unit's energies, over all projections that read it."""
    scores, sizes = {}, evidence.sizes(layer)
    for group in evidence.family.groups:
        found = [
            per_unit(energies[w.module].clamp(min=0).cpu().numpy(), w.dims[1], sizes, group.kind)
            for w in readers(evidence.family)
        ]
        scores[group.kind] = np.sqrt(sum(found))
    return scores
