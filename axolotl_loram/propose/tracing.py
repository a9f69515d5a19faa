"""Which features of an unknown model hang together: found by marking them and watching it run.

A small model of the real class is run with the output of every linear layer held fixed, so that a
mark on one feature goes no further than to the inputs of the next linear layers. Features that
meet there are one unit: a neuron's rows and its column, a KV group's heads. What meets the
embedding's features is the hidden stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOKENS, SEEN = 12, 1e-9
"""Length of the text; size of what counts as a mark's effect (outputs are near 1)."""


class Unit(NamedTuple):
    """Which unit of which kind (a number) a feature belongs to; kind -1 is the hidden stream."""

    kind: int
    number: int


HIDDEN_STREAM = -1
Labels = dict[tuple[str, int], list[Unit | None]]
"""(Parameter, dimension) → each feature's unit, None where it is no unit's or several units'."""


def build_from(model_type: str, fields: Mapping[str, Any], device: str = "meta") -> PreTrainedModel:
    """A model of transformers' own class with these config fields, without weights on "meta"."""
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )


def build_random(model_type: str, fields: Mapping[str, Any]) -> PreTrainedModel:
    """The same on the CPU in float64, no weight zero, so that every path carries something."""
    torch.manual_seed(0)
    model = build_from(model_type, fields, "cpu").double().eval().requires_grad_(False)
    for parameter in model.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.copy_(torch.randn_like(parameter) * spread + (parameter.dim() == 1))
    return model


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name → shape of what a model keeps: parameters, and the buffers that checkpoints have."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return {n: tuple(p.shape) for n, p in {**dict(model.named_parameters()), **buffers}.items()}


def some_tokens(vocabulary: int) -> torch.Tensor:
    """A text of one sequence; special tokens come first in a vocabulary."""
    return 4 + torch.arange(TOKENS)[None] * 7 % (vocabulary - 4)


def trace(model: PreTrainedModel, layer: str) -> Labels:
    """Label the features of one decoder layer's parameters with the units they belong to.

    Args:
        model: From `build_random`; its norms are put out of action.
        layer: Path of the layer, such as ``model.layers.0``.

    Raises:
        RuntimeError: A linear layer does not see every token (it is one of several experts).
    """
    still_norms(model)
    run = MarkedRun(model)
    units = _Units(run, layer)
    labels: Labels = {}
    for name, parameter in model.get_submodule(layer).named_parameters(prefix=layer):
        module = name.rpartition(".")[0]
        for dim in range(parameter.dim()):
            if module in run.linears:
                labels[name, dim] = units.side(module, "out" if dim == 0 else "in")
            elif parameter.dim() < 3:
                labels[name, dim] = units.of_slices(name, dim)
            else:
                labels[name, dim] = [None] * parameter.shape[dim]
    return labels


