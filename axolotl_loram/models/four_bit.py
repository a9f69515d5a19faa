"""QLoRA's 4 bits, as bitsandbytes has them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from axolotl_loram.architecture.config_json import Config
from axolotl_loram.files.quantized import FORMATS, QUANTIZATION, format_of, said_of
from axolotl_loram.models.patches import load_fp8


def qlora_config(compute: torch.dtype, **options: Any) -> transformers.BitsAndBytesConfig:
    """NF4 with double quantization, computed in `compute`."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **options,
    )


def dequantized(config: Config) -> dict[str, Any]:
    """Keywords with which `from_pretrained` loads what is published quantized as plain numbers.

    PEFT puts LoRA on plain numbers alone, and what is merged and pruned are they, too.
    """
    form = format_of(config)
    if form not in FORMATS:
        return {}
    load_fp8()
    kind: Any = Mxfp4Config if form == "mxfp4" else FineGrainedFP8Config
    return {"quantization_config": kind(**{**said_of(config, QUANTIZATION), "dequantize": True})}
