"""One stored tensor: where it lies, and its bits, read whole, by rows or by bytes.

Tensors are opaque bits: arrays of unsigned integers as wide as the elements. What checkpoints store
quantized is read as the plain numbers that it stands for (`quantized`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from axolotl_loram.errors import LoRAMError, not_finite

BLOCK_BYTES = 4 * 2**20
"""Most bytes of a tensor that are handled at once, unless a single row has more; fits in caches."""
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
                self._read_rows(handle, part, row_bytes, bytes_of(block))
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


@dataclass(frozen=True)
class Quantized(StoredTensor):
    """A weight that is stored quantized, read as the numbers it stands for, some rows at a time.

    `dtype` and `shape` are those of the numbers; `file` and `start` are where `packed` lies.

    Attributes:
        packed: What is stored of the numbers.
        scales: What they are multiplied by.
    """

    packed: StoredTensor
    scales: StoredTensor

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The bits of rows along the first dimension, (rows, *shape[1:])."""
        raise NotImplementedError

    def read(self) -> np.ndarray:
        """The bits of all numbers."""
        return self.rows(np.arange(self.shape[0]))

    def read_bytes(self, offset: int, count: int) -> np.ndarray:
        """`count` bytes from `offset` within the numbers, as uint8."""
        row_bytes = self.nbytes // self.shape[0]
        first, last = offset // row_bytes, -(-(offset + count) // row_bytes)
        flat = self.rows(np.arange(first, last)).reshape(-1).view(np.uint8)
        return flat[offset - first * row_bytes :][:count]

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """As `StoredTensor.blocks`; no more than a block is decoded at once."""
        rows = np.arange(self.shape[0]) if rows is None else rows
        step = max(1, BLOCK_BYTES * self.shape[0] // max(1, self.nbytes))
        yield from (self.rows(rows[first : first + step]) for first in range(0, len(rows), step))


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


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8).data)