def still_norms(model: nn.Module) -> None:
    """Make every norm multiply by its weight only: dividing by a mean would couple all features."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and not any(module.children()):
            module.forward = _Still(module)


class _Still:
    """A norm's forward without the norm.

    Attributes:
        marked: Name of its parameter and dimension; slice i is marked in sample i + 1.
    """

    def __init__(self, norm: nn.Module):
        self.norm, self.marked = norm, ("", 0)

    def __call__(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        weight, bias = (self._parameter(name, x.dim()) for name in ("weight", "bias"))
        for factor in (weight, *others):  # a gated norm gets the gate as well
            x = x * factor if isinstance(factor, torch.Tensor) else x
        return x if bias is None else x + bias

    def _parameter(self, name: str, dims: int) -> torch.Tensor | None:
        parameter, (marked, dim) = getattr(self.norm, name, None), self.marked
        if parameter is None or name != marked:
            return parameter
        one_hot = torch.eye(parameter.shape[dim], dtype=parameter.dtype)
        shape = [size if axis == dim else 1 for axis, size in enumerate(parameter.shape)]
        marks = one_hot.reshape(-1, *shape) * torch.randn_like(parameter)
        samples = parameter + torch.cat([torch.zeros_like(marks[:1]), marks])
        return samples.reshape(-1, *[1] * (dims - 1 - parameter.dim()), *parameter.shape)


class MarkedRun:
    """A model whose linear layers and embedding give what they gave in the first, unmarked run."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.embedding = next(
            name for name, part in model.named_modules() if part is model.get_input_embeddings()
        )
        self.linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.inputs: dict[str, torch.Tensor] = {}
        self.held: dict[str, torch.Tensor] = {}
        self.marked: str | None = None
        self.batch = 1
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.register_forward_hook(self._hook(name))
        self._run()
        self.unmarked = dict(self.inputs)

    def _hook(self, name: str) -> Any:
        def hold(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if isinstance(module, nn.Linear):
                self.inputs[name] = args[0].reshape(self.batch, -1, args[0].shape[-1])
            held = self.held.setdefault(name, output)
            held = held.repeat(output.shape[0] // held.shape[0], *[1] * (output.dim() - 1))
            if held.shape != output.shape:
                raise RuntimeError(f"{name} does not see the same tokens each time")
            if name != self.marked:
                return held
            marks, features = torch.randn_like(held), held.shape[-1]
            tokens = marks.flatten(0, -2)  # a view: every other one out of a ReLU's dead half
            tokens[::2] = (1 + tokens[::2].abs()) * 4 * held.abs().max()
            chosen = torch.eye(features, dtype=held.dtype).reshape(features, -1, features)
            return held + marks * torch.cat([torch.zeros_like(chosen[:1]), chosen])

        return hold

    def _run(self) -> None:
        self.inputs.clear()
        text = some_tokens(self.model.config.vocab_size).repeat(self.batch, 1)
        self.model(input_ids=text, use_cache=False)

    def reach(self, source: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Linear layer → (features of `source`'s output, inputs of the layer): who reaches whom."""
        self.marked = source
        yield from self._reached(self.held[source].shape[-1])
        self.marked = None

    def reach_of_slices(self, name: str, dim: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The same of the slices of another parameter along a dimension."""
        parameter = self.model.get_parameter(name)
        module, _, own = name.rpartition(".")
        norm = self.model.get_submodule(module).forward
        if isinstance(norm, _Still):
            norm.marked = own, dim
            yield from self._reached(parameter.shape[dim])
            norm.marked = "", 0
            return
        rows: dict[str, list[torch.Tensor]] = {}
        for weights in parameter.unbind(dim):  # views: marked in place
            before = weights.clone()
            weights.add_(torch.randn_like(weights))
            self._run()
            weights.copy_(before)
            for reader, seen in self.inputs.items():
                changed = (seen - self.unmarked[reader]).abs().amax(dim=(0, 1)) > SEEN
                rows.setdefault(reader, []).append(changed)
        yield from ((reader, torch.stack(found)) for reader, found in rows.items())

    def _reached(self, marks: int) -> Iterator[tuple[str, torch.Tensor]]:
        self.batch = marks + 1
        self._run()
        self.batch = 1
        for name, seen in self.inputs.items():
            yield name, (seen[1:] - seen[:1]).abs().amax(dim=1) > SEEN


Node = tuple[str, str, int]
"""A feature of a linear layer: its path, "in" or "out", position."""


class _Units:
    """Features that meet, as connected components; those of the same make are one kind."""

    def __init__(self, run: MarkedRun, layer: str):
        self.run, self.parent = run, dict[Node, Node]()
        inside = [name for name in run.linears if name.startswith(f"{layer}.")]
        for source in (run.embedding, *inside):
            for reader, reached in run.reach(source):
                for i, j in reached.nonzero().tolist():
                    self._join((source, "out", i), (reader, "in", j))
        self.nodes = [
            (name, side, i)
            for name in inside
            for side, size in (
                ("in", run.linears[name].in_features),
                ("out", run.linears[name].out_features),
            )
            for i in range(size)
        ]
        self.units = self._number()

    def _root(self, node: Node) -> Node:
        while (above := self.parent.setdefault(node, node)) != node:
            self.parent[node] = node = self.parent[above]
        return node

    def _join(self, one: Node, other: Node) -> None:
        self.parent[self._root(one)] = self._root(other)

    def _number(self) -> dict[Node, Unit]:
        """Root of a component → its unit; those of a kind are numbered by their first features."""
        members: dict[Node, list[Node]] = {}
        for node in self.nodes:
            members.setdefault(self._root(node), []).append(node)
        kinds: dict[tuple[tuple[str, str], ...], int] = {}
        counts: dict[int, int] = {}
        units = {}
        for root, nodes in members.items():
            kind = kinds.setdefault(tuple(sorted((n, side) for n, side, _ in nodes)), len(kinds))
            units[root] = Unit(kind, counts.get(kind, 0))
            counts[kind] = units[root].number + 1
        width = self.run.held[self.run.embedding].shape[-1]
        hidden = ((self._root((self.run.embedding, "out", i)), i) for i in range(width))
        return units | {root: Unit(HIDDEN_STREAM, i) for root, i in hidden}

    def unit(self, node: Node) -> Unit | None:
        """The unit that a feature of a linear layer belongs to, None outside this layer."""
        return self.units.get(self._root(node))

    def side(self, module: str, side: str) -> list[Unit | None]:
        """Labels of a linear layer's inputs or outputs."""
        layer = self.run.linears[module]
        size = layer.out_features if side == "out" else layer.in_features
        return [self.unit((module, side, i)) for i in range(size)]

    def of_slices(self, name: str, dim: int) -> list[Unit | None]:
        """Labels along one dimension of any other parameter: what a mark on each slice reaches."""
        reached: dict[int, set[Unit | None]] = {}
        for reader, found in self.run.reach_of_slices(name, dim):
            for i, j in found.nonzero().tolist():
                reached.setdefault(i, set()).add(self.unit((reader, "in", j)))
        size = self.run.model.get_parameter(name).shape[dim]
        units = [reached.get(i, set()) for i in range(size)]
        return [next(iter(found)) if len(found) == 1 else None for found in units]
