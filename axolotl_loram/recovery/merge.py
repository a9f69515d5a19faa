"""Masked recovery: the base model with exactly the update that was trained, s (B A) ∘ M.

(B A) ∘ M has no low rank, so that no adapter can hold it: the result is an ordinary model folder.
It is written tensor by tensor, each computed in float32 and rounded to the base's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture.config_json import is_tied
from axolotl_loram.architecture.lora_names import named_model, split_name
from axolotl_loram.architecture.pairing import (
    check_adapter_tokenizer,
    check_pair,
    check_trained_under,
    read_record,
)
from axolotl_loram.architecture.plan import RECORD_FILE, SCHEMA_VERSION, Base, PruningPlan
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder, write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, StoredTensor, write_safetensors
from axolotl_loram.files.untrusted import copy_files
from axolotl_loram.models.bits import TORCH_DTYPES, from_bits
from axolotl_loram.models.masked import add_update, pack, read_support
from axolotl_loram.recovery.lora import scaling
from axolotl_loram.recovery.recover import read_adapter_config
from axolotl_loram.recovery.scatter import match
from axolotl_loram.recovery.whole import check_modules, check_trained

LOG = logging.getLogger(__name__)
COPIED = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    *TOKENIZER_PATTERNS,
)
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "weight")
Parts = Mapping[str, StoredTensor]
"""What an adapter holds for one module, by the names in `PARTS`."""


def merge_masked(
    adapter: Path,
    pruned_model: str | None = None,
    output: Path | None = None,
    base: Base | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    of_run: bool = False,
) -> dict[str, Any]:
    """Write the base model with the trained update added to it.

    Args:
        adapter: Folder of the adapter as trained, on a sparse pruned model.
        pruned_model: Folder or hub id of that model; by default what the adapter's config names.
        output: Folder to write, by default `default_output(adapter)`.
        base: The base model, by default the plan's; downloaded where it is not on this machine.
        overwrite: Replace what `output` holds.
        progress: Shows the bytes written.
        of_run: As in `recover`.

    Returns:
        What the result's `loram.json` says, and "output", the folder.

    Raises:
        LoRAMError: Nothing is masked, or base, pruned model and adapter do not belong together.
    """
    output = output or default_output(adapter)
    check_vacant(output, overwrite)
    settings, recorded = read_adapter_config(adapter), read_record(adapter)
    pruned = find_folder(pruned_model or named_model(adapter))
    plan = PruningPlan.load(pruned)
    _check_masked(plan, recorded, adapter)
    check_trained_under(adapter, plan)
    base = base or plan.base
    folder = find_folder(base.id, base.revision)
    check_pair(pruned, plan, base.id, base.revision)
    checkpoint = Checkpoint(adapter, ADAPTER_FILE)
    parts = _parts_by_tensor(checkpoint, plan)
    check_modules(checkpoint, settings, plan)
    if not of_run:
        check_trained(checkpoint)
        check_adapter_tokenizer(adapter, pruned)
    LOG.info("adding the masked update of %s to %s, into %s", adapter, base.id, output)
    merger = _Merger(Checkpoint(folder), Checkpoint(pruned), plan, settings, parts)
    with new_folder(output, overwrite) as scratch:
        files = merger.write(scratch, progress)
        copy_files(folder, scratch, COPIED)
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": "recovered-model",
            "base": vars(base),
            "plan": plan.digest,
            "trained": recorded.get("training"),
            "masked": True,
            "files": files,
        }
        write_json(scratch / RECORD_FILE, record)
    return {**record, "output": str(output)}


def default_output(adapter: Path) -> Path:
    """``run/pruned/checkpoint-7`` → ``run/pruned/merged-checkpoint-7``."""
    adapter = adapter.resolve()
    return adapter.parent / f"merged-{adapter.name}"


def _check_masked(plan: PruningPlan, recorded: Mapping[str, Any], adapter: Path) -> None:
    if not plan.masks:
        raise LoRAMError(
            "expected an adapter of a sparse pruned model for masked recovery, found one of a "
            "model that lost whole units, which has no mask: recover it plainly"
        )
    if recorded.get("masked") is False:
        raise LoRAMError(
            f"expected an adapter trained with its update masked, found {adapter} trained without: "
            "recover it plainly, or train with `masked: true`"
        )


def _parts_by_tensor(adapter: Checkpoint, plan: PruningPlan) -> dict[str, dict[str, StoredTensor]]:
    """Weight of the base → what the adapter holds for it.

    Raises:
        LoRAMError: The adapter does not fit, or holds what cannot be added to a weight.
    """
    tied = is_tied(plan.config)
    found: dict[str, dict[str, StoredTensor]] = {}
    for moved in match(adapter, plan, full_size=False):
        module, part = split_name(moved.stored.name)
        end = module.rpartition(".")[2]
        if part not in PARTS or (tied and end in ("lm_head", "embed_tokens")):
            raise LoRAMError(
                f"expected LoRA on weights of their own, found {moved.stored.name}, which cannot "
                "be merged: recover this adapter plainly"
            )
        found.setdefault(f"{module}.weight", {})[part] = moved.stored
    return found


@dataclass(frozen=True)
class _Merger:
    """Streams the base's tensors with the update added."""

    base: Checkpoint
    pruned: Checkpoint
    plan: PruningPlan
    settings: Mapping[str, Any]
    parts: Mapping[str, Parts]

    def write(self, folder: Path, progress: Progress) -> dict[str, str]:
        """Write all shards under the base's names; returns file → SHA-256."""
        size = sum(tensor.nbytes for tensor in self.base.tensors.values())
        done = progress(size, "merging")
        files = {}
        for file, names in self.base.shards.items():
            stored = [self.base[name] for name in names]
            described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in stored]
            files[file] = write_safetensors(
                folder / file, described, (self.merged(tensor, done) for tensor in stored)
            )
        return files

    def merged(self, tensor: StoredTensor, done: Callable[[int], Any]) -> np.ndarray:
        """The bits of one tensor with its update."""
        parts, bits = self.parts.get(tensor.name), tensor.read()
        done(tensor.nbytes)
        if not parts:
            return bits
        weight = as_torch(tensor, bits)
        if "weight" in parts:  # saved whole; by PEFT also beside LoRA, of an adapted embedding
            weight.copy_(as_torch(parts["weight"]))
        if parts.keys() - {"weight"}:
            A, B = _factors(parts)
            add_update(weight, A, B, self.scale(tensor.name, len(A)), self.mask(tensor.name))
        return bits

    def mask(self, name: str) -> torch.Tensor | None:
        """The weight's mask, None where pruning left it whole."""
        if name not in self.plan.masks:
            return None
        return pack(read_support(self.pruned, self.plan, name))

    def scale(self, name: str, rank: int) -> float:
        """LoRA's scaling s of the module that owns a weight."""
        return scaling(self.settings, name.removesuffix(".weight"), rank)


def _factors(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B such that B A is the update; an embedding's is the transpose of its B A."""
    if "lora_A.weight" in parts:
        return as_torch(parts["lora_A.weight"]), as_torch(parts["lora_B.weight"])
    return as_torch(parts["lora_embedding_B"]).T, as_torch(parts["lora_embedding_A"]).T


def as_torch(stored: StoredTensor, bits: np.ndarray | None = None) -> torch.Tensor:
    """A stored tensor as torch's, sharing memory with `bits` if they are given.

    Raises:
        LoRAMError: It holds no plain floats.
    """
    if stored.dtype not in TORCH_DTYPES:
        raise LoRAMError(
            f"expected weights of {', '.join(TORCH_DTYPES)} to merge into, found {stored.name} of "
            f"{stored.dtype}: use the unquantized base model"
        )
    return from_bits(stored.read() if bits is None else bits, stored.dtype)
