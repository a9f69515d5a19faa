"""A model's tensors as the planner sees them: the parts they are, and layers that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from axolotl_loram.architecture.config_json import (
    Config,
    family_of,
    is_removed,
    layer_fields,
    sizes_of,
)
from axolotl_loram.architecture.model import Tensor, parameters
from axolotl_loram.architecture.spaces import EMBEDDING, EXPERTS, HEAD, LINEAR, Sizes
from axolotl_loram.errors import LoRAMError

Part = Literal["embedding", "lm_head", "linears", "experts", "norms", "biases", "other"]
"""What a tensor is to whoever quantizes the model."""

PARTS: tuple[Part, ...] = get_args(Part)


def part_of(tensor: Tensor) -> Part:
    """What `tensor` is. bitsandbytes replaces linear modules, inside the layers: "linears"."""
    if tensor.bias and tensor.role in (LINEAR, HEAD):
        return "biases"
    if tensor.linear:
        return "linears"
    if tensor.role == EXPERTS:
        return "experts"
    if tensor.role in (EMBEDDING, HEAD):
        return "embedding" if tensor.role == EMBEDDING else "lm_head"
    return "norms" if "norm" in tensor.module else "other"


@dataclass(frozen=True)
class Layer:
    """Decoder layers that are alike.

    Attributes:
        tensors: Those of the first of them.
        heads: Query heads.
        routed: Experts that a token goes through.
        indices: Which layers they are.
    """

    tensors: tuple[Tensor, ...]
    heads: int
    routed: int
    indices: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many layers there are of this kind."""
        return len(self.indices)

    def at(self, index: int) -> tuple[Tensor, ...]:
        """The tensors of another of the layers."""
        first, own = f".{self.indices[0]}.", f".{index}."
        return tuple(
            replace(
                tensor,
                name=tensor.name.replace(first, own, 1),
                module=tensor.module.replace(first, own, 1),
                layer=index,
            )
            for tensor in self.tensors
        )

    @property
    def sizes(self) -> Sizes:
        """Sizes that the layer's spaces are made of."""
        return self.tensors[0].sizes

    @property
    def linears(self) -> tuple[Tensor, ...]:
        """Weights of linear modules."""
        return tuple(tensor for tensor in self.tensors if part_of(tensor) == "linears")

    @property
    def attention(self) -> tuple[Tensor, ...]:
        """Linear weights of attention, the output projection last."""
        return tuple(tensor for tensor in self.linears if "att" in tensor.module.split(".")[-2])

    @property
    def mlps(self) -> list[tuple[Tensor, ...]]:
        """Linear weights of each MLP (a shared expert is one), the output projection last."""
        found: dict[str, list[Tensor]] = {}
        for tensor in self.linears:
            if tensor not in self.attention and min(tensor.shape) > 1:
                found.setdefault(tensor.module.rpartition(".")[0], []).append(tensor)
        return [tuple(own) for own in found.values()]


@dataclass(frozen=True)
class Layout:
    """A model's tensors.

    Attributes:
        head: The weight of the output embedding, also where it is the input embedding's.
        undeclared: Prefixes of parameters that are no part of the declaration.
    """

    outside: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    head: Tensor
    model_type: str
    undeclared: tuple[str, ...]

    @classmethod
    def of(cls, config: Config) -> Layout:
        """The layout of a model with this config.

        Raises:
            LoRAMError: It has no declared embedding: it is no language model.
        """
        outside: list[Tensor] = []
        found: dict[int, list[Tensor]] = {}
        for tensor in parameters(config):
            apart = tensor.layer is None or is_removed(config, tensor.layer)  # norms alone
            own = outside if apart else found.setdefault(tensor.layer or 0, [])
            own.append(tensor)
        if not any(part_of(tensor) == "embedding" for tensor in outside):
            raise LoRAMError(
                f"expected a language model, found {config['model_type']}: memory is planned for "
                "causal language models only"
            )
        alike: dict[object, list[int]] = {}

        def of_kind(indices: list[int]) -> Layer:
            fields, own = layer_fields(config, indices[0]), tuple(found[indices[0]])
            routed = int(fields.get("num_experts_per_tok") or 0)
            return Layer(own, int(fields["num_attention_heads"]), routed, tuple(indices))

        for index, own in found.items():
            names = tuple(tensor.name.partition(f".{index}.")[2] for tensor in own)
            alike.setdefault((names, *sorted(own[0].sizes.items())), []).append(index)
        family = family_of(config)
        head = next(weight for weight in family.model if weight.role == HEAD)
        name = f"{head.module}.weight"
        return cls(
            tuple(outside),
            tuple(of_kind(indices) for indices in alike.values()),
            Tensor(name, head.module, None, head.dims, sizes_of(config), HEAD),
            family.model_type,
            family.whole,
        )

    def split(self, key: Callable[[Tensor], object]) -> Layout:
        """The same, with layers counted together only where the keys of their tensors agree."""
        layers = []
        for layer in self.layers:
            alike: dict[object, list[int]] = {}
            for index in layer.indices:
                alike.setdefault(tuple(map(key, layer.at(index))), []).append(index)
            layers += [
                replace(layer, tensors=layer.at(indices[0]), indices=tuple(indices))
                for indices in alike.values()
            ]
        return replace(self, layers=tuple(layers))

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(layer.count for layer in self.layers)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.embedding.shape[1]

    @property
    def vocabulary(self) -> int:
        """Tokens that logits are made for."""
        return self.embedding.shape[0]

    @property
    def tensors(self) -> Iterator[tuple[Tensor, int]]:
        """Every tensor, with the number of its like."""
        yield from ((tensor, 1) for tensor in self.outside)
        for layer in self.layers:
            yield from ((tensor, layer.count) for tensor in layer.tensors)

    @property
    def every(self) -> Iterator[tuple[Tensor, int]]:
        """As `tensors`, with the output embedding also where it is tied, as PEFT sees it."""
        yield from self.tensors
        if self.lm_head is None:
            yield self.head, 1

    @property
    def embedding(self) -> Tensor:
        """The input embedding."""
        return next(tensor for tensor in self.outside if part_of(tensor) == "embedding")

    @property
    def lm_head(self) -> Tensor | None:
        """The output embedding, None where it is the input embedding."""
        return next((tensor for tensor in self.outside if part_of(tensor) == "lm_head"), None)
