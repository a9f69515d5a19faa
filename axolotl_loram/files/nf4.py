"""Checkpoints in 4 bits: written a piece at a time, as bitsandbytes and transformers store them.

A weight W of n numbers becomes ``W`` (two numbers to a byte), one 8-bit scale for each block
(``W.absmax``), a 32-bit scale for each 256 of those (``W.nested_absmax``), two small tables of
values, and ``W.quant_state.bitsandbytes__nf4``: JSON, with the shape that it had. QLoRA has the
same in memory (arXiv 2305.14314, sections 3 and 3.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import StoredTensor, TensorShape

BLOCK = 64
"""Weights that share a scale: the default of bitsandbytes, which Axolotl leaves alone."""
NESTED_BLOCK = 256
"""Scales that share a scale; bitsandbytes' double quantization knows no other."""
STATE = ".quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
"""Room for the JSON, whose length is only known once the weight was read; ends in spaces."""
DTYPES = {".quant_map": "F32", ".nested_absmax": "F32", ".nested_quant_map": "F32"}
"""Of the parts that are not bytes."""
FLOAT32 = 4


def nf4_sizes(numbers: int, block: int = BLOCK, double: bool = True) -> dict[str, int]:
    """Part → bytes, of what bitsandbytes makes of a weight, but for what has no array of its own.

    Args:
        numbers: How many numbers the weight has.
        block: Numbers to a scale.
        double: Whether the scales are quantized too (Linear4bit: yes, Embedding4bit: no).
    """
    scales = -(-numbers // block)
    sizes = {"": -(-numbers // 2), ".absmax": scales * FLOAT32, ".quant_map": 16 * FLOAT32}
    if double:
        nested = -(-scales // NESTED_BLOCK) * FLOAT32
        sizes |= {".absmax": scales, ".nested_absmax": nested, ".nested_quant_map": 256 * FLOAT32}
    return sizes


def packed_parts(name: str, shape: tuple[int, ...], block: int) -> list[TensorShape]:
    """The tensors that checkpoints store for a weight in 4 bits, the JSON last."""
    sizes = nf4_sizes(math.prod(shape), block) | {STATE: STATE_BYTES}
    return [
        (name + part, DTYPES[part], (size // FLOAT32,))
        if part in DTYPES
        else (name + part, "U8", (size,) if part else (size, 1))
        for part, size in sizes.items()
    ]


def logical_shapes(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Tensor name → the shape it has in the model, for tensors that may be packed in 4 bits.

    Raises:
        LoRAMError: A packed tensor is not whole.
    """
    packed = packed_weights(stored)
    parts = {name for weight in packed for name, *_ in packed_parts(weight, (), BLOCK)} - packed
    shapes = {name: tensor.shape for name, tensor in stored.items() if name not in parts}
    return shapes | {weight: _packed_shape(stored, weight) for weight in packed}


def packed_weights(stored: Iterable[str]) -> set[str]:
    """Of the names of stored tensors, those whose numbers are packed in 4 bits."""
    return {name.removesuffix(STATE) for name in stored if name.endswith(STATE)}


def _packed_shape(stored: Mapping[str, StoredTensor], weight: str) -> tuple[int, ...]:
    try:
        state = json.loads(stored[weight + STATE].read().tobytes()[:4096])
        shape = tuple(int(size) for size in state["shape"])
        expected = nf4_sizes(math.prod(shape), int(state["blocksize"]))
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError, RecursionError):
        raise LoRAMError(
            f"expected the 4-bit state of {weight} as bitsandbytes writes it, found none: the "
            "checkpoint is damaged, so make or download it again"
        ) from None
    for part, size in expected.items():
        found = stored.get(weight + part)
        if found is None or found.nbytes != size:
            raise LoRAMError(
                f"expected {size} bytes in {weight}{part} for a weight of {list(shape)}, found "
                f"{found.nbytes if found else 'none'}: the checkpoint is damaged, so make or "
                "download it again"
            )
    return shape
