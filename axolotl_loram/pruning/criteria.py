"""The criteria by which units are kept, behind one interface: evidence in, scores out.

A criterion is a function that saves, for each layer that it is asked about, a score for every unit;
the higher the score, the later the unit is removed. It may read the checkpoint, and run calibration
text through the layers one at a time (those import torch only when they are called).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from axolotl_loram.architecture.model import Tensor, tensors
from axolotl_loram.pruning.evidence import Evidence
from axolotl_loram.pruning.importance import magnitude_scores, random_scores


def random(evidence: Evidence) -> None:
    """Any unit is as good as another."""
    for layer in evidence.layers:
        scores = {
            group.kind: random_scores(
                evidence.scores_shape(layer, group), evidence.seed, layer, group.kind
            )
            for group in evidence.groups(layer)
        }
        evidence.save(layer, scores)


def magnitude(evidence: Evidence) -> None:
    """Σ w² over all weights that go with the unit (group L2, LLM-Pruner's `l2`)."""
    members: dict[int | None, list[Tensor]] = {}
    for tensor in tensors(evidence.config):
        members.setdefault(tensor.layer, []).append(tensor)
    jobs = [
        (layer, group, [t for t in members[layer] if group.kind in t.kinds])
        for layer in evidence.layers
        for group in evidence.groups(layer)
    ]
    stored = evidence.checkpoint
    total = sum(stored[t.name].nbytes for _, _, job in jobs for t in job)
    done, found = evidence.progress(total, "scoring", "B"), {}
    for layer, group, job in jobs:
        if evidence.has(layer):
            done(sum(stored[t.name].nbytes for t in job))
            continue
        pairs = [(tensor, stored[tensor.name]) for tensor in job]
        shape = evidence.scores_shape(layer, group)
        found[group.kind] = magnitude_scores(pairs, group.kind, done, shape)
        if len(found) == len(evidence.groups(layer)):
            evidence.save(layer, found)
            found = {}


def activation(evidence: Evidence) -> None:
    """Wanda's (arXiv 2306.11695) per unit: √Σ_c ‖W_:c‖² ‖x_c‖² over inputs c of its reader."""
    from axolotl_loram.pruning.moments import score_by_moments

    score_by_moments(evidence, lambda norms, moments: norms * moments.squares)


def fluctuation(evidence: Evidence) -> None:
    """FLAP's (arXiv 2312.11983): √Σ_c ‖W_:c‖² Var(x_c). What hardly varies is easily replaced.

    FLAP adds the mean of what it removes to a bias; here the refit takes that part.
    """
    from axolotl_loram.pruning.moments import score_by_moments

    score_by_moments(evidence, lambda norms, moments: norms * moments.variance)


def taylor(evidence: Evidence) -> None:
    """LLM-Pruner's first order: what the loss changes by when the unit is masked."""
    from axolotl_loram.pruning.taylor import score_by_gradients

    score_by_gradients(evidence)


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        score: Saves the scores of each layer.
        comparable: Whether scores of different layers mean the same as they are; others are
            standardized within each layer before layers compete.
    """

    score: Callable[[Evidence], None]
    comparable: bool = False


CRITERIA: Mapping[str, Criterion] = {
    "random": Criterion(random),
    "magnitude": Criterion(magnitude),
    "activation": Criterion(activation),
    "fluctuation": Criterion(fluctuation),
    "taylor": Criterion(taylor, comparable=True),
}
