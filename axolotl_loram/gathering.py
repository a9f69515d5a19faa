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

from axolotl_loram.architecture import Tensor, tensors
from axolotl_loram.checkpoint import (
    MODEL_FILE,
    Checkpoint,
    StoredTensor,
    ahead,
    open_safetensors,
    read_json,
    sync,
    write_json,
    write_safetensors,
)
from axolotl_loram.plan import Features, PruningPlan, gather
from axolotl_loram.progress import Progress, no_progress

FINISHED = "finished.json"
"""Lists the files of a folder that are whole, while others are missing."""


@dataclass(frozen=True)
class Part:
    """One tensor to write: where it comes from, what of it is kept, and the shape that it has."""

    name: str
    source: StoredTensor
    features: Features
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.source.bits.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """Its bits, some rows at a time; rows that are not kept are not read."""
        rows, *others = self.features
        for block in self.source.blocks(rows):
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
    """What each output file holds; tensors that the model does not declare are left out."""
    pruned = {tensor.name: tensor for tensor in tensors({**plan.config, **plan.changes})}
    shards = [[name for name in names if name in pruned] for names in checkpoint.shards.values()]
    shards = [names for names in shards if names]
    files = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files[file if len(shards) > 1 else MODEL_FILE] = [
            _part(pruned[name], checkpoint[name], plan, replaced.get(name)) for name in names
        ]
    return files


def _part(
    tensor: Tensor, stored: StoredTensor, plan: PruningPlan, replacement: StoredTensor | None
) -> Part:
    if replacement is None:
        features = plan.features(tensor.dims, tensor.layer)
        return Part(tensor.name, stored, features, tensor.shape)
    if (replacement.dtype, replacement.shape) != (stored.dtype, tensor.shape):
        raise AssertionError(
            f"{tensor.name}: expected {stored.dtype} {tensor.shape} to put in its place, found "
            f"{replacement.dtype} {replacement.shape}"
        )
    return Part(tensor.name, replacement, [None] * len(tensor.dims), tensor.shape)


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
    described = [(part.name, part.source.dtype, part.shape) for part in parts]
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
