"""FP8 with scales, as DeepSeek V3 and Qwen3 are published, read as transformers dequantizes it.

A weight W (out, in) is stored in E4M3 with ``W_scale_inv``: one factor for all of it, or one for
each block, usually of 128 × 128, the last ones of a row or column narrower. Numbers are multiplied
in float32 and rounded to what the model computes in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.stored import FLOATS, Quantized, StoredTensor, as_floats

E4M3 = "F8_E4M3"
SCALE = "_scale_inv"
EXPONENTS = ("U8", "F8_E8M0")
"""Scales stored as a binary exponent plus 127."""


@dataclass(frozen=True)
class Fp8(Quantized):
    """A weight (out, in); `block` of its rows and columns share a scale."""

    block: tuple[int, int]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Some outputs."""
        values = _e4m3()[np.concatenate([*self.packed.blocks(rows)])]
        scales = self._factors()[rows // self.block[0]]
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scales.repeat(self.block[1], axis=1)[:, : self.shape[1]]
        return _rounded(values, self.dtype)

    def _factors(self) -> np.ndarray:
        bits, dtype = self.scales.read(), self.scales.dtype
        if dtype in EXPONENTS:
            factors = np.ldexp(np.float32(1), bits.astype(np.int32) - 127)
            factors = (
                np.where(bits == 255, np.float32(np.nan), factors) if dtype != "U8" else factors
            )
        else:
            factors = as_floats(bits, dtype).astype(np.float32)
        return factors.reshape(factors.shape if factors.ndim == 2 else (1, 1))


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded to the nearest of BF16, F16 or F32, ties to even, as bits."""
    if dtype != "BF16":
        return (
            values.astype(np.float16).view(np.uint16) if dtype == "F16" else values.view(np.uint32)
        )
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


@functools.cache
def _e4m3() -> np.ndarray:
    """Byte → number, float32: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity."""
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def fp8(
    name: str, packed: StoredTensor, scales: StoredTensor, dtype: str, block: Sequence[int] | None
) -> Fp8:
    """The weight `name` of its stored numbers and factors, rounded to BF16, F16 or F32.

    Rows and columns that share a factor are `block`, where the config says so.

    Raises:
        LoRAMError: The two do not belong together.
    """
    grid = tuple(scales.shape)
    shape = packed.shape
    sizes = None
    if len(shape) == 2 and scales.dtype in (*FLOATS, *EXPONENTS):
        sizes = shape if grid in ((), (1,)) else _block(shape, grid, block)
    if sizes is None:
        raise LoRAMError(
            f"expected a factor for {name}, or one for each block of {list(block or ())} of its "
            f"{list(shape)} numbers, found {scales.dtype} {list(grid)}: the checkpoint is damaged, "
            "or stored in another format"
        )
    return Fp8(name, dtype, shape, packed.file, packed.start, packed, scales, (sizes[0], sizes[1]))


def _block(
    shape: tuple[int, ...], grid: tuple[int, ...], block: Sequence[int] | None
) -> tuple[int, ...] | None:
    """The size of the blocks that a grid of factors is for: the config's, else equal ones."""
    if len(grid) != 2:
        return None
    if block and grid == tuple(-(-size // own) for size, own in zip(shape, block, strict=True)):
        return tuple(block)
    even = all(count and size % count == 0 for size, count in zip(shape, grid, strict=True))
    return tuple(size // count for size, count in zip(shape, grid, strict=True)) if even else None
