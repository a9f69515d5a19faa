"""Writing the pruned weights: every tensor gathered along the plan, a few blocks in memory.

What is written is looked at on the way: a base with a NaN or an infinity in it is no base.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import places
from axolotl_loram.architecture.model import Tensor, layer_pieces, stack_shape, tensors
from axolotl_loram.architecture.pairing import untouched_prefixes
from axolotl_loram.architecture.plan import Features, PruningPlan, gather
from axolotl_loram.errors import not_finite
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.nf4 import packed_parts
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.targets import put_whole, remove
from axolotl_loram.files.tensors import (
    ELEMENT_BYTES,
    MODEL_FILE,
    Checkpoint,
    StoredTensor,
    TensorShape,
    ahead,
    finite,
    write_index,
    write_safetensors,
)
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.models.packing import Packing

FINISHED = "finished.json"
"""Lists the files of a folder that are whole, while others are missing."""


@dataclass(frozen=True)
class Part:
    """One tensor to write: where its pieces come from, what of each is kept, and its shape.

    It has one piece, or some for each expert that it stacks.
    """

    name: str
    pieces: Sequence[tuple[StoredTensor, Features]]
    shape: tuple[int, ...]

    @property
    def described(self) -> TensorShape:
        """Its name, dtype and shape."""
        return self.name, self.pieces[0][0].dtype, self.shape

    def blocks(self) -> Iterator[np.ndarray]:
        """Its bits, some rows at a time; rows that are not kept are looked at all the same.

        Raises:
            LoRAMError: What is read holds a NaN or an infinity, or the file ends early.
        """
        for source, features in self.pieces:
            rows, *others = features or (None,)  # a scalar has no dimensions
            for block in _finite_blocks(source, rows):
                yield gather(block, [None, *others])
            if rows is not None:
                removed = np.setdiff1d(np.arange(source.shape[0]), rows, assume_unique=True)
                _check_finite(source, removed)


def _finite_blocks(source: StoredTensor, rows: np.ndarray | None) -> Iterator[np.ndarray]:
    for block in source.blocks(rows):
        if not finite(block, source.dtype):
            raise not_finite(source.name)
        yield block


def _check_finite(source: StoredTensor, rows: np.ndarray | None = None) -> None:
    for _ in _finite_blocks(source, rows):
        pass


def needed_bytes(checkpoint: Checkpoint, plan: PruningPlan, packing: Packing | None = None) -> int:
    """Bytes of the pruned model's tensors: its size on disk, but for some kB of headers."""
    dealt = _dealt(checkpoint, plan, packing)
    parts = (_part(checkpoint, *item, plan, {}) for held in dealt.values() for item in held.items())
    return _size(stored for part in parts for stored in _stored(part.described, packing))


def write_weights(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    folder: Path,
    progress: Progress = no_progress,
    replaced: Mapping[str, StoredTensor] | None = None,
    packing: Packing | None = None,
) -> dict[str, str]:
    """Gather every tensor along the plan, shard by shard; returns file name → SHA-256.

    Called again with the same arguments after an interruption, it keeps the files that are whole.

    Args:
        checkpoint: The base model's weights.
        plan: What to keep.
        folder: Folder to write into.
        progress: Shows the bytes gathered; files that are kept count at once.
        replaced: Tensors, already of the pruned shapes, to copy in place of what gathering gives.
        packing: Which weights are written in 4 bits.

    Raises:
        LoRAMError: A shard of the base ends early, or a weight is not finite.
    """
    replaced = replaced or {}
    files = {
        file: [_part(checkpoint, *item, plan, replaced) for item in held.items()]
        for file, held in _dealt(checkpoint, plan, packing).items()
    }
    plain = {file: _size(part.described for part in parts) for file, parts in files.items()}
    done = progress(sum(plain.values()), "pruning")
    identity = _identity(checkpoint, plan, replaced)
    finished = _finished(folder, identity)
    for later in folder.iterdir():  # what came after the weights is written anew
        if later.name not in (*finished, FINISHED):
            remove(later)
    for file, parts in files.items():
        if file in finished:
            done(plain[file])
        else:
            finished[file] = _write_file(folder / file, parts, done, packing)
            _note_finished(folder, identity, finished)
    _check_left_out(checkpoint, plan, itertools.chain(*files.values()))
    if len(files) > 1:
        write_index(folder, {file: _all_stored(parts, packing) for file, parts in files.items()})
    (folder / FINISHED).unlink(missing_ok=True)
    return finished


def _check_left_out(checkpoint: Checkpoint, plan: PruningPlan, parts: Iterable[Part]) -> None:
    """Look at the base's tensors that no part is made of: experts that go whole.

    Raises:
        LoRAMError: One holds a NaN or an infinity.
    """
    read = {piece.name for part in parts for piece, _ in part.pieces}
    apart = {name.partition("[")[0] for name in read if name.endswith("]")}
    for name in {tensor.name for tensor in tensors(plan.config)} - read:
        stored = checkpoint[name]
        experts = range(stored.shape[0]) if name in apart else ()
        for left in [stored.part(expert) for expert in experts] or [stored]:
            if left.name not in read:
                _check_finite(left)


