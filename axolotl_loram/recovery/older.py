"""Adapters from before transformers 4.52 and 5, whose modules are called or stacked otherwise now.

They are read as PEFT (0.20) loads them: under today's names, with the LoRA of experts that were
modules once laid out for the parameter that stacks them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import Config, family_of
from axolotl_loram.architecture.lora_names import PREFIX, split_name
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.spaces import EXPERTS
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.stored import StoredTensor
from axolotl_loram.memory.trained import FIRST, OLD_NAMES, ROUTER

OF_ONE = re.compile(rf"{re.escape(PREFIX)}(.+\.experts)\.(\d+)\.(\w+)\.(lora_[AB])\.weight")
"""LoRA of one expert: the experts, which of them, its module, A or B."""
PARTS = ("lora_A", "lora_B")
NAMING = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
KEYED = ("rank_pattern", "alpha_pattern", "trainable_token_indices")
"""What of an adapter's config is lists of modules' names, and what goes by them."""
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Stacked(StoredTensor):
    """LoRA of experts that were modules once, as PEFT lays it out for their stack.

    A is (experts · r, input), expert by expert, and B (output, r · experts), rank by rank. Of gate
    and up, which are one parameter today, A's are end to end, and B's on a diagonal of blocks.
    """

    experts: tuple[tuple[StoredTensor, ...], ...]
    is_a: bool

    def read(self) -> np.ndarray:
        """The tensor's bits."""
        each = [[part.read() for part in own] for own in self.experts]
        if self.is_a:
            return np.concatenate([a for own in each for a in own])
        blocks = np.stack([_diagonal(own) for own in each])  # (experts, output, r)
        return np.ascontiguousarray(blocks.transpose(1, 2, 0)).reshape(self.shape)

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """As `StoredTensor.blocks`, in one."""
        yield self.read() if rows is None else self.read()[rows]


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    shape = [sum(block.shape[axis] for block in blocks) for axis in (0, 1)]
    whole, row, column = np.zeros(shape, blocks[0].dtype), 0, 0
    for block in blocks:
        rows, columns = block.shape
        whole[row : row + rows, column : column + columns] = block
        row, column = row + rows, column + columns
    return whole


def names_of_today(names: Iterable[str], config: Config) -> dict[str, str]:
    """What an adapter calls its tensors → what PEFT takes that for today.

    Before transformers 4.52 and 5, modules of some families were called as checkpoints still call
    them, such as ``language_model.model.layers`` for ``model.language_model.layers``.

    Args:
        names: The adapter's names.
        config: Of the model that it is for.
    """
    family = family_of(config)
    running = {*(f"{module}." for module in _modules(config)), *family.whole}
    older = {family.stored_name(today): today for today in running} if family.stored else {}
    found = {}
    for name in names:
        path = name.removeprefix(PREFIX)
        old = next((old for old in older if old not in running and path.startswith(old)), None)
        found[name] = name if old is None else PREFIX + older[old] + path.removeprefix(old)
    return found


def _modules(config: Config) -> set[str]:
    """Declared modules of the running model; a tied lm_head can be adapted too."""
    return {"lm_head", *(tensor.module for tensor in parameters(config))}


