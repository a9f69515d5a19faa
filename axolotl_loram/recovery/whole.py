"""Whether an adapter is whole: all of its tensors there, of the modules it names, and trained.

What a run saved is held against what its model trained, too. Each way of sharding saves in its own
manner (axolotl 0.19): ZeRO-3 leaves tensors of no elements where nothing was gathered, and FSDP's
sharded saves leave no adapter at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import is_tied
from axolotl_loram.architecture.lora_names import PARTNERS, split_name
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.pairing import check_adapter_tokenizer, check_trained_under
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import EXPERTS
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, StoredTensor, finite
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.scatter import LORA_AXES, Moved, match

LOG = logging.getLogger(__name__)
STARTS_AT_ZERO = ("lora_B.weight", "lora_embedding_A")
"""What PEFT begins with zeros: still zero, it was never trained."""
MOST_REPETITIONS = 4
"""In an expression for names of modules."""
Tensors = Mapping[str, StoredTensor]
Shape = tuple[int, ...]


def check_adapter(
    adapter: Adapter, plan: PruningPlan, pruned: Path | None = None, of_run: bool = False
) -> list[Moved]:
    """All that is asked of an adapter before it is moved between shapes; returns it so moved.

    Args:
        adapter: The adapter.
        plan: Of whose pruned model it is; where `pruned` is None, of whose base.
        pruned: Folder of the pruned model that it was trained on.
        of_run: Whether the run that trained it is the caller: then it may be untrained, as before
            the first step, and its tokenizer is not held against the pruned model's.

    Raises:
        LoRAMError: It is not whole, not trained, or not for this plan.
    """
    if pruned is not None:
        check_trained_under(adapter.record, plan, adapter.folder)
    adapter = adapter.of_today(plan.config if pruned is None else plan.pruned_config)
    _check_pairs(adapter)
    moved = match(adapter, plan, full_size=pruned is None)
    check_modules(adapter, plan)
    if pruned is not None and not of_run:
        _check_trained(adapter)
        check_adapter_tokenizer(adapter.folder, pruned)
    return moved


def empty_tensors(tensors: Tensors) -> list[str]:
    """Tensors without elements: what a rank saves of weights that ZeRO-3 keeps elsewhere."""
    return [name for name, tensor in tensors.items() if 0 in tensor.shape]


def unpaired_tensors(tensors: Tensors) -> list[str]:
    """A without B, or B without A."""
    return [
        name
        for name, part in ((name, split_name(name)[1]) for name in tensors)
        if part in PARTNERS and name.removesuffix(part) + PARTNERS[part] not in tensors
    ]


def untrained_tensors(tensors: Tensors) -> list[str]:
    """Of each pair the one that starts at zero, where it still is zero: BA is no update."""
    return [name for name, tensor in _start_at_zero(tensors).items() if _is_zero(tensor)]


def broken_tensors(tensors: Tensors) -> list[str]:
    """Tensors with an infinity or NaN."""
    return [
        name
        for name, tensor in tensors.items()
        if not all(finite(block, tensor.dtype) for block in tensor.blocks())
    ]


PROBLEMS = {
    "empty, which is what ZeRO-3 leaves where nothing was gathered": empty_tensors,
    "without its partner of A and B": unpaired_tensors,
    "all zero, so that BA is no update: never trained, or lost in saving": untrained_tensors,
    "infinite or not a number: training diverged": broken_tensors,
}
"""What can be wrong with tensors → finding those."""


def is_untrained(tensors: Tensors) -> bool:
    """Whether every B of an adapter is zero, as before its first step: it changes nothing."""
    first = _start_at_zero(tensors)
    return bool(first) and all(map(_is_zero, first.values()))


def _check_trained(adapter: Adapter) -> None:
    if is_untrained(adapter.tensors):
        raise LoRAMError(
            f"expected a trained adapter in {adapter.folder}, found every B of it zero, as before "
            "the first step: give a checkpoint of a later step, or train with a learning rate "
            "above 0"
        )


def _check_pairs(adapter: Adapter) -> None:
    lone = unpaired_tensors(adapter.tensors)
    if lone:
        raise LoRAMError(
            f"expected A and B of every module in {adapter.folder}, found {lone[0]} without its "
            f"partner ({len(lone)} such): the adapter was not saved whole, so save it again"
        )


def check_modules(adapter: Adapter, plan: PruningPlan) -> None:
    """Refuse an adapter whose tensors are not those of the modules that its config names.

    PEFT leaves out what is too many and begins anew with what is missing, both with a warning at
    most. Where the config names no modules, there is nothing to compare.

    Raises:
        LoRAMError: A tensor has none of its rank, is of a module that is not named, or a module
            has none.
    """
    _check_ranks(adapter.tensors)
    settings = adapter.settings
    if not names_modules(settings):
        return
    split = map(split_name, adapter.tensors)
    having = {module for module, part in split if part in LORA_AXES}
    # Stacks, linear layers as parameters, and, under "all-linear", the router's weight.
    targets = list(adapter.target_parameters)
    tying = settings.get("ensure_weight_tying") and is_tied(plan.config)
    allowed = {"lm_head"} if tying else set()  # PEFT puts the embedding's LoRA there too
    allowed |= {
        tensor.module
        for tensor in parameters(plan.config)
        if tensor.role == EXPERTS or _matches(tensor.name, targets)
    }
    extra = sorted(module for module in having - allowed if not is_named(module, settings))
    if extra:
        raise LoRAMError(
            f"expected LoRA on the target_modules in the config of {adapter.folder} alone, found "
            f"it on {extra[0]} too ({len(extra)} such): config and tensors are of two adapters"
        )
    there = (t for t in parameters(plan.config) if t.layer not in plan.removed)
    linear = [tensor for tensor in there if tensor.linear]
    wanted = {t.module for t in linear if is_named(t.module, settings, t.layer)}
    wanted |= {t.module for t in linear if _matches(t.name, targets)}
    missing = sorted(wanted - having)
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


def _check_ranks(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        partner = tensors.get(name.replace(".lora_A.weight", ".lora_B.weight"), tensor)
        if partner is tensor or len(tensor.shape) != 2 or len(partner.shape) != 2:
            continue
        if partner.shape[1] != tensor.shape[0]:
            raise LoRAMError(
                f"expected A and B of one rank, found {name} of shape {list(tensor.shape)} and "
                f"its B of {list(partner.shape)}: they are of two adapters"
            )


def _start_at_zero(tensors: Tensors) -> dict[str, StoredTensor]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if split_name(name)[1] in STARTS_AT_ZERO and 0 not in tensor.shape
    }


def _is_zero(tensor: StoredTensor) -> bool:
    """Bits without the sign decide, so that −0 is a zero."""
    return not any(np.left_shift(block, 1).any() for block in tensor.blocks())


def trained_shapes(model: Any) -> dict[str, Shape]:
    """Name, as PEFT saves it → shape of each tensor that a PEFT model is about to train.

    It is asked before the trainer shards the model; ZeRO-3 may have done so already.
    """
    shapes = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            saved = name.replace(".modules_to_save.default", "").replace(".default", "")
            shapes[saved] = tuple(getattr(weight, "ds_shape", weight.shape))
    return shapes


def check_complete(folder: Path, trained: Mapping[str, Shape]) -> None:
    """Refuse a saved adapter that is not all of `trained_shapes`, or not finite."""
    again = f"the run's checkpoints are in {folder}: go on from the last with other settings"
    try:
        saved = Checkpoint(folder, ADAPTER_FILE)
    except LoRAMError as error:
        raise LoRAMError(f"the adapter was not saved whole: {error}; {again}") from None
    shapes = {name: tensor.shape for name, tensor in saved.tensors.items()}
    lost = [name for name, shape in trained.items() if shapes.get(name) != shape]
    if lost:
        found = shapes.get(lost[0])
        raise LoRAMError(
            f"expected {lost[0]} of shape {list(trained[lost[0]])} in the saved adapter, found "
            f"{'none' if found is None else f'shape {list(found)}'} ({len(lost)} of {len(trained)} "
            f"tensors are not whole): it was not gathered when it was saved, and is not recovered; "
            f"{again}"
        )
    broken = broken_tensors(saved.tensors)
    if broken:
        raise LoRAMError(
            f"expected finite weights in the saved adapter, found {broken[0]} infinite or not a "
            f"number ({len(broken)} of {len(shapes)}): training diverged; {again}"
        )
    idle = untrained_tensors(saved.tensors)
    if is_untrained(saved.tensors):
        LOG.warning(
            "every B of the adapter in %s is zero: it changes nothing, as training did no step at "
            "a learning rate above 0",
            folder,
        )
    elif idle:
        LOG.warning("%d tensors are still all zero, such as %s: not trained", len(idle), idle[0])
