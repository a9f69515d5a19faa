"""Importance of units by what comes into the projections that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture.model import layer_weights, readers
from axolotl_loram.architecture.spaces import EXPERTS, per_unit
from axolotl_loram.models.stream import seen_inputs, seen_routing
from axolotl_loram.pruning.evidence import Evidence


@dataclass
class Moments:
    """First two moments of a module's inputs, each (features,), in float64.

    Attributes:
        count: Over how many vectors.
        sums: Of them.
        squares: Of them, squared.
        norms: Of what an expert adds, the sum of lengths.
        seen: For how many tokens an expert was chosen.
    """

    count: int = 0
    sums: Any = 0.0
    squares: Any = 0.0
    norms: Any = 0.0
    seen: int = 0

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


def reap(evidence: Evidence) -> None:
    """REAP's (arXiv 2510.13999): mean of g ‖f‖ over the tokens that an expert is chosen for.

    g is the router's weight, f what the expert puts out. Other units as by `activation`.
    """
    score_by_moments(
        evidence,
        lambda norms, moments: norms * moments.squares,
        lambda added: float(added.norms) / max(added.seen, 1),
    )


@torch.no_grad()
def score_by_moments(
    evidence: Evidence,
    energy: Callable[[torch.Tensor, Moments], torch.Tensor],
    of_expert: Callable[[Moments], float] | None = None,
) -> None:
    """Score units by an energy of each input c, from ‖W_:c‖² (inputs,) and its moments.

    A unit's score is the root of its inputs' energies added up. An expert's are those of what it
    adds to the hidden state, each feature as it is, if `of_expert` does not score it by these. A
    neuron's of an expert is that of what down_proj reads, times the router's weight.
    """
    walk = evidence.walk("calibration", max(evidence.layers) + 1)
    for index, layer in walk:
        reading = readers(evidence.config, index)
        moments = {weight.module: Moments() for weight in reading}
        weights = {w.module: layer.get_submodule(w.module) for w in reading}
        kinds = {group.kind for group in evidence.groups(index)}
        count = evidence.sizes(index).get("experts", 0)
        added = [Moments() for _ in range(count)]
        inner = [Moments() for _ in range(count if "expert_neurons" in kinds else 0)]
        stacks = [w.module for w in layer_weights(evidence.config, index) if w.role == EXPERTS]
        routed = kinds & {"experts", "expert_neurons"}
        with (
            seen_inputs(layer, list(moments), partial(_take_in, moments)),
            seen_routing(layer, stacks[0], partial(_take_in_added, added, inner))
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
                if "experts" in kinds:
                    scores["experts"] = np.array([*map(of_expert or _of_expert(energy), added)])
                if inner:
                    stack = layer.get_submodule(stacks[0])
                    scores["expert_neurons"] = np.stack(
                        [_of_neurons(energy, stack, e, own) for e, own in enumerate(inner)]
                    )
                evidence.save(index, scores)


def _take_in(moments: dict[str, Moments], module: str, inputs: torch.Tensor) -> None:
    moments[module].add(inputs)


def _of_expert(energy: Callable[[torch.Tensor, Moments], torch.Tensor]) -> Any:
    ones = torch.ones((), dtype=torch.float64)
    return lambda added: float(torch.as_tensor(energy(ones, added)).clamp(min=0).sum().sqrt())


def _of_neurons(energy: Any, experts: Any, expert: int, seen: Moments) -> np.ndarray:
    """The score of each neuron of an expert, (neurons,); zero where no token came by."""
    down = experts.down_proj[expert].float().square().double()
    norms = down.sum(1 if experts.is_transposed else 0)
    found = torch.as_tensor(energy(norms, seen)).clamp(min=0).sqrt()
    return found.expand(len(norms)).cpu().numpy()


def _read_by_down_proj(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What an expert's down_proj reads of hidden states (tokens, hidden), (tokens, neurons)."""
    up = experts.gate_up_proj[expert]
    projected = hidden @ (up if experts.is_transposed else up.T)
    if experts.has_bias:
        projected = projected + experts.gate_up_proj_bias[expert]
    return experts._apply_gate(projected)


def _take_in_added(
    added: list[Moments],
    inner: list[Moments],
    experts: Any,
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Note what each expert adds to each token's hidden state (nothing, if it is not chosen).

    Where there are `inner` ones, also what its down_proj reads.
    """
    for expert, moments in enumerate(added):
        tokens, place = torch.where(indices == expert)
        if len(tokens):
            chosen = torch.full((len(tokens), 1), expert, device=indices.device)
            output = experts.forward(hidden[tokens], chosen, weights[tokens, place, None])
            moments.add(output)
            moments.norms = moments.norms + output.double().norm(dim=-1).sum()
            moments.seen += len(tokens)
            for own in inner[expert : expert + 1]:
                read = _read_by_down_proj(experts, expert, hidden[tokens])
                own.add(read * weights[tokens, place, None])
        for own in (moments, *inner[expert : expert + 1]):
            own.count += len(hidden) - len(tokens)


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
