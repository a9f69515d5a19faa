"""The pruning plan: which units of the base model are kept, and of which base."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import (
    Config,
    check_config,
    family_of,
    layer_count,
    sizes_of,
)
from axolotl_loram.architecture.model import Tensor, changed, config_changes, layer_groups, tensors
from axolotl_loram.architecture.spaces import Dim, Group, Kept, kept_features
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import open_safetensors, write_safetensors
from axolotl_loram.files.untrusted import check_types, parse_json

LOG = logging.getLogger(__name__)
PLAN_FILE = "loram_plan.safetensors"
SCHEMA_VERSION = 1
MOST_LIST_BYTES = 2**26
"""Of one list of a plan: 16 million units."""


@dataclass(frozen=True)
class Base:
    """The model that a plan prunes.

    Attributes:
        revision: Commit (or branch) on the hub, None for a folder.
        fingerprint: `Checkpoint.fingerprint` of its weights; None while they were not read.
    """

    id: str
    revision: str | None = None
    fingerprint: str | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any], where: object) -> Base:
        """Read what a plan or record says of its base.

        Raises:
            LoRAMError: It says something else.
        """
        optional = (str, type(None))
        check_types(value, {"id": str, "revision": optional, "fingerprint": optional}, where)
        if "id" not in value:
            raise LoRAMError(f"expected {where} to name its base, found no id: the file is damaged")
        return cls(value["id"], value.get("revision"), value.get("fingerprint"))


@dataclass(frozen=True)
class PruningPlan:
    """Kept units per layer and kind, ascending; entries that are missing are whole.

    Attributes:
        config: The base model's config, defaults filled in.
        kept: Entry, such as ``model.layers.17.mlp`` → int32 indices of kept units; of units inside
            others, (kept others, kept units), a row for each.
        masks: Weight that was made sparse → `mask_digest` of what is left of it. Its mask is W ≠ 0
            in the pruned checkpoint: the digest tells whether that is still so.
    """

    config: Config
    kept: Mapping[str, np.ndarray]
    base: Base = field(default_factory=lambda: Base("unknown"))
    masks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        entries = {entry: (layer, group) for entry, layer, group in entries_of(self.config)}
        for name, units in self.kept.items():
            if name not in entries:
                raise LoRAMError(
                    f"expected a plan of {next(iter(entries))} … {list(entries)[-1]}, found an "
                    f"entry {name}: the plan was made for another model"
                )
            layer, group = entries[name]
            sizes, rows = sizes_of(self.config, layer), None
            if group.inside:
                around = self.kept_in(layer).get(group.inside)
                rows = sizes[group.inside] if around is None else len(around)
            if units.size or layer not in self.removed:
                _check_units(name, units, sizes[group.kind], rows, group.fewest(sizes))
        gone = len(self.removed)
        if gone == layer_count(self.config) or self.removed != list(range(gone)):
            raise LoRAMError(
                "expected a plan that removes whole layers from the first on, and not all, found "
                f"one without layers {self.removed}: the plan is damaged"
            )
        known = (tensor.name for tensor in tensors(self.config)) if self.masks else ()
        unknown = set(self.masks).difference(known)
        if unknown:
            raise LoRAMError(
                f"expected masks of weights that the base has, found one of {min(unknown)}: the "
                "plan was made for another model"
            )

    def kept_in(self, layer: int | None) -> Kept:
        """Kept units by kind in a layer (none for what lies outside the layers)."""
        if layer is None:
            return {}
        family = family_of(self.config)
        entries = {group.kind: family.entry(layer, group) for group in family.groups}
        return {kind: self.kept[name] for kind, name in entries.items() if name in self.kept}

    def features(
        self, dims: tuple[Dim, ...], layer: int | None, slot: int | None = None
    ) -> list[np.ndarray | None]:
        """For each dimension, the kept features' positions in the base, None where all are.

        Args:
            dims: The dimensions.
            layer: Their layer.
            slot: For what is inside one expert: its place among the kept ones.
        """
        kept = self.kept_in(layer)
        if not kept:
            return [None] * len(dims)
        if slot is not None:
            kept = {kind: units[slot] if units.ndim == 2 else units for kind, units in kept.items()}
        sizes = sizes_of(self.config, layer)
        return [kept_features(dim, sizes, kept) for dim in dims]

    def kept_experts(self, layer: int | None) -> np.ndarray:
        """The base's numbers of the experts that a layer keeps."""
        if layer is None:
            return np.arange(0)
        whole = np.arange(sizes_of(self.config, layer).get("experts", 0))
        return self.kept_in(layer).get("experts", whole)

    def inside_experts(self, tensor: Tensor) -> bool:
        """Whether a tensor stacks experts that keep different features each."""
        kept = self.kept_in(tensor.layer)
        return any(kind in kept and kept[kind].ndim == 2 for kind in tensor.kinds)

    @cached_property
    def removed(self) -> list[int]:
        """The layers that keep no unit of any kind: they hand their input on."""
        left: dict[int, int] = {}
        for name, layer, group in entries_of(self.config):
            if not group.inside:
                left[layer] = left.get(layer, 0) + len(self.kept.get(name, (None,)))
        return [layer for layer, units in left.items() if not units]

    def check_runs_alone(self, where: object, remedy: str) -> None:
        """Refuse a pruned model that says nothing without the original's hidden states."""
        if self.removed:
            raise LoRAMError(
                f"expected a pruned model that runs by itself, found {where}, whose first "
                f"{len(self.removed)} layers are removed: {remedy}"
            )

    @cached_property
    def counts(self) -> dict[int, dict[str, int]]:
        """Layer → kind → units kept, of the layers that are not whole."""
        counted: dict[int, dict[str, int]] = {}
        for name, layer, group in entries_of(self.config):
            if name in self.kept:
                counted.setdefault(layer, {})[group.kind] = self.kept[name].shape[-1]
        return counted

    @cached_property
    def changes(self) -> dict[str, Any]:
        """What the pruned model's config says differently from the base's, in its own section."""
        return config_changes(self.config, self.counts)

    @cached_property
    def pruned_config(self) -> dict[str, Any]:
        """The pruned model's config."""
        return changed(self.config, self.changes)

    @property
    def digest(self) -> str:
        """SHA-256 of what is kept: what binds an adapter to the plan it was trained under."""
        hashed = hashlib.sha256()
        for name in sorted(self.kept):
            hashed.update(name.encode() + b"\0" + self.kept[name].astype("<i4").tobytes())
        for name in sorted(self.masks):
            hashed.update(f"{name}\0{self.masks[name]}".encode())
        return f"sha256:{hashed.hexdigest()}"

    def save(self, folder: Path) -> str:
        """Write `loram_plan.safetensors`; returns its SHA-256."""
        about = {
            "schema_version": SCHEMA_VERSION,
            "base": vars(self.base),
            "base_config": dict(self.config),
            "masks": dict(self.masks),
        }
        names = sorted(self.kept)
        described = [(name, "I32", self.kept[name].shape) for name in names]
        units = (self.kept[name].astype("<i4") for name in names)
        return write_safetensors(folder / PLAN_FILE, described, units, {"loram": json.dumps(about)})

    @classmethod
    def load(cls, folder: Path) -> PruningPlan:
        """Read `loram_plan.safetensors` and check it.

        Raises:
            LoRAMError: No plan, a damaged one, or one written by a newer version.
        """
        file = folder / PLAN_FILE
        if not file.exists():
            raise LoRAMError(
                f"expected {PLAN_FILE} in {folder}, found none: give the folder of a model that "
                "`axolotl-loram prune` wrote"
            )
        stored, metadata = open_safetensors(file)
        about = parse_json(metadata.get("loram", ""), file)
        version = about.get("schema_version")
        if version != SCHEMA_VERSION:
            raise LoRAMError(
                f"expected a plan of schema version {SCHEMA_VERSION}, found {version} in {file}: "
                "upgrade axolotl-loram"
            )
        check_types(about, {"base": dict, "base_config": dict, "masks": dict}, file)
        config, masks = about.get("base_config", {}), about.get("masks", {})
        base = Base.from_json(about.get("base", {}), file)
        check_config(config)
        for tensor in stored.values():
            if (
                tensor.dtype != "I32"
                or len(tensor.shape) not in (1, 2)
                or tensor.nbytes > MOST_LIST_BYTES
            ):
                raise LoRAMError(
                    f"expected lists of I32 in {file}, found {tensor.name} of {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        kept = {n: t.read().view("<i4").astype(np.int32) for n, t in stored.items()}
        return cls(config, kept, base, masks)


def mask_digest(weight: np.ndarray) -> str:
    """SHA-256 of a weight's support: its shape, and where it is not zero, as packed bits.

    Args:
        weight: Opaque bits as `StoredTensor.read` gives them (a negative zero is zero too), or
            values.
    """
    support = np.left_shift(weight, 1) if weight.dtype.kind == "u" else weight
    hashed = hashlib.sha256(json.dumps(weight.shape).encode())
    hashed.update(np.packbits(support != 0).tobytes())
    return f"sha256:{hashed.hexdigest()}"


Features = Sequence[np.ndarray | None]
"""For each axis of an array, the kept positions in the base, None where all are."""


def gather(array: np.ndarray, features: Features) -> np.ndarray:
    """What is kept of an array of the base's shape."""
    for axis, kept in enumerate(features):
        if kept is not None:
            array = array.take(kept, axis=axis)
    return array


def scatter(array: np.ndarray, features: Features, shape: tuple[int, ...]) -> np.ndarray:
    """The array of the base's `shape` that is `array` at the kept positions and zero elsewhere.

    The mirror of `gather`: gathering the result gives `array` back.
    """
    if all(kept is None for kept in features):
        return array
    whole = [np.arange(size) for size in shape]
    index = [all_ if kept is None else kept for all_, kept in zip(whole, features, strict=True)]
    result = np.zeros(shape, array.dtype)
    result[np.ix_(*index)] = array
    return result


def entries_of(config: Config) -> Iterator[tuple[str, int, Group]]:
    """Every (entry, layer, group) that a plan for `config` may have, in layer order."""
    family = family_of(config)
    for layer in range(layer_count(config)):
        for group in layer_groups(config, layer):
            yield family.entry(layer, group), layer, group


def _check_units(
    name: str, units: np.ndarray, available: int, rows: int | None, fewest: int
) -> None:
    shaped = units.ndim == 1 if rows is None else units.ndim == 2 and len(units) == rows
    ascending = shaped and units.shape[-1] >= fewest and bool((np.diff(units) > 0).all())
    if not ascending or units.min() < 0 or units.max() >= available:
        inside = "" if rows is None else f" of each of {rows}"
        raise LoRAMError(
            f"expected {name} to keep {fewest} to {available} units{inside}, ascending, each in "
            f"0…{available - 1}, found {np.array2string(units, threshold=6)}: the plan is damaged "
            "or for another model"
        )
