"""Checkpoints in 4 bits: written a piece at a time, as bitsandbytes and transformers store them.

A weight W of n numbers becomes ``W`` (two numbers to a byte), one 8-bit scale for each block
(``W.absmax``), a 32-bit scale for each 256 of those (``W.nested_absmax``), two small tables of
values, and ``W.quant_state.bitsandbytes__nf4``: JSON, with the shape that it had. QLoRA has the
same in memory (arXiv 2305.14314, sections 3 and 3.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import (
    StoredTensor,
)

if TYPE_CHECKING:
    pass

STATE = ".quant_state.bitsandbytes__nf4"
NESTED_BLOCK = 256
"""Scales that share a scale; bitsandbytes' double quantization knows no other."""
STATE_BYTES = 256
"""Room for the JSON, whose length is only known once the weight was read; ends in spaces."""
PIECE = 2**22
"""Numbers that are quantized at once; a multiple of every block size."""
PARTS = (STATE, ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")


def logical_shapes(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Tensor name → the shape it has in the model, for tensors that may be packed in 4 bits.

    Raises:
        LoRAMError: A packed tensor is not whole.
    """
    packed = packed_weights(stored)
    parts = {weight + part for weight in packed for part in PARTS}
    shapes = {name: tensor.shape for name, tensor in stored.items() if name not in parts}
    return shapes | {weight: _packed_shape(stored, weight) for weight in packed}


def packed_weights(stored: Iterable[str]) -> set[str]:
    """Of the names of stored tensors, those whose numbers are packed in 4 bits."""
    return {name.removesuffix(STATE) for name in stored if name.endswith(STATE)}


def _packed_shape(stored: Mapping[str, StoredTensor], weight: str) -> tuple[int, ...]:
    try:
        state = json.loads(stored[weight + STATE].read().tobytes()[:4096])
        shape = tuple(int(size) for size in state["shape"])
        expected = dict(packed_sizes(shape, int(state["blocksize"])))
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError, RecursionError):
        raise LoRAMError(
            f"expected the 4-bit state of {weight} as bitsandbytes writes it, found none: the "
            "checkpoint is damaged, so make or download it again"
        ) from None
    for part, size in expected.items():
        found = stored.get(weight + part)
        if part != STATE and (found is None or found.nbytes != size):
            raise LoRAMError(
                f"expected {size} bytes in {weight}{part} for a weight of {list(shape)}, found "
                f"{found.nbytes if found else 'none'}: the checkpoint is damaged, so make or "
                "download it again"
            )
    return shape


def packed_sizes(shape: Sequence[int], block: int) -> Iterator[tuple[str, int]]:
    """(suffix, bytes) of what a weight is stored as with double quantization."""
    numbers = math.prod(shape)
    blocks = -(-numbers // block)
    yield "", -(-numbers // 2)
    yield ".absmax", blocks
    yield ".quant_map", 16 * 4
    yield ".nested_absmax", -(-blocks // NESTED_BLOCK) * 4
    yield ".nested_quant_map", 256 * 4
    yield STATE, STATE_BYTES
