"""By what units or weights go: one row each, from which settings, help and pruning all follow.

Their code is named, not imported, so that the command line answers without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Criterion:
    """A way to prune.

    Attributes:
        units: "module:function" that scores whole units: it takes the `Evidence`, and saves for
            each of its layers a score for every unit; the higher, the later the unit goes.
        weights: "module:function" that zeros single weights: it takes the `Evidence` and the
            sparsity, and keeps each of its layers' sparse weights (`save_sparse`).
        about: How units are scored, for the help.
        calibrated: Whether calibration text is run through the layers.
        comparable: Whether scores of different layers mean the same as they are; others are
            standardized within each layer before layers compete.
        keeps_states: Whether hidden states of all layers lie on disk at once, or of two.
        inside: Whether neurons of each expert are scored, too.
    """

    units: str | None = None
    weights: str | None = None
    about: str = ""
    calibrated: bool = False
    comparable: bool = False
    keeps_states: bool = False
    inside: bool = True

    def score(self, evidence: Any) -> None:
        """Save the scores of units."""
        resolve_name(str(self.units))(evidence)

    def zero(self, evidence: Any, sparsity: float | str) -> None:
        """Save weights of which a share, or all but N of each M, are zero."""
        resolve_name(str(self.weights))(evidence, sparsity)


CRITERIA = {
    "random": Criterion("axolotl_loram.pruning.importance:random"),
    "magnitude": Criterion(
        "axolotl_loram.pruning.importance:magnitude",
        "axolotl_loram.pruning.sparse:magnitude",
        "group L2 norm",
    ),
    "activation": Criterion(
        "axolotl_loram.pruning.moments:activation",
        about="Wanda: norm of the weights times norm of the inputs",
        calibrated=True,
    ),
    "fluctuation": Criterion(
        "axolotl_loram.pruning.moments:fluctuation",
        about="FLAP: variance of the inputs",
        calibrated=True,
    ),
    "reap": Criterion(
        "axolotl_loram.pruning.moments:reap",
        about="REAP: an expert's output norm times its router weight, on average; else activation",
        calibrated=True,
    ),
    "taylor": Criterion(
        "axolotl_loram.pruning.taylor:taylor",
        about="LLM-Pruner: first-order change of the loss",
        calibrated=True,
        comparable=True,
        keeps_states=True,
        inside=False,
    ),
    "wanda": Criterion(weights="axolotl_loram.pruning.sparsegpt:by_wanda", calibrated=True),
    "sparsegpt": Criterion(weights="axolotl_loram.pruning.sparsegpt:by_sparsegpt", calibrated=True),
}