def settings_of_today(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """An adapter's config in which lists name modules as they are called today.

    Args:
        settings: Its config.
        config: Of the model that it is for.
    """
    family, modules = family_of(config), _modules(config)

    def ends(name: str) -> bool:
        return any(f".{module}".endswith(f".{name}") for module in modules)

    def today(name: Any) -> Any:
        renamed = f".{name}."
        for new, old in reversed(family.stored):
            renamed = renamed.replace(f".{old.lstrip('.')}", f".{new.lstrip('.')}")
        renamed = renamed.strip(".")
        return renamed if isinstance(name, str) and not ends(name) and ends(renamed) else name

    changes: dict[str, Any] = {}
    for key in (*NAMING, *KEYED) if family.stored else ():
        value = settings.get(key)
        if isinstance(value, list) and key in NAMING:
            changes[key] = [today(name) for name in value]
        elif isinstance(value, dict):
            changes[key] = {today(name): part for name, part in value.items()}
    return {**settings, **changes}


def of_today(
    tensors: Tensors, settings: Mapping[str, Any], config: Config
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """An adapter's tensors and config as PEFT takes them today.

    Args:
        tensors: Its tensors.
        settings: Its config.
        config: Of the model whose shapes it has.

    Raises:
        LoRAMError: A tensor is there under two names, or as of `with_stacks`.
    """
    names = names_of_today(tensors, config)
    both = [old for old, new in names.items() if old != new and new in names]
    if both:
        raise LoRAMError(
            f"expected each tensor of an adapter under one name, found {both[0]} and "
            f"{names[both[0]]}, which are one today: save the adapter again"
        )
    renamed = {new: replace(tensors[old], name=new) for old, new in names.items()}
    return with_stacks(renamed, settings_of_today(settings, config), config)


def with_stacks(
    tensors: Tensors, settings: Mapping[str, Any], config: Config
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """An adapter's tensors and config, with LoRA on single experts as LoRA on their stacks.

    Args:
        tensors: Its tensors, by today's names of modules.
        settings: Its config.
        config: Of the model that it is for.

    Raises:
        LoRAMError: PEFT does not take it for one of stacks, or not all experts have the same.
    """
    stacks = [tensor for tensor in parameters(config) if tensor.role == EXPERTS]
    modules = {tensor.module for tensor in stacks}
    found = map(OF_ONE.fullmatch, tensors)
    single = {name[0] for name in found if name and name[1] in modules}
    if not single:
        return dict(tensors), dict(settings)
    family, rank = str(config["model_type"]), settings.get("r", 8)
    if family not in OLD_NAMES:
        raise LoRAMError(
            f"expected LoRA on the stacked experts of a {family} model, found {min(single)} of a "
            "single one, from before transformers 5, which PEFT does not load: train it again"
        )
    gate, up, down = OLD_NAMES[family]
    made: dict[str, Stacked] = {}
    targets = {tensor.name: 0 for tensor in stacks}
    for tensor in stacks:
        first = tensor.name.endswith(FIRST)
        leaves = (gate, up) if first else (down,)
        wanted = [
            [f"{PREFIX}{tensor.module}.{expert}.{leaf}" for leaf in leaves]
            for expert in range(tensor.shape[0])
        ]
        if not single.isdisjoint(f"{name}.lora_A.weight" for own in wanted for name in own):
            of_down = re.compile(rf".*{re.escape(tensor.module)}\.\d+\.{down}\..*")
            inner = ".base_layer" if first and any(map(of_down.fullmatch, single)) else ""
            for part in PARTS:
                name = f"{PREFIX}{tensor.module}{inner}.{part}.weight"
                made[name] = _stacked(name, part, wanted, tensors, rank)
            targets[tensor.name] = rank * len(wanted[0])
    rest = {name: tensor for name, tensor in tensors.items() if name not in single}
    return {**rest, **made}, _settings_of_stacks(settings, rest, targets, family)


def _stacked(name: str, part: str, wanted: list[list[str]], tensors: Tensors, rank: int) -> Stacked:
    """One tensor of what the experts have.

    Raises:
        LoRAMError: One has none, or of another rank, shape or dtype.
    """
    experts = []
    for own in wanted:
        missing = next((each for each in own if f"{each}.{part}.weight" not in tensors), None)
        if missing:
            raise LoRAMError(
                f"expected LoRA on all experts or on none, and on gate and up alike, found no "
                f"{missing}.{part}.weight: they are one parameter today, so train it again"
            )
        experts.append(tuple(tensors[f"{each}.{part}.weight"] for each in own))
    is_a = part == "lora_A"
    first = experts[0][0]
    for each in itertools.chain(*experts):
        ranked = each.shape[0 if is_a else -1] == rank and len(each.shape) == 2
        if not ranked or (each.shape, each.dtype) != (first.shape, first.dtype):
            raise LoRAMError(
                f"expected LoRA of rank {rank} and of one shape on all experts, found {each.name} "
                f"of {each.dtype} {list(each.shape)}: they are one parameter today"
            )
    count, parts = len(experts), len(experts[0])
    ranks = rank * parts * count
    shape = (ranks, first.shape[1]) if is_a else (first.shape[0] * parts, ranks)
    return Stacked(name, first.dtype, shape, first.file, first.start, tuple(experts), is_a)


def _settings_of_stacks(
    settings: Mapping[str, Any], rest: Tensors, targets: Mapping[str, int], family: str
) -> dict[str, Any]:
    """The config as PEFT turns it (0.20), with the same update: α over r, or its root, stays.

    Args:
        settings: The config.
        rest: The adapter's other tensors.
        targets: Stacked parameter → its rank, 0 where there is no LoRA on it.
        family: The model's type.
    """
    modules = {split_name(name)[0] for name in rest if ".lora_" in name}
    routers = {module for module in modules if module.endswith(f".mlp.{ROUTER}")}
    named = settings.get("target_modules")
    old = {ROUTER, *OLD_NAMES[family]}
    kept = [n for n in named if n.rpartition(".")[2] not in old] if isinstance(named, list) else []
    rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
    of_stacks = {name: ranks for name, ranks in targets.items() if ranks}
    scale = (lambda times: math.sqrt(times)) if settings.get("use_rslora") else float
    return {
        **settings,
        "target_modules": kept if isinstance(named, list) else sorted(modules - routers),
        "target_parameters": [
            *(settings.get("target_parameters") or ()),
            *of_stacks,
            *(f"{router}.weight" for router in sorted(routers)),
        ],
        "rank_pattern": {
            **(settings.get("rank_pattern") or {}),
            **{name: ranks for name, ranks in of_stacks.items() if ranks != rank},
        },
        "alpha_pattern": {
            **(settings.get("alpha_pattern") or {}),
            **{n: alpha * scale(ranks // rank) for n, ranks in of_stacks.items() if ranks != rank},
        },
    }
