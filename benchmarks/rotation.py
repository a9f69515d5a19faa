"""One adapter of the base trained on several prunings in turn, a step on each.

Each pruning errs in its own way, and what an adapter learns of that on one is noise to the others.
The best units of all stay in each ("core"); the others are dealt out by rank, so that between them
the prunings hold every unit. The adapter lives in the base's dimensions: before a step the kept
rows of B and columns of A are copied into the pruned model, after it their gradients are put back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rivals import gathered, linears, walk
from safetensors.torch import load_file
from torch import nn

CORE = 0.5
"""Share of the units that a pruning keeps which all of them keep."""
PROTECTED = (4, 2)
"""Layers that stay whole, at the start and at the end: the command's default."""


@torch.no_grad()
def deal(model: Any, ids: torch.Tensor, ratio: float, hands: int, folder: Path) -> list[Path]:
    """Index files of so many prunings, as `axolotl-loram prune --indices` takes them.

    Units are ranked by `activation`: norm of the weights that read them times norm of what is read.
    """
    config, found = model.config, [folder / str(hand) for hand in range(hands)]
    for hand in found:
        hand.mkdir(parents=True)
    inner = range(PROTECTED[0], config.num_hidden_layers - PROTECTED[1])
    groups = config.num_key_value_heads
    for index, (layer, run) in enumerate(walk(model, ids)):
        if index not in inner:
            continue
        modules = linears(layer)
        grams = gathered(modules, run)
        for name, file, units, rows in (
            ("mlp.down_proj", "mlp.gate_proj", config.intermediate_size, 1),
            ("self_attn.o_proj", "self_attn.k_proj", groups, config.head_dim),
        ):
            score = grams[name].diagonal() * modules[name].weight.square().sum(0)
            order = score.view(units, -1).sum(1).argsort(descending=True)
            kept = units - int(units * ratio)
            core = round(kept * CORE) if units > hands else kept - 1
            for hand, target in enumerate(found):
                stays = torch.cat([order[:core], dealt(order[core:], hand, hands, kept - core)])
                gone = torch.tensor(sorted(set(range(units)) - set(stays.tolist())))
                positions = (gone[:, None] * rows + torch.arange(rows)).flatten()
                path = target / f"model.layers.{index}.{file}.pt"
                torch.save({"pruned_idx": positions}, path)
    return found


def dealt(order: torch.Tensor, hand: int, hands: int, size: int) -> torch.Tensor:
    """Every n-th, from another start for each; around again where that is too few."""
    return torch.cat([order[(hand + k) % hands :: hands] for k in range(hands)])[:size]


class Rotation:
    """The adapter of the base, and the pruned models it is trained on.

    Args:
        whole: The base with new LoRA weights.
        narrow: Pruned models with LoRA weights.
        recovered: Folders of adapters of the same models that are all 1 (`fill_ones`), recovered.
    """

    def __init__(self, whole: PeftModel, narrow: list[PeftModel], recovered: list[Path]):
        self.weights = {n: w for n, w in whole.named_parameters() if w.requires_grad}
        self.narrow = narrow
        self.places = [
            {
                name.replace(".weight", ".default.weight"): there.nonzero()[:, 0]
                for name, there in places_of(folder).items()
            }
            for folder in recovered
        ]

    @torch.no_grad()
    def lend(self, index: int) -> PeftModel:
        """A pruned model with its part of the adapter."""
        for name, weight in self._trained(index):
            dim = 0 if "lora_B" in name else 1
            weight.copy_(self.weights[name].index_select(dim, self.places[index][name]))
            weight.grad = None
        return self.narrow[index]

    @torch.no_grad()
    def collect(self, index: int) -> None:
        """Its gradients as the adapter's."""
        for name, weight in self._trained(index):
            whole, dim = self.weights[name], 0 if "lora_B" in name else 1
            grad = torch.zeros_like(whole).index_copy_(
                dim, self.places[index][name], weight.grad.to(whole.dtype)
            )
            whole.grad = grad

    def _trained(self, index: int) -> list[tuple[str, nn.Parameter]]:
        return [(n, w) for n, w in self.narrow[index].named_parameters() if w.requires_grad]


@torch.no_grad()
def fill_ones(model: PeftModel) -> None:
    """Set all of A and B to 1, so that recovery shows where they go."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.fill_(1.0)


def places_of(folder: Path) -> dict[str, torch.Tensor]:
    """1 for each row of B and column of A that a pruned model has, by name."""
    stored = load_file(folder / "adapter_model.safetensors")
    return {n: w.amax(1) if "lora_B" in n else w.amax(0) for n, w in stored.items()}
