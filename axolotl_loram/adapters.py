"""What is checked of an adapter: its tensors, its plan where that is at hand, and what it fits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from axolotl_loram.architecture import Config
from axolotl_loram.checkpoint import ADAPTER_FILE, Checkpoint, StoredTensor, finite
from axolotl_loram.checks import Finding, Subject, check_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.matching import (
    ADAPTER_CONFIG,
    LORA_AXES,
    match,
    named_model,
    split_name,
    unpaired_tensors,
)
from axolotl_loram.plan import PLAN_FILE, RECORD_FILE, PruningPlan
from axolotl_loram.sources import find_local_file, load_config

STARTS_AT_ZERO = ("lora_B.weight", "lora_embedding_A")
"""What PEFT begins with zeros: still zero, it was never trained."""


def settings(subject: Subject) -> Iterator[Finding]:
    """adapter_config.json names the recorded base."""
    found = named_model(subject.folder)
    if found != subject.record["base"]["id"]:
        named = subject.record["base"]["id"]
        raise LoRAMError(f"{ADAPTER_CONFIG} is for {found}, {RECORD_FILE} for {named}")
    yield "ok", f"{ADAPTER_CONFIG} names the recorded base, {found}"


def tensors(subject: Subject) -> Iterator[Finding]:
    """The adapter holds whole, finite, trained pairs of A and B."""
    adapter = subject.adapter
    found = {problem: names for problem, find in PROBLEMS.items() if (names := find(adapter))}
    for problem, names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield "failed", f"{names[0]}{more}: {problem}"
    if not any(split_name(name)[1] in LORA_AXES for name in adapter.tensors):
        yield "failed", f"there is no LoRA in {ADAPTER_FILE}"
    elif not found:
        yield "ok", f"{len(adapter.tensors)} tensors are whole, finite and trained"


def trained_under(subject: Subject) -> Iterator[Finding]:
    """The pruned model that the adapter was trained on has the recorded plan."""
    model = _pruned_model(subject)
    found = find_local_file(model, PLAN_FILE) if model else None
    if found is None:
        named = f"no plan of {model} on this machine" if model else "no pruned model is recorded"
        yield "not checked", named
        return
    check_digest(PruningPlan.load(found.parent), subject.record["plan"])
    yield "ok", f"{model} has the plan that the adapter was trained under"


def shapes(subject: Subject) -> Iterator[Finding]:
    """The adapter fits the model that it is for: the pruned one, once recovered the base."""
    recovered = subject.record["kind"] == "recovered-adapter"
    model = subject.base_model[0] if recovered else _pruned_model(subject)
    fitting = _plan_of_base(subject) if recovered else _plan_of_pruned(model)
    if fitting is None:
        yield "not checked", f"no config of {model} on this machine: pass --base MODEL"
        return
    match(subject.adapter, fitting, full_size=recovered)
    yield "ok", f"{len(subject.adapter.tensors)} tensors have the shapes of {model}"


def _plan_of_base(subject: Subject) -> PruningPlan | None:
    """A plan that keeps all of the base, if its config is on this machine, or is asked for."""
    model, revision = subject.base_model
    file = find_local_file(model, "config.json", revision)
    if file is None and subject.base is None:
        return None
    config: Config = load_config(str(file)) if file else load_config(model, revision)
    return PruningPlan(config, {})


def _plan_of_pruned(model: str | None) -> PruningPlan | None:
    file = find_local_file(model, PLAN_FILE) if model else None
    return PruningPlan.load(file.parent) if file else None


def _pruned_model(subject: Subject) -> str | None:
    """Folder or hub id of the pruned model that an adapter was trained on, where it is recorded."""
    trained = subject.record.get("trained") or subject.record.get("training") or {}
    if trained.get("pruned_model") or subject.record["kind"] == "recovered-adapter":
        return trained.get("pruned_model")
    has_config = (subject.folder / ADAPTER_CONFIG).exists()
    return named_model(subject.folder) if has_config else None


def _finite(tensor: StoredTensor) -> bool:
    return all(finite(block, tensor.dtype) for block in tensor.blocks())


def empty_tensors(adapter: Checkpoint) -> list[str]:
    """Tensors without elements: what a rank saves of weights that ZeRO-3 keeps elsewhere."""
    return [name for name, tensor in adapter.tensors.items() if 0 in tensor.shape]


def untrained_tensors(adapter: Checkpoint) -> list[str]:
    """Of each pair the one that starts at zero, where it still is zero: BA is no update."""
    return [
        tensor.name
        for tensor in adapter.tensors.values()
        if split_name(tensor.name)[1] in STARTS_AT_ZERO
        and 0 not in tensor.shape
        and not any(block.any() for block in _values(tensor))
    ]


def broken_tensors(adapter: Checkpoint) -> list[str]:
    """Tensors with an infinity or NaN."""
    return [tensor.name for tensor in adapter.tensors.values() if not _finite(tensor)]


def _values(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Blocks of bits without the sign, so that −0 is a zero."""
    return (np.left_shift(block, 1) for block in tensor.blocks())


PROBLEMS = {
    "empty, which is what ZeRO-3 leaves where nothing was gathered": empty_tensors,
    "without its partner of A and B": unpaired_tensors,
    "all zero, so that BA is no update: never trained, or lost in saving": untrained_tensors,
    "infinite or not a number: training diverged": broken_tensors,
}
"""What can be wrong with tensors → finding those."""
