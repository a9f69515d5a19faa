"""Reading sharded safetensors lazily, and writing them array by array.

Tensors are handled as opaque bits: arrays of unsigned integers as wide as the elements. Pruning
and recovery only move elements, so every dtype, 4-bit to 64-bit, goes through unchanged and
neither needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from axolotl_loram.errors import LoRAMError, not_finite
from axolotl_loram.files.untrusted import own_file, read_json

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
BLOCK_BYTES = 4 * 2**20
"""Most bytes of a tensor that are handled at once, unless a single row has more; fits in caches."""
SMALL_BYTES = 2**16
ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
FLOATS = ("BF16", "F16", "F32", "F64")
"""What can be computed with; all else only moves."""
INFINITY = {
    **{"BF16": 0xFF << 7, "F16": 0x1F << 10, "F32": 0xFF << 23, "F64": 0x7FF << 52},
    **{"F8_E5M2": 0x1F << 2, "F8_E4M3": 0x7F},  # the latter has a NaN, and no infinity
}
"""Without its sign bit, a float's bits order as its magnitude does; from here on it is none."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: dtype as safetensors names it, shape, and bytes in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def bits(self) -> np.dtype:
        """Unsigned integer type as wide as an element."""
        return np.dtype(f"u{ELEMENT_BYTES[self.dtype]}")

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.bits.itemsize

    def part(self, index: int) -> StoredTensor:
        """What lies at `index` of the first dimension, as a tensor of one dimension less."""
        nbytes = self.nbytes // self.shape[0]
        start = self.start + index * nbytes
        return StoredTensor(f"{self.name}[{index}]", self.dtype, self.shape[1:], self.file, start)

    def read(self) -> np.ndarray:
        """The tensor's bits, read into memory of its own (a map would count as ours too)."""
        return self.read_bytes(0, self.nbytes).view(self.bits).reshape(self.shape)

    def check_floats(self, purpose: str) -> None:
        """Refuse what cannot be computed with, for a purpose such as "to score"."""
        if self.dtype not in FLOATS:
            raise LoRAMError(
                f"expected weights of {', '.join(FLOATS)} {purpose}, found {self.name} of "
                f"{self.dtype}: prune the unquantized model, or use --method random without refit"
            )

    def read_floats(self, purpose: str) -> np.ndarray:
        """`read`, of what can be computed with.

        Raises:
            LoRAMError: It holds no plain floats, or a NaN or an infinity.
        """
        self.check_floats(purpose)
        bits = self.read()
        if not finite(bits, self.dtype):
            raise not_finite(self.name)
        return bits

    def read_bytes(self, offset: int, count: int) -> np.ndarray:
        """`count` bytes from `offset` within the tensor, as uint8."""
        return np.fromfile(self.file, dtype=np.uint8, count=count, offset=self.start + offset)

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The tensor's bits, some whole rows at a time: (rows, *shape[1:]), `BLOCK_BYTES` at most.

        Args:
            rows: Ascending positions along the first dimension, by default all; only they are read.

        Raises:
            LoRAMError: The file ends early.
        """
        rows = np.arange((self.shape or (1,))[0]) if rows is None else rows  # a scalar is one
        row_bytes = math.prod(self.shape[1:]) * self.bits.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        with self.file.open("rb") as handle:
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                block = np.empty((len(part), *self.shape[1:]), self.bits)
                self._read_rows(handle, part, row_bytes, _bytes_of(block))
                yield block

    def _read_rows(
        self, handle: BufferedReader, rows: np.ndarray, row_bytes: int, target: memoryview
    ) -> None:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        spans = [(self.start + int(run[0]) * row_bytes, len(run) * row_bytes) for run in runs]
        if len(spans) > 1 and hasattr(os, "posix_fadvise"):
            for start, count in spans:  # so that the disk works on many at a time
                os.posix_fadvise(handle.fileno(), start, count, os.POSIX_FADV_WILLNEED)
        done = 0
        for start, count in spans:
            handle.seek(start)
            if handle.readinto(target[done : done + count]) < count:
                raise LoRAMError(f"expected {self.name} in {self.file}, found that the file ends")
            done += count


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, in the order they are stored, and the file's own metadata.

    Raises:
        LoRAMError: Not a whole safetensors file (safetensors itself checks header and size).
    """
    try:
        with safe_open(own_file(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            described = [(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
    except FileNotFoundError:
        raise LoRAMError(f"expected the file {file}, found none: download it again") from None
    except (SafetensorError, OSError) as error:
        raise LoRAMError(
            f"expected a whole safetensors file, found {file} unreadable ({error}): it is "
            "truncated or damaged, so download or write it again"
        ) from None
    with file.open("rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
    tensors = {}
    for name, dtype, shape in described:
        if dtype not in ELEMENT_BYTES:
            raise LoRAMError(
                f"expected tensors of {', '.join(ELEMENT_BYTES)}, found {name} of {dtype} in {file}"
            )
        tensors[name] = StoredTensor(name, dtype, shape, file, start)
        start += tensors[name].nbytes
    return tensors, metadata


class Checkpoint:
    """The tensors of a folder, read on demand.

    Attributes:
        folder: The folder.
        tensors: Every stored tensor by name.
        shards: Names of the tensors of each file, in the order they are stored.
    """

    def __init__(self, folder: Path, file: str = MODEL_FILE):
        """Open `folder`/`file`, or the shards that `file`.index.json lists.

        Raises:
            LoRAMError: Neither is there, or a listed file is missing, damaged or outside.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.shards: dict[str, list[str]] = {}
        listed = {} if (folder / file).exists() else _weight_map(folder, file)
        for name in shard_names(folder, file):
            tensors, _ = open_safetensors(folder / name)
            self._check_dealt(tensors, name, listed)
            self.shards[name] = list(tensors)
            self.tensors |= tensors

    def _check_dealt(self, tensors: Iterable[str], shard: str, listed: Mapping[str, str]) -> None:
        """Refuse a shard with tensors that another has, or should have by the index."""
        for name in tensors:
            other = self.tensors[name].file.name if name in self.tensors else listed.get(name)
            if other not in (None, shard):
                raise LoRAMError(
                    f"expected every tensor in one file of {self.folder}, found {name} in {shard} "
                    f"and, by the index or really, in {other}: the shards are of two runs, so "
                    "download or write them again"
                )

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def fingerprint(self, samples: int = 16, sample_bytes: int = 4096) -> str:
        """A digest of what the checkpoint holds, in milliseconds whatever its size.

        It covers every tensor's name, dtype and shape, and `sample_bytes` from the middle of each
        of `samples` tensors spread over the model; not how tensors are dealt to shards.
        """
        digest = hashlib.sha256()
        names = sorted(self.tensors)
        for name in names:
            tensor = self.tensors[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for index in np.linspace(0, len(names) - 1, min(samples, len(names)), dtype=int):
            tensor = self.tensors[names[index]]
            count = min(sample_bytes, tensor.nbytes)
            digest.update(tensor.read_bytes((tensor.nbytes - count) // 2, count).tobytes())
        return f"sha256:{digest.hexdigest()}"


def finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether no value is infinite or not a number; of dtypes that have neither, always.

    It takes two maxima, of the bits as they are and as signed numbers, and no memory.

    Args:
        bits: As `StoredTensor.read` gives them, of any shape.
        dtype: As safetensors names it.
    """
    least = INFINITY.get(dtype)
    if least is None or not bits.size:
        return True
    sign = 1 << (8 * bits.itemsize - 1)
    positive, negative = bits.view(f"i{bits.itemsize}").max(), bits.max()
    return bool(int(positive) < least and int(negative) < sign + least)


def as_floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values that bits stand for, of one of `FLOATS`: float64 of F64, else float32."""
    if dtype == "BF16":
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    floats = bits.view(f"f{bits.itemsize}")
    return floats.astype(np.float32) if dtype == "F16" else floats


def has_weights(folder: Path) -> bool:
    """Whether a folder holds model weights as safetensors."""
    return (folder / MODEL_FILE).exists() or (folder / f"{MODEL_FILE}.index.json").exists()


def shard_names(folder: Path, file: str = MODEL_FILE) -> list[str]:
    """The weight files of a folder, as its index lists them.

    Raises:
        LoRAMError: There are none, or the index points out of the folder.
    """
    if (folder / file).exists():
        return [file]
    return sorted(set(_weight_map(folder, file).values()))


def _weight_map(folder: Path, file: str) -> dict[str, str]:
    """Tensor → shard, as the index says."""
    index = folder / f"{file}.index.json"
    if not index.exists():
        raise LoRAMError(
            f"expected {file} or {index.name} in {folder}, found neither: give a folder whose "
            "weights are saved as safetensors"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoRAMError(f"expected a weight_map in {index}, found none: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise LoRAMError(
                f"expected {index} to list plain file names, found {name!r}: do not use this "
                "checkpoint, its index points out of its folder"
            )
    return weight_map


TensorShape = tuple[str, str, tuple[int, ...]]
"""Name, dtype as safetensors names it, shape."""


def write_safetensors(
    file: Path,
    described: Sequence[TensorShape],
    data: Iterable[np.ndarray | Iterable[np.ndarray]],
    metadata: dict[str, str] | None = None,
) -> str:
    """Write a safetensors file array by array, which the library's own writer does not offer.

    Args:
        file: Where to.
        described: What will come, in order.
        data: The bits of each, in that order, in one array or in several; consumed lazily.
        metadata: Strings for the header.

    Returns:
        The file's SHA-256, in hexadecimal.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, dtype, shape in described:
        end = start + math.prod(shape) * ELEMENT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with file.open("wb") as handle, ThreadPoolExecutor(1) as pool:
        handle.write(head)
        for (name, dtype, shape), arrays in zip(described, data, strict=True):
            expected, written = math.prod(shape) * ELEMENT_BYTES[dtype], 0
            for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
                flat = _bytes_of(np.ascontiguousarray(array))
                if flat.nbytes < SMALL_BYTES:  # another thread would take longer to wake up
                    digest.update(flat)
                    written += handle.write(flat)
                    continue
                hashed = pool.submit(digest.update, flat)  # takes as long as writing does
                written += handle.write(flat)
                hashed.result()
            if written != expected:
                raise AssertionError(f"{name}: wrote {written} bytes, announced {expected}")
    return digest.hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


def ahead(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same arrays; a thread gets the next one while one is used."""
    iterator = iter(arrays)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (array := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield array
