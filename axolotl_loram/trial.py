"""Trying out a row: does it list the model's parameters, and does pruning by it compute the same?"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from axolotl_loram import blocks, families, spaces
from axolotl_loram.architecture import changed, config_changes, layer_count, parameters, tensors
from axolotl_loram.spaces import Family, Kept, kept_features
from axolotl_loram.survey import Survey
from axolotl_loram.tracing import build, build_random, some_tokens

EXACT = 1e-9
"""Logits of order 1 in float64 that differ by less are the same."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Something tried: what, whether it held, and what was measured or went wrong."""

    what: str
    passed: bool
    found: str


def evaluate(source: str) -> Family:
    """The row that a source is of: what is printed is what is tried out."""
    names = {**vars(spaces), **vars(blocks), "replace": dataclasses.replace}
    return eval(source, names)


@contextmanager
def declared(family: Family) -> Iterator[None]:
    """Within it, the row is in `FAMILIES`, in place of another of the same model type."""
    rows: dict[str, Family] = families.FAMILIES  # type: ignore[assignment]
    before = rows.get(family.model_type)
    rows[family.model_type] = family
    try:
        yield
    finally:
        del rows[family.model_type]
        if before:
            rows[family.model_type] = before


def try_out(family: Family, found: Survey) -> list[Check]:
    """Check the row's list of parameters, and each kind of unit at two sets of sizes."""
    with declared(family):
        checks = [_try("parameters and their shapes", lambda: _same_tensors(found))]
        checks.append(_try("tensors of checkpoints", lambda: _same_stored(found)))
        for group in family.groups:
            name = f"without half of the {group.kind}, computes what zeros in their place do"
            checks.append(_try(name, lambda kind=group.kind: _same_logits(found, kind)))
    return checks


def _try(what: str, check: Any) -> Check:
    try:
        passed, measured = check()
    except Exception as error:  # the row is wrong in a way that no check foresaw
        return Check(what, False, f"{type(error).__name__}: {error}")
    return Check(what, passed, measured)


def _same_tensors(found: Survey) -> tuple[bool, str]:
    """At three sets of sizes, with every flag either way."""
    flags = {condition.lstrip("!") for condition in found.conditions.values()}
    tried = 0
    for at in range(3):
        for flag in (None, *sorted(flags)):
            fields = found.fields(at)
            if flag:
                fields[flag] = not fields.get(flag, found.known.get(flag))
            model = build(found.model_type, fields)
            real = {name: tuple(p.shape) for name, p in model.named_parameters()}
            listed = {t.name: t.shape for t in parameters(model.config.to_dict())}
            for name in sorted(real.keys() | listed.keys()):
                if real.get(name) != listed.get(name):
                    return False, f"{name}: {real.get(name)}, in the row {listed.get(name)}"
            tried += 1
    return True, f"the same in {tried} configs"


def _same_stored(found: Survey) -> tuple[bool, str]:
    model = build_random(found.model_type, found.fields(0))
    stored = {name: shape for name, shape, _ in _saved(model)}
    listed = {t.name: t.shape for t in tensors(model.config.to_dict())}
    odd = sorted(stored.items() ^ listed.items())
    return not odd, f"{len(stored)} tensors" if not odd else f"not the same: {odd[0]}"


def _same_logits(found: Survey, kind: str) -> tuple[bool, str]:
    """The largest difference between pruned and masked model, at two sets of sizes."""
    largest = 0.0
    for at in (0, 1):
        whole = build_random(found.model_type, found.fields(at))
        config = whole.config.to_dict()
        units = next(iter(parameters_with(kind, config))).sizes[kind]
        count, changes = _uniform_changes(config, kind, units)
        kept = {kind: np.sort(np.random.default_rng(at).permutation(units)[:count])}
        narrow = _prune(whole, config, kept, changes)
        text = some_tokens(whole.config.vocab_size)
        difference = whole(text, use_cache=False).logits - narrow(text, use_cache=False).logits
        largest = max(largest, difference.abs().max().item())
    return largest < EXACT, f"largest difference of logits {largest:.1e}"


def parameters_with(kind: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """Parameters that have units of a kind."""
    return (tensor for tensor in parameters(config) if kind in tensor.kinds)


def _uniform_changes(
    config: Mapping[str, Any], kind: str, units: int
) -> tuple[int, dict[str, Any]]:
    """Half of the units or fewer, such that transformers takes the config, and its changes."""
    for count in range(units // 2, 0, -1):
        counts = {layer: {kind: count} for layer in range(layer_count(config))}
        changes = config_changes(config, counts)
        if "per_layer_config" not in changes:
            return count, changes
    raise ValueError(f"no model has fewer than {units} {kind}")


def _prune(
    whole: PreTrainedModel, config: Mapping[str, Any], kept: Kept, changes: dict[str, Any]
) -> PreTrainedModel:
    """The model of the kept units; those that are gone become zeros in `whole`."""
    fields = changed(config, changes)
    narrow = build_random(fields.pop("model_type"), fields)
    weights, own = dict(narrow.named_parameters()), dict(whole.named_parameters())
    for tensor in parameters(config):
        weight = own[tensor.name]
        gathered = weight
        gone = torch.zeros_like(weight, dtype=torch.bool)
        for axis, dim in enumerate(tensor.dims):
            features = kept_features(dim, tensor.sizes, kept)
            if features is not None:
                index = torch.from_numpy(features)
                gathered = gathered.index_select(axis, index)
                outside = torch.ones(weight.shape[axis], dtype=torch.bool)
                outside[index] = False
                gone |= outside.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
        if gathered.shape != weights[tensor.name].shape:
            raise ValueError(
                f"{tensor.name} is {tuple(gathered.shape)} without them, "
                f"{tuple(weights[tensor.name].shape)} in the model of the changed config"
            )
        weights[tensor.name].copy_(gathered)
        weight[gone] = 0
    return narrow


def _saved(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, shape and sum of the tensors that a model's checkpoint has."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
    if bars:
        logging.enable_progress_bar()
    return [(name, tuple(t.shape), t.double().sum().item()) for name, t in stored.items()]


def stored_names(model: PreTrainedModel) -> tuple[tuple[str, str], ...]:
    """Replacements that turn parameters' names into those of the model's checkpoint.

    Tensors are told by their sums, which random weights make unique.
    """
    ours = {p.double().sum().item(): name for name, p in model.named_parameters()}
    found: dict[tuple[str, str], None] = {}
    for theirs, _, total in _saved(model):
        name = ours.get(total, theirs)
        if name != theirs:
            one, other = name.split("."), theirs.split(".")
            while one and other and one[-1] == other[-1]:
                one.pop(), other.pop()
            while one and other and one[0] == other[0]:
                one.pop(0), other.pop(0)
            found[f"{'.'.join(one)}.", f"{'.'.join(other)}."] = None
    return tuple(found)
