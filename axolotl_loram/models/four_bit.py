"""bitsandbytes' 4-bit layers on CPUs with AVX512: right for every width.

Two of its kernels for such CPUs (0.50.2) go wrong at widths that pruning leaves. Dequantization
takes each row to start a new block of scales, which holds where a row is whole blocks: others come
out up to 40 % wrong, without a word. And with AVX512-BF16, the first forward pass in eval mode
packs a weight for a kernel that wants multiples of 32 outputs and whole blocks of inputs; packing
also rounds the scales, so that what is saved or moved afterwards is no longer what was loaded
(bitsandbytes' issue 2078). Here all rows are dequantized as one, and nothing is packed.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers

_OPERATOR = "bitsandbytes::dequantize_4bit"


def qlora_config(compute: torch.dtype, **options: Any) -> transformers.BitsAndBytesConfig:
    """QLoRA's 4 bits: NF4 with double quantization, computed in `compute`."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **options,
    )


def take_any_width() -> None:
    """Mend both for the 4-bit layers of this process, if bitsandbytes is imported. Idempotent."""
    modules = sys.modules.get("bitsandbytes.nn.modules")
    if modules is not None:
        vars(modules)["has_avx512bf16"] = _never
        _dequantize_flat()


@functools.cache
def _dequantize_flat() -> torch.library.Library:
    kernel = torch.library.get_kernel(_OPERATOR, "CPU")

    def flat(
        keys: Any,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        whole = shape[-1] % blocksize == 0
        sizes = list(shape) if whole else [math.prod(shape)]
        values = kernel.call_boxed(keys, packed, absmax, blocksize, quant_type, sizes, dtype)
        return values.reshape(list(shape))

    library = torch.library.Library("bitsandbytes", "IMPL")
    name = _OPERATOR.partition("::")[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every override, also of one it is told of
        library.impl(name, flat, "CPU", with_keyset=True, allow_override=True)
    return library


def _never() -> bool:
    return False
