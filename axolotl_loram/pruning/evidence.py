"""What a criterion may look at, and where its scores go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from axolotl_loram.architecture.config_json import Config, family_of, sizes_of
from axolotl_loram.architecture.model import layer_groups
from axolotl_loram.architecture.spaces import Family, Group, Sizes
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import Work
from axolotl_loram.files.tensors import Checkpoint

if TYPE_CHECKING:
    from axolotl_loram.models.stream import LayerStream
    from axolotl_loram.models.walk import Walk

Scores = Mapping[str, np.ndarray]
"""Kind of unit → scores of one layer, (units,), or (experts, units) of units inside experts."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        work: Where scores go, and hidden states.
        tokens: Calibration token ids int64 (samples, length); None where none are needed.
        stream: Makes the layers to run them through.
    """

    checkpoint: Checkpoint
    config: Config
    layers: list[int]
    work: Work
    seed: int = 0
    tokens: np.ndarray | None = None
    stream: Callable[[], LayerStream] | None = None
    progress: Progress = no_progress
    kinds: frozenset[str] = frozenset()

    @cached_property
    def family(self) -> Family:
        """The declaration of the base's family."""
        return family_of(self.config)

    def sizes(self, layer: int) -> Sizes:
        """Sizes of a layer."""
        return sizes_of(self.config, layer)

    def groups(self, layer: int) -> tuple[Group, ...]:
        """The kinds of unit of a layer that are to be scored."""
        return tuple(g for g in layer_groups(self.config, layer) if g.kind in self.kinds)

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Kind → shape of a layer's scores: (units,), or (experts, units) of units in experts."""
        sizes = self.sizes(layer)
        return {
            group.kind: tuple(sizes[kind] for kind in (group.inside, group.kind) if kind)
            for group in self.groups(layer)
        }

    def has(self, layer: int) -> bool:
        """Whether a layer is scored already."""
        return self.work.has(f"scores-{layer}")

    def save(self, layer: int, scores: Scores) -> None:
        """Keep a layer's scores."""
        as_bits = {k: ("F64", s.astype("<f8").view("u8")) for k, s in scores.items()}
        self.work.save(f"scores-{layer}", as_bits)

    def load(self, layer: int) -> dict[str, np.ndarray]:
        """A layer's scores."""
        stored, _ = self.work.load(f"scores-{layer}")
        return {kind: tensor.read().view("<f8") for kind, tensor in stored.items()}

    def walk(self, stage: str, stop: int, keep: bool = False) -> Walk:
        """A walk of the calibration text through the layers before `stop`."""
        from axolotl_loram.models.walk import Walk

        assert self.stream is not None and self.tokens is not None  # PruningArgs saw to it
        return Walk(self.stream(), self.work, self.tokens, stage, stop, self.progress, keep)
