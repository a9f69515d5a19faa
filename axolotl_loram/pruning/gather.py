"""Writing the pruned weights: every tensor gathered along the plan, a few blocks in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.model import Tensor, tensors
from axolotl_loram.architecture.pairing import untouched_prefixes
from axolotl_loram.architecture.plan import Features, PruningPlan, gather
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.targets import sync
from axolotl_loram.files.tensors import (
    MODEL_FILE,
    Checkpoint,
    StoredTensor,
    ahead,
    open_safetensors,
    write_safetensors,
)
from axolotl_loram.files.untrusted import read_json

FINISHED = "finished.json"
"""Lists the files of a folder that are whole, while others are missing."""


@dataclass(frozen=True)
class Part:
    """One tensor to write: where its pieces come from, what of each is kept, and its shape.

    It has one piece, or one for each expert that it stacks.
    """

    name: str
    pieces: Sequence[tuple[StoredTensor, Features]]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.pieces[0][0].dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.pieces[0][0].bits.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """Its bits, some rows at a time; rows that are not kept are not read."""
        for source, features in self.pieces:
            rows, *others = features or (None,)  # a scalar has no dimensions
            for block in source.blocks(rows):
                yield gather(block, [None, *others])


def needed_bytes(checkpoint: Checkpoint, plan: PruningPlan) -> int:
    """Bytes of the pruned model's tensors: its size on disk, but for some kB of headers."""
    return _size(part for parts in _files(checkpoint, plan, {}).values() for part in parts)


def write_weights(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    folder: Path,
    progress: Progress = no_progress,
    replaced: Mapping[str, StoredTensor] | None = None,
    pack: Callable[[Path], str] | None = None,
) -> dict[str, str]:
    """Gather every tensor along the plan: one output file for each shard of the base.

    Called again with the same arguments after an interruption, it keeps the files that are whole.

    Args:
        checkpoint: The base model's weights.
        plan: What to keep.
        folder: Folder to write into.
        progress: Shows the bytes written; files that are kept count at once.
        replaced: Tensors, already of the pruned shapes, to copy in place of what gathering gives.
        pack: Makes each file smaller in place, and returns its new SHA-256.

    Returns:
        File name → SHA-256.

    Raises:
        LoRAMError: A shard of the base ends early.
    """
    replaced = replaced or {}
    files = _files(checkpoint, plan, replaced)
    total = _size(part for parts in files.values() for part in parts)
    done = progress(total, "pruning")
    identity = _identity(checkpoint, plan, replaced)
    finished = _finished(folder, identity)
    for later in folder.iterdir():  # what came after the weights is written anew
        if later.name not in (*finished, FINISHED):
            later.unlink()
    for file, parts in files.items():
        if file in finished:
            done(_size(parts))
        else:
            finished[file] = _write_file(folder / file, parts, done, pack)
            _note_finished(folder, identity, finished)
    if len(files) > 1:
        stored = {file: open_safetensors(folder / file)[0].values() for file in files}
        size = sum(tensor.nbytes for held in stored.values() for tensor in held)
        weight_map = {tensor.name: file for file, held in stored.items() for tensor in held}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / f"{MODEL_FILE}.index.json", index)
    (folder / FINISHED).unlink(missing_ok=True)
    return finished


def _files(
    checkpoint: Checkpoint, plan: PruningPlan, replaced: Mapping[str, StoredTensor]
) -> dict[str, list[Part]]:
    """What each output file holds; what is neither declared nor left untouched is left out."""
    pruned = {_name_in_base(tensor, plan): tensor for tensor in tensors(plan.pruned_config)}
    whole = untouched_prefixes(plan.config)
    shards = [
        [name for name in names if name in pruned or name.startswith(whole)]
        for names in checkpoint.shards.values()
    ]
    shards = [names for names in shards if names]
    files = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files[file if len(shards) > 1 else MODEL_FILE] = [
            _part(pruned[name], checkpoint[name], plan, replaced.get(name))
            if name in pruned
            else _as_it_is(checkpoint[name])
            for name in names
        ]
    return files


def _name_in_base(tensor: Tensor, plan: PruningPlan) -> str:
    """Of experts that are stored one by one, those that stay get new numbers."""
    if tensor.expert is None:
        return tensor.name
    return tensor.of_expert(int(plan.kept_experts(tensor.layer)[tensor.expert]))


def _as_it_is(stored: StoredTensor) -> Part:
    return Part(stored.name, [(stored, [None] * max(1, len(stored.shape)))], stored.shape)


def _part(
    tensor: Tensor, stored: StoredTensor, plan: PruningPlan, replacement: StoredTensor | None
) -> Part:
    if replacement is None and tensor.expert is None and plan.inside_experts(tensor):
        pieces = [
            (stored.part(expert), plan.features(tensor.dims[1:], tensor.layer, slot))
            for slot, expert in enumerate(plan.kept_experts(tensor.layer))
        ]
        return Part(tensor.name, pieces, tensor.shape)
    if replacement is None:
        features = plan.features(tensor.dims, tensor.layer, tensor.expert)
        return Part(tensor.name, [(stored, features)], tensor.shape)
    if (replacement.dtype, replacement.shape) != (stored.dtype, tensor.shape):
        raise AssertionError(
            f"{tensor.name}: expected {stored.dtype} {tensor.shape} to put in its place, found "
            f"{replacement.dtype} {replacement.shape}"
        )
    return Part(tensor.name, [(replacement, [None] * len(tensor.dims))], tensor.shape)


def _size(parts: Iterable[Part]) -> int:
    return sum(part.nbytes for part in parts)


def _write_file(
    file: Path,
    parts: Sequence[Part],
    done: Callable[[int], Any],
    pack: Callable[[Path], str] | None = None,
) -> str:
    """Write a file that is whole, and on the disk, once it has its name; returns its SHA-256."""

    def counted(part: Part) -> Iterator[np.ndarray]:
        for block in ahead(part.blocks()):
            yield block
            done(block.nbytes)

    partial = file.with_name(f"{file.name}.partial")
    described = [(part.name, part.dtype, part.shape) for part in parts]
    digest = write_safetensors(partial, described, map(counted, parts))
    digest = pack(partial) if pack else digest
    sync(partial)
    partial.replace(file)
    return digest


def _identity(
    checkpoint: Checkpoint, plan: PruningPlan, replaced: Mapping[str, StoredTensor]
) -> list[Any]:
    """What the files are made of: they are not kept for a call with something else."""
    copied = [(n, str(t.file), t.file.stat().st_mtime_ns) for n, t in sorted(replaced.items())]
    digest = hashlib.sha256(json.dumps(copied).encode()).hexdigest()
    return [checkpoint.fingerprint(), plan.digest, digest]


def _finished(folder: Path, identity: list[Any]) -> dict[str, str]:
    """File name → SHA-256 of the files that an interrupted call with `identity` finished."""
    if not (folder / FINISHED).exists():
        return {}
    record = read_json(folder / FINISHED)
    for file, size in record["bytes"].items():
        path = folder / file
        if record["of"] != identity or not path.exists() or path.stat().st_size != size:
            path.unlink(missing_ok=True)
            del record["sha256"][file]
    return record["sha256"]


def _note_finished(folder: Path, identity: list[Any], finished: Mapping[str, str]) -> None:
    sizes = {file: (folder / file).stat().st_size for file in finished}
    record = {"of": identity, "sha256": finished, "bytes": sizes}
    partial = folder / f"{FINISHED}.partial"
    write_json(partial, record)
    sync(partial)
    partial.replace(folder / FINISHED)
