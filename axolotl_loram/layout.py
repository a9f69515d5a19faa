"""A model's tensors as the planner sees them: the parts they are, and layers that are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from axolotl_loram.architecture import Config, Tensor, tensors
from axolotl_loram.spaces import Sizes

Part = Literal["embedding", "lm_head", "linears", "norms", "biases", "other"]
"""What a tensor is to whoever quantizes the model."""

PARTS: tuple[Part, ...] = ("embedding", "lm_head", "linears", "norms", "biases", "other")


def part_of(tensor: Tensor) -> Part:
    """What `tensor` is. bitsandbytes replaces linear modules, inside the layers: "linears"."""
    if tensor.name.endswith(".bias"):
        return "biases"
    if tensor.layer is None and any(s.block == ("vocabulary",) for s in tensor.dims[0]):
        return "embedding" if "emb" in tensor.module else "lm_head"
    if len(tensor.dims) == 1 and "norm" in tensor.module:
        return "norms"
    return "linears" if tensor.layer is not None and len(tensor.dims) == 2 else "other"


@dataclass(frozen=True)
class Layer:
    """Decoder layers that are alike.

    Attributes:
        tensors: Those of the first of them.
        count: How many there are.
    """

    tensors: tuple[Tensor, ...]
    count: int = 1

    @property
    def sizes(self) -> Sizes:
        """Sizes that the layer's spaces are made of."""
        return self.tensors[0].sizes

    @property
    def linears(self) -> tuple[Tensor, ...]:
        """Weights of linear modules."""
        return tuple(tensor for tensor in self.tensors if part_of(tensor) == "linears")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.sizes["kv_groups"] * self.sizes["queries"]


@dataclass(frozen=True)
class Layout:
    """A model's tensors.

    Attributes:
        outside: Tensors outside the layers.
        layers: Layers, each kind once, by first appearance.
    """

    outside: tuple[Tensor, ...]
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, config: Config) -> Layout:
        """The layout of a model with this config."""
        outside: list[Tensor] = []
        found: dict[int, list[Tensor]] = {}
        for tensor in tensors(config):
            own = outside if tensor.layer is None else found.setdefault(tensor.layer, [])
            own.append(tensor)
        alike: dict[object, list[Tensor]] = {}
        counts: dict[object, int] = {}
        for index, own in found.items():
            names = tuple(tensor.name.partition(f".{index}.")[2] for tensor in own)
            key = (names, *sorted(own[0].sizes.items()))
            alike.setdefault(key, own)
            counts[key] = counts.get(key, 0) + 1
        layers = tuple(Layer(tuple(own), counts[key]) for key, own in alike.items())
        return cls(tuple(outside), layers)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(layer.count for layer in self.layers)

    @property
    def sizes(self) -> Sizes:
        """Sizes that do not depend on the layer."""
        return self.outside[0].sizes

    @property
    def tensors(self) -> Iterator[tuple[Tensor, int]]:
        """Every tensor, with the number of its like."""
        yield from ((tensor, 1) for tensor in self.outside)
        for layer in self.layers:
            yield from ((tensor, layer.count) for tensor in layer.tensors)

    def part(self, part: Part) -> Tensor | None:
        """The first tensor outside the layers that is this part."""
        return next((tensor for tensor in self.outside if part_of(tensor) == part), None)
