"""Masked recovery: the base model with exactly the update that was trained, s (B A) ∘ M.

(B A) ∘ M has no low rank, so that no adapter can hold it: the result is an ordinary model folder.
It is written tensor by tensor, each computed in float32 and rounded to the base's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture.config_json import family_of, is_tied, sizes_of
from axolotl_loram.architecture.lora_names import ORIGINAL, split_name
from axolotl_loram.architecture.model import changed, embedding_module
from axolotl_loram.architecture.pairing import check_pair
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.record import Kind, Record
from axolotl_loram.errors import LoRAMError, not_finite
from axolotl_loram.files.atomic import check_vacant, new_folder, write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.quantized import without_format
from axolotl_loram.files.tensors import Checkpoint, StoredTensor, finite, write_shards
from axolotl_loram.files.untrusted import copy_files, read_json
from axolotl_loram.models.bits import TORCH_DTYPES, to_bits
from axolotl_loram.models.masked import add_update, pack, read_support
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.lora import as_torch, scaling
from axolotl_loram.recovery.recover import default_output
from axolotl_loram.recovery.scatter import Moved, vocabulary_of
from axolotl_loram.recovery.whole import check_adapter

LOG = logging.getLogger(__name__)
COPIED = ("config.json", "generation_config.json", *TOKENIZER_PATTERNS)
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "weight")
"""What can be merged of what an adapter holds for a module."""


def merge_masked(
    adapter: Path,
    pruned_model: str | None = None,
    output: Path | None = None,
    base: Base | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    of_run: bool = False,
) -> dict[str, Any]:
    """Write the base model with the trained update added; returns its record, and "output".

    Args:
        adapter: Folder of the adapter as trained, on a sparse pruned model.
        pruned_model: Folder or hub id of that model; by default what the adapter's config names.
        output: Folder to write, by default `merged-NAME` beside it.
        base: The base model, by default the plan's; downloaded where it is not on this machine.
        overwrite: Replace what `output` holds.
        progress: Shows the bytes written.
        of_run: As in `recover`.

    Raises:
        LoRAMError: Nothing is masked, or base, pruned model and adapter do not belong together.
    """
    output = output or default_output(adapter, "merged")
    check_vacant(output, overwrite)
    opened = Adapter.open(adapter)
    pruned = find_folder(pruned_model or opened.model)
    plan = PruningPlan.load(pruned)
    _check_masked(plan, opened)
    base = base or plan.base
    folder = find_folder(base.id, base.revision)
    check_pair(pruned, plan, base.id, base.revision)
    opened = opened.of_today(plan.pruned_config)
    moved = check_adapter(opened, plan, pruned, of_run)
    LOG.info("adding the masked update of %s to %s, into %s", adapter, base.id, output)
    weights = Checkpoint(folder)
    updates = check_mergeable(opened, moved, plan, weights)
    merger = _Merger(weights, Checkpoint(pruned), plan, opened.settings, updates)
    with new_folder(output, overwrite) as scratch:
        files = merger.write(scratch, progress)
        copy_files(folder, scratch, COPIED)
        config = without_format(read_json(scratch / "config.json"))
        write_json(scratch / "config.json", config)
        vocabulary = vocabulary_of(opened.tensors, plan.config)
        if vocabulary != sizes_of(plan.config)["vocabulary"]:
            write_json(scratch / "config.json", changed(config, {"vocab_size": vocabulary}))
            copy_files(adapter, scratch, TOKENIZER_PATTERNS)
        record = Record(
            Kind.RECOVERED_MODEL,
            base,
            plan.digest,
            trained=opened.record.training,
            masked=True,
            files=files,
        )
        record.save(scratch)
    return {**record.as_json(), "output": str(output)}


def check_mergeable(
    adapter: Adapter, moved: list[Moved], plan: PruningPlan, base: Checkpoint
) -> dict[str, _Update]:
    """Refuse an adapter whose masked update cannot be added to the base's weights.

    Returns:
        Weight of the base, as it is stored → what the adapter holds for it.
    """
    _check_masked(plan, adapter)
    updates = _updates(moved, plan, base)
    for name, update in updates.items():
        shape = update.whole.shape if update.whole else base[name].shape
        if update.factors_shape not in (None, shape):  # a vocabulary that grew, not saved whole
            raise _unmergeable(next(iter(update.parts.values())))
    return updates


def _check_masked(plan: PruningPlan, adapter: Adapter) -> None:
    if not plan.masks:
        raise LoRAMError(
            "expected an adapter of a sparse pruned model for masked recovery, found one of a "
            "model that lost whole units, which has no mask: recover it plainly"
        )
    if adapter.record.masked is False:
        raise LoRAMError(
            f"expected an adapter trained with its update masked, found {adapter.folder} trained "
            "without: recover it plainly, or train with `masked: true`"
        )


@dataclass(frozen=True)
class _Update:
    """What an adapter holds for the weight of one module, by the names in `PARTS`."""

    module: str
    parts: dict[str, Moved] = field(default_factory=dict)

    @property
    def whole(self) -> Moved | None:
        """The weight as trained, where it was saved whole; by PEFT also beside LoRA on it."""
        return self.parts.get("weight")

    @property
    def factors_shape(self) -> tuple[int, int] | None:
        """The shape of what `factors` multiply to."""
        if "lora_A.weight" in self.parts:
            return self.parts["lora_B.weight"].shape[0], self.parts["lora_A.weight"].shape[1]
        if "lora_embedding_A" in self.parts:
            A, B = self.parts["lora_embedding_A"], self.parts["lora_embedding_B"]
            return A.shape[1], B.shape[0]
        return None

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B such that B A is the update; an embedding's is the transpose of its B A."""
        if "lora_A.weight" in self.parts:
            return _values(self.parts["lora_A.weight"]), _values(self.parts["lora_B.weight"])
        if "lora_embedding_A" in self.parts:
            B, A = self.parts["lora_embedding_B"], self.parts["lora_embedding_A"]
            return _values(B).T, _values(A).T
        return None


