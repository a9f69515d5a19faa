"""LoRA of linear layers as matrices: read from an adapter, run with a layer, written back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from torch import nn

from axolotl_loram.architecture.lora_names import split_name
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import StoredTensor
from axolotl_loram.models.bits import TORCH_DTYPES, from_bits, to_bits
from axolotl_loram.recovery.scatter import Moved


def scaling(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """LoRA's s of a module, as PEFT chooses it from an adapter's config."""
    patterns = settings.get("alpha_pattern") or {}
    usual = settings.get("lora_alpha", 8)  # PEFT's default
    alpha = patterns.get(get_pattern_key(list(patterns), module), usual)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@dataclass
class LoRA:
    """The update s B A of one linear layer, in float32.

    Attributes:
        module: The layer, as the running model calls it.
        scale: s.
        a: A, (r, inputs).
        b: B, (outputs, r).
        moved: The stored A and B, and where the base has what they hold.
    """

    module: str
    scale: float
    a: torch.Tensor
    b: torch.Tensor
    moved: tuple[Moved, Moved]

    def kept(self, axis: int) -> np.ndarray | None:
        """Positions in the base of B's rows (axis 0), A's columns (1); None where all are kept."""
        a, b = self.moved
        return b.features[0] if axis == 0 else a.features[1]

    def bits(self) -> dict[str, np.ndarray]:
        """A and B by their stored names, in their stored dtype."""
        pairs = zip(self.moved, (self.a, self.b), strict=True)
        return {m.stored.name: to_bits(values, m.stored.dtype) for m, values in pairs}


Loras = dict[str, LoRA]
"""The LoRA of each module."""


def read_loras(
    moved: Sequence[Moved], settings: Mapping[str, Any], full_size: bool, device: str = "cpu"
) -> Loras:
    """The LoRA of all linear layers inside decoder layers and elsewhere; the rest is left out.

    Args:
        moved: An adapter's tensors.
        settings: Its config.
        full_size: Whether in the base's shapes, zero at pruned features, or as trained.
        device: Where to put the matrices.

    Raises:
        LoRAMError: As `pairs_of`.
    """
    found = {}
    for module, pair in pairs_of(moved).items():
        a, b = (
            as_torch(one.stored, one.scatter() if full_size else one.read()).float().to(device)
            for one in pair
        )
        found[module] = LoRA(module, scaling(settings, module, len(a)), a, b, pair)
    return found


def pairs_of(moved: Sequence[Moved]) -> dict[str, tuple[Moved, Moved]]:
    """Linear layer → its A and B, of an adapter's tensors.

    Raises:
        LoRAMError: There is LoRA on stacked experts, or B has biases, which are not filled.
    """
    parts: dict[str, dict[str, Moved]] = {}
    for one in moved:
        module, part = split_name(one.stored.name)
        if one.stack or part == "lora_B.bias":
            raise LoRAMError(
                f"expected LoRA on linear layers to fill, found {one.stored.name}: recover this "
                "adapter with zeros"
            )
        parts.setdefault(module, {})[part] = one
    return {
        module: (own["lora_A.weight"], own["lora_B.weight"])
        for module, own in parts.items()
        if {"lora_A.weight", "lora_B.weight"} <= own.keys()
    }


def as_torch(stored: StoredTensor, bits: np.ndarray) -> torch.Tensor:
    """Bits of a stored tensor as torch's, sharing memory with them.

    Raises:
        LoRAMError: It holds no plain floats.
    """
    if stored.dtype not in TORCH_DTYPES:
        raise LoRAMError(
            f"expected weights of {', '.join(TORCH_DTYPES)}, found {stored.name} of "
            f"{stored.dtype}: use the unquantized model, and an adapter saved as PEFT saves it"
        )
    return from_bits(bits, stored.dtype)


def below(adapter: Loras, prefix: str) -> Loras:
    """The LoRA of one layer: path below ``prefix`` → its LoRA."""
    inside = (name for name in adapter if name.startswith(prefix))
    return {name.removeprefix(prefix): adapter[name] for name in inside}


@contextmanager
def added(layer: nn.Module, adapter: Loras) -> Iterator[None]:
    """In the block, the layer runs with its LoRA (paths below the layer)."""
    with ExitStack() as stack:
        for path, lora in adapter.items():
            stack.enter_context(layer.get_submodule(path).register_forward_hook(_adder(lora)))
        yield


def _adder(lora: LoRA) -> Any:
    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        update = nn.functional.linear(nn.functional.linear(args[0].float(), lora.a), lora.b)
        return output + (lora.scale * update).to(output.dtype)

    return add
