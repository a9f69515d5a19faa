"""Trying out a row: does it list all parameters, does pruning by it compute the same?"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from axolotl_loram.architecture import blocks, families, spaces
from axolotl_loram.architecture.model import parameters, tensors
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import Family
from axolotl_loram.config import PruningArgs
from axolotl_loram.models.per_layer import install
from axolotl_loram.propose.survey import Survey
from axolotl_loram.propose.tracing import (
    build_from,
    build_random,
    parameter_shapes,
    some_tokens,
    still_norms,
)
from axolotl_loram.pruning.prune import prune

EXACT = 1e-9
"""Logits of order 1 in float64 that differ by less are the same."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """Something tried.

    Attributes:
        outcome: "passed", "failed", or "estimate": pruning works, but a norm that runs over all
            units makes what is left an estimate.
    """

    what: str
    outcome: str
    found: str


def read_row(source: str) -> Family:
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
        if before:
            rows[family.model_type] = before  # in its old place: order is that of the table
        else:
            del rows[family.model_type]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks on odd little models, and its progress bars, to itself."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def try_out(family: Family, found: Survey) -> list[Tried]:
    """Check the row's lists of parameters and stored tensors, then prune by it, and run."""
    install()
    with declared(family):
        checks = [_try("parameters and their shapes", lambda: _same_tensors(found))]
        checks.append(_try("tensors of checkpoints", lambda: _same_stored(found)))
        for group in family.groups:
            name = f"pruned of half its {group.kind}, computes what zeros in their place do"
            checks.append(_try(name, lambda kind=group.kind: _same_logits(found, kind)))
    return checks


def _try(what: str, check: Any) -> Tried:
    try:
        outcome, measured = check()
    except Exception as error:  # the row is wrong in a way that no check foresaw
        return Tried(what, "failed", f"{type(error).__name__}: {error}")
    return Tried(what, outcome, measured)


def _same_tensors(found: Survey) -> tuple[str, str]:
    """At three sets of sizes, with every flag either way, and once as deep as the real model."""
    flags = {condition.lstrip("!") for condition in found.conditions.values()} - {*found.refused}
    configs = [found.fields(0, **found.depth), *map(found.fields, range(3))]
    for fields in configs[1:]:
        usual = {**found.known, **fields}
        configs += [{**fields, flag: not usual.get(flag)} for flag in sorted(flags)]
    for fields in configs:
        model = build_from(found.model_type, fields)
        real = parameter_shapes(model)
        listed = {tensor.name: tensor.shape for tensor in parameters(model.config.to_dict())}
        for name in sorted(real.keys() | listed.keys()):
            if real.get(name) != listed.get(name):
                return "failed", f"{name}: {real.get(name)}, in the row {listed.get(name)}"
    return "passed", f"the same in {len(configs)} configs"


def _same_stored(found: Survey) -> tuple[str, str]:
    model = build_random(found.model_type, found.fields(0))
    stored = {name: shape for name, shape, _ in _saved(model)}
    listed = {t.name: t.shape for t in tensors(model.config.to_dict())}
    odd = sorted(stored.items() ^ listed.items())
    if odd:
        return "failed", f"{odd[0][0]}: {stored.get(odd[0][0])}, in the row {listed.get(odd[0][0])}"
    return "passed", f"{len(stored)} of the same names and shapes"


def _same_logits(found: Survey, kind: str) -> tuple[str, str]:
    """The largest difference between pruned and masked model."""
    largest = _difference(found, kind)
    told = f"largest difference of logits {largest:.1e}"
    if largest < EXACT:
        return "passed", told
    other = _difference(found, kind, with_norms=False)
    told += f", {other:.1e} without norms"
    return ("estimate", told) if other < EXACT else ("failed", told)


def _difference(found: Survey, kind: str, with_norms: bool = True) -> float:
    random = build_random(found.model_type, found.fields(1))  # other sizes than were traced
    with tempfile.TemporaryDirectory() as folder:
        base, output = Path(folder) / "base", Path(folder) / "pruned"
        random.save_pretrained(base)
        prune(
            str(base),
            output,
            PruningArgs.parse(ratio=0.5, units=kind, protect_first=0, protect_last=0),
        )
        whole, narrow = _load(base), _load(output)
        _zero_what_is_gone(whole, PruningPlan.load(output))
    if not with_norms:
        still_norms(whole)
        still_norms(narrow)
    with torch.no_grad():
        text = some_tokens(whole.config.vocab_size)
        difference = whole(text, use_cache=False).logits - narrow(text, use_cache=False).logits
    return difference.abs().max().item()


def _load(folder: Path) -> PreTrainedModel:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    return model.requires_grad_(False)


def _zero_what_is_gone(whole: PreTrainedModel, plan: PruningPlan) -> None:
    weights = whole.state_dict()
    for tensor in parameters(plan.config):
        weight = weights[tensor.name]
        for axis, features in enumerate(plan.features(tensor.dims, tensor.layer)):
            if features is not None:
                gone = np.setdiff1d(np.arange(weight.shape[axis]), features)
                weight.index_fill_(axis, torch.from_numpy(gone), 0)


def _saved(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...], float]]:
    """Name, shape and sum of the tensors that a model's checkpoint has."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
