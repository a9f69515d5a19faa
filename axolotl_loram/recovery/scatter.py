"""Which features of the base each tensor of an adapter lies along, and moving it there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import Config, family_of, sizes_of
from axolotl_loram.architecture.lora_names import ORIGINAL, depth_of, split_name
from axolotl_loram.architecture.model import Tensor, embedding_module, parameters
from axolotl_loram.architecture.plan import PruningPlan, gather, scatter
from axolotl_loram.architecture.spaces import EXPERTS, Dim
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import StoredTensor, finite
from axolotl_loram.recovery.adapter import Adapter

LORA_AXES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "lora_A.weight": ((1, 1),),
    "lora_B.weight": ((0, 0),),
    "lora_B.bias": ((0, 0),),
    "lora_embedding_A": ((1, 0),),
    "lora_embedding_B": ((0, 1),),
}
"""Part of a LoRA → (its axis, the axis of the adapted weight that it lies along), but for rank.

A is (r, input), B is (output, r), and a linear weight is (output, input). Of an embedding, which is
(vocabulary, hidden), A is (r, vocabulary) and B (hidden, r).
"""
VOCABULARY_AXES = {
    **{"weight": 0, ORIGINAL: 0, "lora_B.weight": 0, "lora_B.bias": 0},
    "lora_embedding_A": 1,
}
"""Part of an embedding or lm_head → its axis along the vocabulary."""


@dataclass(frozen=True)
class Stack:
    """How LoRA of several experts lies in one matrix: which experts are kept, and what of each.

    Attributes:
        rank: r.
        kept: The base's numbers of the kept experts.
        features: What is kept along the other axis, for each kept expert.
        experts: How many the base has.
        is_a: Whether the matrix is A, (experts · r, input), or B, (output, r · experts).
    """

    rank: int
    kept: np.ndarray
    features: Sequence[np.ndarray | None]
    experts: int
    is_a: bool

    def expert_first(self, matrix: np.ndarray) -> np.ndarray:
        """The matrix as (experts, r, features), a view."""
        if self.is_a:
            return matrix.reshape(-1, self.rank, matrix.shape[1])
        return matrix.reshape(len(matrix), self.rank, -1).transpose(2, 1, 0)

    def scatter(self, narrow: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The base's matrix: zero but for the kept features of the kept experts."""
        whole = np.zeros(shape, narrow.dtype)
        theirs, ours = self.expert_first(whole), self.expert_first(narrow)
        for slot, expert in enumerate(self.kept):
            theirs[expert][:, _or_all(self.features[slot])] = ours[slot]
        return whole

    def gather(self, whole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The pruned model's matrix: the kept features of the kept experts."""
        narrow = np.empty(shape, whole.dtype)
        theirs, ours = self.expert_first(whole), self.expert_first(narrow)
        for slot, expert in enumerate(self.kept):
            ours[slot] = theirs[expert][:, _or_all(self.features[slot])]
        return narrow


def _or_all(features: np.ndarray | None) -> Any:
    return slice(None) if features is None else features


@dataclass(frozen=True)
class Moved:
    """One adapter tensor: where it comes from, the shape it will have, the features it keeps."""

    stored: StoredTensor
    shape: tuple[int, ...]
    features: tuple[np.ndarray | None, ...]
    stack: Stack | None = None

    def read(self) -> np.ndarray:
        """The tensor's bits.

        Raises:
            LoRAMError: They hold a NaN or an infinity.
        """
        bits = self.stored.read()
        if not finite(bits, self.stored.dtype):
            raise LoRAMError(
                f"expected finite weights in the adapter, found NaN or infinity in "
                f"{self.stored.name} of {self.stored.file}: training diverged, so give an earlier "
                "checkpoint, or train with a lower learning rate"
            )
        return bits

    def scatter(self) -> np.ndarray:
        """The tensor with zeros at pruned features, bits unchanged at kept ones."""
        bits = self.read()
        if self.stack:
            return self.stack.scatter(bits, self.shape)
        return scatter(bits, self.features, self.shape)

    def gather(self) -> np.ndarray:
        """The tensor at kept features."""
        bits = self.read()
        return self.stack.gather(bits, self.shape) if self.stack else gather(bits, self.features)


def match(adapter: Adapter, plan: PruningPlan, full_size: bool) -> list[Moved]:
    """Each adapter tensor, in stored order: the features of the base it lies along, its new shape.

    Args:
        adapter: The adapter.
        plan: The plan.
        full_size: Whether its tensors have the base's shapes (to gather) or the pruned model's
            (to scatter).

    Raises:
        LoRAMError: A tensor is none of LoRA's, is empty, or its shape does not fit the plan.
    """
    declared: dict[str, list[Tensor]] = {}
    vocabulary = {"vocabulary": vocabulary_of(adapter.tensors, plan.config)}
    for tensor in parameters(plan.config):
        if not tensor.bias:
            tensor = replace(tensor, sizes={**tensor.sizes, **vocabulary})
            declared.setdefault(tensor.module, []).append(tensor)
    tied = declared.get(embedding_module(plan.config) or "")
    if tied:  # a tied lm_head is not stored, but can be adapted
        declared.setdefault("lm_head", tied)
    depths = _depths(adapter)
    moved = []
    for stored in adapter.tensors.values():
        module, part = split_name(stored.name)
        adapted = declared.get(module, [])
        _check_dimensions(stored, part)
        if part in LORA_AXES and adapted:
            if adapted[0].role == EXPERTS:
                adapted = _targeted(adapted, module, adapter, depths[module])
                adapted = adapted[depths[module] - depth_of(stored.name) :]
            moved.append(_match_lora(stored, part, adapted[0], plan, full_size))
        else:
            moved.append(_match_whole(stored, module, adapted[0] if adapted else None, plan))
    return moved


def vocabulary_of(tensors: Mapping[str, StoredTensor], config: Config) -> int:
    """How many tokens an adapter's embeddings have: the model's, or more where training added some.

    PEFT then saves them whole, and takes them only for a model whose vocabulary was grown as well.

    Raises:
        LoRAMError: They have fewer, or not all as many.
    """
    size = sizes_of(config).get("vocabulary", 0)
    modules, found = (embedding_module(config), "lm_head"), {}
    for name, tensor in tensors.items():
        module, part = split_name(name)
        axis = VOCABULARY_AXES.get(part, 2)
        if module in modules and axis < len(tensor.shape) and 0 not in tensor.shape:
            found[tensor.shape[axis]] = name
    wrong = sorted(found.keys() - {max([size, *found])})
    if wrong:
        raise LoRAMError(
            f"expected embeddings for {max([size, *found])} tokens, found {wrong[0]} in "
            f"{found[wrong[0]]}: this adapter was made for another model"
        )
    return max([size, *found])


def _check_dimensions(stored: StoredTensor, part: str) -> None:
    """Refuse what is no matrix (or vector, of a bias): ZeRO-3 leaves tensors of shape (0,)."""
    wanted = (1 if part == "lora_B.bias" else 2) if part in LORA_AXES else len(stored.shape)
    if 0 in stored.shape or len(stored.shape) != wanted:
        raise LoRAMError(
            f"expected {stored.name} to be whole, found shape {list(stored.shape)}: the "
            "adapter was not gathered when it was saved"
        )


def _depths(adapter: Adapter) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name in adapter.tensors:
        module, _ = split_name(name)
        depths[module] = max(depths.get(module, 0), depth_of(name))
    return depths


def _targeted(adapted: list[Tensor], module: str, adapter: Adapter, deepest: int) -> list[Tensor]:
    """The parameters of a module that LoRA is on: PEFT wraps the first of them innermost.

    Raises:
        LoRAMError: The adapter's config names another number of them than it has tensors for.
    """
    targets = adapter.target_parameters
    chosen = [t for t in adapted if any(t.name == x or t.name.endswith(f".{x}") for x in targets)]
    if len(chosen) != deepest + 1:
        raise LoRAMError(
            f"expected LoRA on {deepest + 1} parameters of {module}, found target_parameters "
            f"{list(targets)} in its config: this adapter was made for another model"
        )
    return chosen


def _match_lora(
    stored: StoredTensor, part: str, tensor: Tensor, plan: PruningPlan, full_size: bool
) -> Moved:
    if tensor.role == EXPERTS:
        return _match_experts(stored, part, tensor, plan, full_size)
    features: list[np.ndarray | None] = [None] * len(stored.shape)
    shape = list(stored.shape)
    for axis, weight_axis in LORA_AXES[part]:
        dim: Dim = tensor.dims[weight_axis]
        (kept,) = plan.features((dim,), tensor.layer)
        whole = sum(space.size(tensor.sizes) for space in dim)
        narrow = whole if kept is None else len(kept)
        expected, shape[axis] = (whole, narrow) if full_size else (narrow, whole)
        features[axis] = kept
        if axis >= len(stored.shape) or stored.shape[axis] != expected:
            raise _wrong_shape(stored, axis, expected, full_size)
    return Moved(stored, tuple(shape), tuple(features))


def _wrong_shape(stored: StoredTensor, axis: int, expected: int, full_size: bool) -> LoRAMError:
    return LoRAMError(
        f"expected {stored.name} to have {expected} features along axis {axis}, found "
        f"shape {list(stored.shape)}: this adapter was "
        + ("made for another base" if full_size else "trained under another plan")
    )


def _match_experts(
    stored: StoredTensor, part: str, tensor: Tensor, plan: PruningPlan, full_size: bool
) -> Moved:
    """LoRA on stacked experts, as PEFT lays it out, in which each expert has its own features.

    A is (experts · r, input), expert by expert, and B (output, r · experts), rank by rank.
    """
    kept, base = plan.kept_experts(tensor.layer), tensor.shape[0]
    outputs, inputs = tensor.dims[:0:-1] if tensor.transposed else tensor.dims[1:]
    is_a = part == "lora_A.weight"
    dim, experts_axis = (inputs, 0) if is_a else (outputs, 1)
    features = [plan.features((dim,), tensor.layer, slot)[0] for slot in range(len(kept))]
    whole = sum(space.size(tensor.sizes) for space in dim)
    narrow = whole if features[0] is None else len(features[0])
    experts, size = (base, whole) if full_size else (len(kept), narrow)
    rank, rest = divmod(stored.shape[experts_axis], experts)
    if rest or rank == 0 or part == "lora_B.bias":
        raise _wrong_shape(stored, experts_axis, experts * max(rank, 1), full_size)
    if stored.shape[1 - experts_axis] != size:
        raise _wrong_shape(stored, 1 - experts_axis, size, full_size)
    new_experts, new_size = (len(kept), narrow) if full_size else (base, whole)
    shape = (new_experts * rank, new_size) if is_a else (new_size, rank * new_experts)
    return Moved(stored, shape, (), Stack(rank, kept, features, base, is_a))


def _match_whole(
    stored: StoredTensor, module: str, tensor: Tensor | None, plan: PruningPlan
) -> Moved:
    """A tensor that goes through as it is: a module saved whole that pruning does not touch."""
    if "lora_magnitude_vector" in stored.name:
        raise LoRAMError(f"expected a LoRA adapter, found {stored.name}: DoRA is not recoverable")
    untouched = f"{module}.".startswith(family_of(plan.config).whole)
    if tensor is None and not untouched:
        raise LoRAMError(
            f"expected tensors of modules that the base has, found {stored.name}: this adapter was "
            "made for another model"
        )
    if tensor is not None and tensor.kinds:
        raise LoRAMError(
            f"expected only modules that pruning leaves whole to be saved whole, found "
            f"{stored.name}: put no {module.rpartition('.')[2]} into lora_modules_to_save"
        )
    saved_whole = split_name(stored.name)[1] in ("weight", ORIGINAL)
    if tensor is not None and saved_whole and stored.shape != tensor.shape:
        raise LoRAMError(
            f"expected {stored.name} of shape {list(tensor.shape)}, found {list(stored.shape)}: "
            "this adapter was made for another model"
        )
    return Moved(stored, stored.shape, (None,) * len(stored.shape))