def _updates(adapter: list[Moved], plan: PruningPlan, base: Checkpoint) -> dict[str, _Update]:
    """Weight of the base, as it is stored → what the adapter holds for it.

    Raises:
        LoRAMError: It holds what cannot be added to a weight of the base.
    """
    family, embedding = family_of(plan.config), embedding_module(plan.config)
    tied = (embedding, "lm_head") if is_tied(plan.config) else ()
    found: dict[str, _Update] = {}
    for moved in adapter:
        module, part = split_name(moved.stored.name)
        if part == ORIGINAL:
            continue
        if part not in PARTS or (module in tied and part != "weight"):
            raise _unmergeable(moved)
        update = found.setdefault(family.stored_name(f"{module}.weight"), _Update(module))
        update.parts[part] = moved
    stored = {family.stored_name(f"{module}.weight") for module in tied}
    lost = next(iter(stored - base.tensors.keys()), None)  # of tied ones either may be stored
    trained = [found[name] for name in stored if name in found]
    if lost and trained:
        wholes = [update.whole.read() for update in trained if update.whole]
        if len(wholes) < 2 or not np.array_equal(wholes[0], wholes[1]):
            raise _unmergeable(next(iter(trained[0].parts.values())))
        del found[lost]
    for name, update in found.items():
        if name not in base.tensors:
            raise _unmergeable(next(iter(update.parts.values())))
    return found


def _unmergeable(part: Moved) -> LoRAMError:
    return LoRAMError(
        f"expected LoRA on weights of their own, found {part.stored.name}, which cannot be merged: "
        "recover this adapter plainly"
    )


@dataclass(frozen=True)
class _Merger:
    """Streams the base's tensors with the update added."""

    base: Checkpoint
    pruned: Checkpoint
    plan: PruningPlan
    settings: Mapping[str, Any]
    updates: Mapping[str, _Update]

    def write(self, folder: Path, progress: Progress) -> dict[str, str]:
        """Write all shards under the base's names; returns file → SHA-256.

        Raises:
            LoRAMError: A weight holds a NaN or an infinity.
        """
        done = progress(self.base.nbytes, "merging")
        return write_shards(self.base, folder, lambda tensor: self.merged(tensor, done), self.shape)

    def shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        """The shape of a tensor with its update: another only where the vocabulary grew."""
        update = self.updates.get(tensor.name)
        return update.whole.shape if update and update.whole else tensor.shape

    def merged(self, tensor: StoredTensor, done: Callable[[int], Any]) -> np.ndarray:
        """The bits of one tensor with its update.

        Raises:
            LoRAMError: They hold a NaN or an infinity, before or with the update.
        """
        update, bits = self.updates.get(tensor.name), tensor.read()
        done(tensor.nbytes)
        if not finite(bits, tensor.dtype):
            raise not_finite(tensor.name)
        if update:
            bits = self._updated(tensor, bits, update)
            if not finite(bits, tensor.dtype):
                raise LoRAMError(
                    f"expected finite weights, found that {tensor.name} with its update is more "
                    f"than {tensor.dtype} holds: take an earlier checkpoint of the adapter"
                )
        return bits

    def _updated(self, tensor: StoredTensor, bits: np.ndarray, update: _Update) -> np.ndarray:
        if update.whole and tensor.dtype in TORCH_DTYPES:
            bits = to_bits(_values(update.whole), tensor.dtype)
        weight, factors = as_torch(tensor, bits), update.factors()
        if factors:
            A, B = factors
            scale = scaling(self.settings, update.module, len(A))
            add_update(weight, A, B, scale, self.mask(tensor.name))
        return bits

    def mask(self, name: str) -> torch.Tensor | None:
        """The weight's mask, None where pruning left it whole."""
        if name not in self.plan.masks:
            return None
        return pack(read_support(self.pruned, self.plan, name))


def _values(part: Moved) -> torch.Tensor:
    return as_torch(part.stored, part.read())
