"""MXFP4, the 4 bits that gpt-oss is published in, read as transformers dequantizes it, bit for bit.

Of stacked experts W (experts, in, out) are stored ``W_blocks`` (experts, out, in / 32, 16), two
numbers to a byte, the lower half first, and ``W_scales`` (experts, out, in / 32): the binary
exponent, plus 127, of each 32 numbers along the inputs. A number has two significant bits, so that
bfloat16 holds every one exactly (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.stored import Quantized, StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
"""Numbers that share a scale."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By their three lower bits; the fourth is the sign."""


class Mxfp4(Quantized):
    """Experts (experts, in, out), BF16."""

    def part(self, index: int) -> StoredTensor:
        """One expert, (in, out)."""
        packed, scales = self.packed.part(index), self.scales.part(index)
        name = f"{self.name}[{index}]"
        return _Matrix(name, self.dtype, self.shape[1:], packed.file, packed.start, packed, scales)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Some experts."""
        found = np.empty((len(rows), *self.shape[1:]), self.bits)
        for place, expert in enumerate(rows):
            found[place] = self.part(int(expert)).read()
        return found


class _Matrix(Quantized):
    """One expert (in, out), stored (out, in)."""

    def read(self) -> np.ndarray:
        codes = np.left_shift(self.scales.read(), 8, dtype=np.uint16)[..., None]
        pairs = _pairs()[codes | self.packed.read()]
        return np.ascontiguousarray(pairs.view(np.uint16).reshape(self.shape[::-1]).T)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self.read()[rows]

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        whole = self.read()  # its rows lie across what is stored
        yield whole if rows is None else whole[rows]


@functools.cache
def _pairs() -> np.ndarray:
    """Two numbers in BF16 for each exponent and byte, at 256 · exponent + byte."""
    values = np.array([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])
    with np.errstate(over="ignore"):
        scaled = np.ldexp(values, np.arange(256)[:, None] - 127).astype(np.float32)
    numbers = (scaled.view(np.uint32) >> 16).astype(np.uint16)
    byte = np.arange(256)
    pairs = np.stack([numbers[:, byte & 15], numbers[:, byte >> 4]], -1)
    return np.ascontiguousarray(pairs).view(np.uint32).reshape(-1)


def mxfp4(name: str, blocks: StoredTensor, scales: StoredTensor) -> Mxfp4:
    """The weight `name` of what is stored of it.

    Raises:
        LoRAMError: The two do not belong together.
    """
    shape = blocks.shape
    whole = len(shape) == 4 and shape[3] == BLOCK // 2 and scales.shape == shape[:3]
    if not whole or {blocks.dtype, scales.dtype} != {"U8"}:
        raise LoRAMError(
            f"expected blocks of {BLOCK} numbers in MXFP4 with a scale each for {name}, found "
            f"{blocks.dtype} {list(shape)} and scales of {scales.dtype} {list(scales.shape)}: the "
            "checkpoint is damaged, or stored in another format"
        )
    numbers = (shape[0], shape[2] * BLOCK, shape[1])
    return Mxfp4(name, "BF16", numbers, blocks.file, blocks.start, blocks, scales)
