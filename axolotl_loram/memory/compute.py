"""Floating-point operations of LoRA training for each token, from the declared shapes.

Of a weight with P values that a token goes through: 2P forward and 2P backward (the gradient of its
input), since it is frozen; 2P more where it is trained whole. Of LoRA of rank r on a (out, in)
weight: 2r(in + out) forward, twice that backward. Of attention: the products of queries and keys
and of probabilities and values forward, both of each again backward (flash attention computes the
first once more). With gradient checkpointing the layers' forward pass once more. lm_head is
computed at every token. Nothing asks for the gradient of the first layer's input unless gradient
checkpointing does (where MLP and attention lie side by side, that of the MLP is counted even so).

A query looks at half of the sequence on average where attention is flash, and at all of it in the
matrices of scores of eager attention. Sliding windows are not looked at. Left out: norms, rotary
embeddings, activations, softmax, the unpacking of 4 bits, the optimizer: no matrix products.
`tests/memory/test_compute.py` holds the sums against PyTorch's own counter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from axolotl_loram.architecture.blocks import HIDDEN
from axolotl_loram.architecture.model import Tensor
from axolotl_loram.memory.layout import Layer, Layout, part_of
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.trained import Trained


@dataclass(frozen=True)
class Flops:
    """Operations for a token.

    Attributes:
        layers: Forward pass of the decoder layers, with their LoRA.
        layers_backward: Their backward pass, without what is recomputed.
        head: Forward pass of lm_head.
        head_backward: Its backward pass.
        recomputed: What gradient checkpointing computes again.
        anchor: Forward pass without LoRA, which anchored training adds on the pruned model.
    """

    layers: int
    layers_backward: int
    head: int
    head_backward: int
    recomputed: int = 0
    anchor: int = 0

    @property
    def total(self) -> int:
        """All of a training step."""
        return sum(vars(self).values())


def training_flops(run: TrainingArgs, layout: Layout, anchored: bool = False) -> Flops:
    """Operations for each token of training LoRA on a model.

    Args:
        run: Settings of the run.
        layout: Of the model that is trained on.
        anchored: Whether it runs without its adapter as well (`anchor: base`).

    Raises:
        LoRAMError: PEFT would refuse the targets of LoRA, or find none of them.
    """
    trained = Trained.of(run, layout)
    count = _Count(run, trained)
    layers = [(layer.count, *count.layer(layer)) for layer in trained.layout.layers]
    forward = sum(number * ahead for number, ahead, _ in layers)
    backward = sum(number * back for number, _, back in layers)
    if not run.gradient_checkpointing:
        first = min(trained.layout.layers, key=lambda layer: layer.indices[0])
        backward -= count.input_gradient(first)
    head, head_backward = count.weight(layout.head)
    if run.cross_entropy == "cut":  # the logits are made again in the backward pass
        head_backward += 2 * math.prod(layout.head.shape)
    again = forward if run.gradient_checkpointing else 0
    anchor = forward_flops(run, layout) if anchored else 0
    return Flops(forward, backward, head, head_backward, again, anchor)


def forward_flops(run: TrainingArgs, layout: Layout) -> int:
    """Operations for each token of a model's forward pass, without any LoRA."""
    total = 2 * math.prod(layout.head.shape)
    for layer in layout.layers:
        weights = sum(2 * values for _, values in passed(layer))
        total += layer.count * (weights + sum(scores(run, layer)))
    return total


def passed(layer: Layer) -> Iterator[tuple[Tensor, int]]:
    """The matrices of a layer, with how many of their values a token goes through."""
    for tensor in layer.tensors:
        part = part_of(tensor)
        biases = tensor.bias or tensor.name.endswith("_bias")  # the latter are of stacked experts
        if part == "experts" and len(tensor.shape) == 3:
            yield tensor, layer.routed * math.prod(tensor.shape[1:])
        elif (
            part == "linears"
            or (  # or a router
                part == "other" and tensor.dims[1:] == (HIDDEN,) and not biases
            )
        ):
            yield tensor, math.prod(tensor.shape)


def scores(run: TrainingArgs, layer: Layer) -> tuple[int, int]:
    """Operations for a token of queries with keys, and of probabilities with values."""
    if not layer.attention:
        return 0, 0
    seen = run.sequence_len if run.attention == "eager" else (run.sequence_len + 1) / 2
    values = layer.attention[-1].shape[1]
    queries = layer.sizes.get("query_dim", 0) * layer.heads or values
    return round(2 * seen * queries), round(2 * seen * values)


@dataclass(frozen=True)
class _Count:
    """Operations for a token, (forward, backward), of what a run trains."""

    run: TrainingArgs
    trained: Trained

    def layer(self, layer: Layer) -> tuple[int, int]:
        keys, values = scores(self.run, layer)
        forward = keys + values
        backward = (3 if self.run.attention == "flash" else 2) * keys + 2 * values
        for tensor, seen in passed(layer):
            ahead, back = self.weight(tensor, seen)
            forward, backward = forward + ahead, backward + back
        return forward, backward

    def weight(self, tensor: Tensor, seen: int | None = None) -> tuple[int, int]:
        """Of a matrix, with the LoRA of its module."""
        values = math.prod(tensor.shape) if seen is None else seen
        rank, stacked = self.trained.rank(tensor), len(tensor.shape) == 3
        lora = 2 * rank * sum(tensor.shape)
        if stacked:  # PEFT multiplies A and B out, once in a pass, and adds them to the weights
            lora = round(2 * rank * math.prod(tensor.shape) / self.run.tokens)
        whole = self.trained.is_whole(tensor) or (rank and stacked)
        return 2 * values + lora, (4 if whole else 2) * values + 2 * lora

    def input_gradient(self, layer: Layer) -> int:
        """What the gradient of a layer's input would take, by way of attention."""
        readers = [tensor for tensor in layer.attention if tensor.dims[1] == HIDDEN]
        return sum(
            2 * math.prod(tensor.shape) + 2 * self.trained.rank(tensor) * tensor.shape[1]
            for tensor in readers
        )
