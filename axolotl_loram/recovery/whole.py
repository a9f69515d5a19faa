"""Whether an adapter is whole: all of its tensors there, of the modules it names, and trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from axolotl_loram.architecture.lora_names import PARTNERS, split_name
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import EXPERTS
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint, StoredTensor, finite
from axolotl_loram.recovery.scatter import LORA_AXES, check_pairs, unpaired_tensors

STARTS_AT_ZERO = ("lora_B.weight", "lora_embedding_A")
"""What PEFT begins with zeros: still zero, it was never trained."""
MOST_REPETITIONS = 4
"""In an expression for names of modules."""


def empty_tensors(adapter: Checkpoint) -> list[str]:
    """Tensors without elements: what a rank saves of weights that ZeRO-3 keeps elsewhere."""
    return [name for name, tensor in adapter.tensors.items() if 0 in tensor.shape]


def untrained_tensors(adapter: Checkpoint) -> list[str]:
    """Of each pair the one that starts at zero, where it still is zero: BA is no update."""
    return [tensor.name for tensor in _start_at_zero(adapter) if _is_zero(tensor)]


def broken_tensors(adapter: Checkpoint) -> list[str]:
    """Tensors with an infinity or NaN."""
    return [tensor.name for tensor in adapter.tensors.values() if not _finite(tensor)]


PROBLEMS = {
    "empty, which is what ZeRO-3 leaves where nothing was gathered": empty_tensors,
    "without its partner of A and B": unpaired_tensors,
    "all zero, so that BA is no update: never trained, or lost in saving": untrained_tensors,
    "infinite or not a number: training diverged": broken_tensors,
}
"""What can be wrong with tensors → finding those."""


def is_untrained(adapter: Checkpoint) -> bool:
    """Whether every B of an adapter is zero, as before its first step: it changes nothing."""
    first = list(_start_at_zero(adapter))
    return bool(first) and all(_is_zero(tensor) for tensor in first)


def check_trained(adapter: Checkpoint) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        LoRAMError: Every B of it is zero.
    """
    if is_untrained(adapter):
        raise LoRAMError(
            f"expected a trained adapter in {adapter.folder}, found every B of it zero, as before "
            "the first step: give a checkpoint of a later step, or train with a learning rate "
            "above 0"
        )


def check_modules(adapter: Checkpoint, settings: Mapping[str, Any], plan: PruningPlan) -> None:
    """Refuse an adapter whose tensors are not those of the modules that its config names.

    PEFT leaves out what is too many and begins anew with what is missing, both with a warning at
    most.

    Args:
        adapter: Its tensors.
        settings: Its config; where that names no modules, there is nothing to compare.
        plan: Of whose base, or pruned model, the modules are.

    Raises:
        LoRAMError: A tensor has no partner or none of its rank, is of a module that is not named,
            or a module has none.
    """
    check_pairs(adapter)
    _check_ranks(adapter)
    if not names_modules(settings):
        return
    having = {module for name in adapter.tensors for module in _adapted_module(name)}
    stacked = {tensor.module for tensor in parameters(plan.config) if tensor.role == EXPERTS}
    extra = sorted(module for module in having - stacked if not is_named(module, settings))
    if extra:
        raise LoRAMError(
            f"expected LoRA on the target_modules in the config of {adapter.folder} alone, found "
            f"it on {extra[0]} too ({len(extra)} such): config and tensors are of two adapters"
        )
    linear = (tensor for tensor in parameters(plan.config) if tensor.linear)
    named = {t.module for t in linear if is_named(t.module, settings, t.layer)}
    missing = sorted(named - having)
    if missing:
        raise LoRAMError(
            f"expected LoRA on all target_modules in the config of {adapter.folder}, found none on "
            f"{missing[0]} ({len(missing)} such): its tensors are not all there, so save it again"
        )


def names_modules(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter's config tells which modules have LoRA, in names or plain expressions."""
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    return (
        isinstance(targets, str | list)
        and targets != "all-linear"
        and all(_is_plain(named) for named in (targets, excluded) if isinstance(named, str))
    )


def _is_plain(expression: str) -> bool:
    """Whether matching takes bounded time: a stranger's expression may take years."""
    repeated = re.search(r"\)[*+{]", expression)
    return not repeated and len(re.findall(r"[*+?{]", expression)) <= MOST_REPETITIONS


def is_named(module: str, settings: Mapping[str, Any], layer: int | None = None) -> bool:
    """Whether PEFT adapts a module of this name (in this layer) under an adapter's config."""
    chosen = settings.get("layers_to_transform")
    chosen = chosen if isinstance(chosen, list | None) else [chosen]
    if layer is not None and chosen and layer not in chosen:
        return False
    excluded = settings.get("exclude_modules")
    return _matches(module, settings.get("target_modules")) and not _matches(module, excluded)


def _matches(module: str, named: Any) -> bool:
    """A regular expression, or a list of names or of their ends: as PEFT 0.20 takes them."""
    if isinstance(named, str):
        try:
            return re.fullmatch(named, module) is not None
        except (re.error, OverflowError):
            raise LoRAMError(
                f"expected a regular expression as modules in an adapter's config, found "
                f"{named[:80]!r}: the file is damaged"
            ) from None
    names: Collection[Any] = named if isinstance(named, list) else ()
    return any(isinstance(n, str) and f".{module}".endswith(f".{n}") for n in names)


def _adapted_module(name: str) -> Iterator[str]:
    module, part = split_name(name)
    if part in LORA_AXES:
        yield module


def _check_ranks(adapter: Checkpoint) -> None:
    for name, tensor in adapter.tensors.items():
        if split_name(name)[1] == "lora_A.weight" and len(tensor.shape) == 2:
            other = adapter.tensors[_partner(name)].shape
            if len(other) == 2 and other[1] != tensor.shape[0]:
                raise LoRAMError(
                    f"expected A and B of one rank, found {name} of shape {list(tensor.shape)} and "
                    f"its B of {list(other)}: they are of two adapters"
                )


def _start_at_zero(adapter: Checkpoint) -> Iterator[StoredTensor]:
    for tensor in adapter.tensors.values():
        if split_name(tensor.name)[1] in STARTS_AT_ZERO and 0 not in tensor.shape:
            yield tensor


def _partner(name: str) -> str:
    part = split_name(name)[1]
    return name.removesuffix(part) + PARTNERS[part]


def _finite(tensor: StoredTensor) -> bool:
    return all(finite(block, tensor.dtype) for block in tensor.blocks())


def _is_zero(tensor: StoredTensor) -> bool:
    """Bits without the sign decide, so that −0 is a zero."""
    return not any(np.left_shift(block, 1).any() for block in tensor.blocks())
