"""QLoRA's 4 bits, as bitsandbytes has them."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def qlora_config(compute: torch.dtype, **options: Any) -> transformers.BitsAndBytesConfig:
    """NF4 with double quantization, computed in `compute`."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **options,
    )