@dataclass(frozen=True)
class Stack:
    """Experts that the base stores one by one (see `layer_pieces`), written as one tensor."""

    name: str
    pieces: list[list[Tensor]]


def _dealt(
    checkpoint: Checkpoint, plan: PruningPlan, packing: Packing | None
) -> dict[str, dict[str, Tensor | Stack | None]]:
    """Output file → stored name → what becomes of it, None of what stays as it is.

    What is neither declared nor left untouched is left out. A stack is where its first piece is.
    """
    pruned: dict[str, Tensor | Stack] = {}
    for layer in places(plan.pruned_config):
        for name, pieces in layer_pieces(plan.pruned_config, layer).items():
            if packing and name in packing.weights and pieces[0][0].expert is not None:
                pruned[_name_in_base(pieces[0][0], plan)] = Stack(name, pieces)
            else:
                pruned |= {_name_in_base(piece, plan): piece for own in pieces for piece in own}
    whole = untouched_prefixes(plan.config)
    shards = [
        {name: pruned.get(name) for name in names if name in pruned or name.startswith(whole)}
        for names in checkpoint.shards.values()
    ]
    shards = [held for held in shards if held]
    if len(shards) == 1:
        return {MODEL_FILE: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": h for n, h in enumerate(shards, 1)}


def _name_in_base(tensor: Tensor, plan: PruningPlan) -> str:
    """Of experts that are stored one by one, those that stay get new numbers."""
    if tensor.expert is None:
        return tensor.name
    return tensor.of_expert(int(plan.kept_experts(tensor.layer)[tensor.expert]))


def _part(
    checkpoint: Checkpoint,
    name: str,
    tensor: Tensor | Stack | None,
    plan: PruningPlan,
    replaced: Mapping[str, StoredTensor],
) -> Part:
    if isinstance(tensor, Stack):
        found = [
            (checkpoint[_name_in_base(p, plan)], plan.features(p.dims, p.layer, p.expert))
            for own in tensor.pieces
            for p in own
        ]
        return Part(tensor.name, found, stack_shape(tensor.pieces))
    stored = checkpoint[name]
    if tensor is None:
        return Part(stored.name, [(stored, [None] * max(1, len(stored.shape)))], stored.shape)
    if (new := replaced.get(stored.name)) is not None:
        if (new.dtype, new.shape) != (stored.dtype, tensor.shape):
            raise AssertionError(
                f"{tensor.name}: expected {stored.dtype} {tensor.shape} to put in its place, found "
                f"{new.dtype} {new.shape}"
            )
        return Part(tensor.name, [(new, [None] * len(tensor.dims))], tensor.shape)
    if tensor.expert is None and plan.inside_experts(tensor):
        pieces = [
            (stored.part(expert), plan.features(tensor.dims[1:], tensor.layer, slot))
            for slot, expert in enumerate(plan.kept_experts(tensor.layer))
        ]
        return Part(tensor.name, pieces, tensor.shape)
    features = plan.features(tensor.dims, tensor.layer, tensor.expert)
    return Part(tensor.name, [(stored, features)], tensor.shape)


def _stored(described: TensorShape, packing: Packing | None) -> list[TensorShape]:
    """What is stored of a weight: itself, or what it is in 4 bits."""
    name, _, shape = described
    packed = packing is not None and name in packing.weights
    return packed_parts(name, shape, packing.block) if packing and packed else [described]


def _all_stored(parts: Iterable[Part], packing: Packing | None) -> list[TensorShape]:
    return [kept for part in parts for kept in _stored(part.described, packing)]


def _size(described: Iterable[TensorShape]) -> int:
    return sum(math.prod(shape) * ELEMENT_BYTES[dtype] for _, dtype, shape in described)


def _write_file(
    file: Path, parts: Sequence[Part], done: Callable[[int], Any], packing: Packing | None
) -> str:
    """Write a file that is whole, and on the disk, once it has its name; returns its SHA-256."""

    def counted(part: Part) -> Iterator[np.ndarray]:
        for block in ahead(part.blocks()):
            yield block
            done(block.nbytes)

    def data() -> Iterator[np.ndarray | Iterable[np.ndarray]]:
        for part in parts:
            if packing and part.name in packing.weights:
                yield from packing.data(part.described, counted(part))
            else:
                yield counted(part)

    with put_whole(file) as partial:
        return write_safetensors(partial, _all_stored(parts, packing), data())


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
    with put_whole(folder / FINISHED) as partial:
        write_json(partial, record)
