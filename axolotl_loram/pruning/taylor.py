"""First-order importance of units, by gradients that stream through the layers backwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from axolotl_loram.architecture.config_json import layer_count
from axolotl_loram.architecture.model import readers
from axolotl_loram.architecture.spaces import Sizes, Weight, per_unit
from axolotl_loram.models.stream import States, seen_inputs, seen_routing
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.evidence import Evidence


def taylor(evidence: Evidence) -> None:
    """LLM-Pruner's first order (arXiv 2305.11627): Σ_s |∂L_s/∂m| for a mask m = 1 on each unit.

    The masks lie on the inputs of the projections that read the units; L_s is the next-token loss
    of sequence s. One walk forward keeps every layer's inputs on disk, one backward runs each
    layer again and takes the gradient through it: no weight has a gradient, and one layer is held.
    """
    last = layer_count(evidence.config)
    walk = evidence.walk("taylor", last, keep=True)
    lowest = min((i for i in range(last + 1) if _gradient(walk, i).exists), default=None)
    if lowest is None:
        with torch.no_grad():
            for index, layer in walk:
                with walk.advanced(index, layer):
                    pass
        _through_head(walk, last)
        lowest = last
    first = min(evidence.layers)
    done = evidence.progress(last - first, "taylor, backwards", "layer")
    done(last - lowest)
    for index in reversed(range(first, lowest)):
        _through_layer(evidence, walk, index, done)


def _gradient(walk: Walk, index: int) -> States:
    """Gradient of the losses by the inputs of layer `index`."""
    like = walk.inputs(index)
    return States(like.file.with_name(f"gradient-{index}.states"), like.shape, like.dtype)


def _through_head(walk: Walk, last: int) -> None:
    with _gradient(walk, last).written() as append:
        for sample in range(len(walk.tokens)):
            hidden = walk.inputs(last).read([sample]).to(walk.stream.device).requires_grad_()
            loss = walk.stream.loss(hidden, walk.tokens[[sample]]).sum()
            append(torch.autograd.grad(loss, hidden)[0])
    walk.stream.drop_head()


def _through_layer(
    evidence: Evidence, walk: Walk, index: int, done: Callable[[float], Any]
) -> None:
    """Take the gradient from a layer's outputs to its inputs and masks; save the scores."""
    layer, sizes = walk.stream.layer(index), evidence.sizes(index)
    reading, groups = readers(evidence.config, index), evidence.groups(index)
    experts = next((group.module for group in groups if group.kind == "experts"), None)
    scores = {group.kind: np.zeros(sizes[group.kind]) for group in groups}
    with _gradient(walk, index).written() as append:
        for batch in walk.batches():
            hidden, gradients = _backwards(walk, index, layer, batch, reading, experts, sizes)
            append(hidden)
            for weight in reading:
                values = gradients[weight.module][:, 0].double().cpu().numpy()
                for kind in scores:
                    scores[kind] += np.abs(per_unit(values, weight.dims[1], sizes, kind)).sum(0)
            if experts:
                routed = gradients[experts][:, 0].double().abs().sum(0)
                scores["experts"] += routed.cpu().numpy()
            done(len(batch) / len(walk.tokens))
        if index in evidence.layers:
            evidence.save(index, scores)
    _gradient(walk, index + 1).file.unlink(missing_ok=True)
    walk.inputs(index + 1).file.unlink(missing_ok=True)


def _backwards(
    walk: Walk,
    index: int,
    layer: nn.Module,
    batch: list[int],
    reading: tuple[Weight, ...],
    experts: str | None,
    sizes: Sizes,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients by the layer's inputs (batch, tokens, hidden), and by masks (batch, 1, features).

    The masks lie on the inputs of what reads units, and on the weights of the experts' outputs.
    """
    device = walk.stream.device
    hidden = walk.inputs(index).read(batch).to(device).requires_grad_()
    arriving = _gradient(walk, index + 1).read(batch).to(device)
    masks: dict[str, torch.Tensor] = {}

    def mask(name: str, inputs: torch.Tensor) -> torch.Tensor:
        masks[name] = torch.ones_like(inputs[:, :1], requires_grad=True)
        return inputs * masks[name]

    def mask_experts(
        module: nn.Module, inputs: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert experts is not None
        shape = (len(batch), 1, sizes["experts"])
        masks[experts] = weights.new_ones(shape).requires_grad_()
        whole = masks[experts].expand(-1, hidden.shape[1], -1).flatten(0, 1)
        return weights * whole.gather(1, indices)

    with (
        torch.enable_grad(),
        seen_inputs(layer, [w.module for w in reading], mask),
        seen_routing(layer, experts, mask_experts) if experts else nullcontext(),
    ):
        output = walk.stream.run(index, layer, hidden)
    by_hidden, *by_masks = torch.autograd.grad(output, [hidden, *masks.values()], arriving)
    return by_hidden, dict(zip(masks, by_masks, strict=True))
