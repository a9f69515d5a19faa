"""Checkpoints that are published quantized, read as plain numbers, a part of a tensor at a time.

Whoever opens a `Checkpoint` sees each weight under its own name, in the shape that the model has it
in, whatever it is stored as. Other formats than these are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.fp8 import E4M3, SCALE, fp8
from axolotl_loram.files.mxfp4 import BLOCKS, SCALES, mxfp4
from axolotl_loram.files.stored import FLOATS, Quantized, StoredTensor
from axolotl_loram.files.untrusted import read_json

FORMATS = {"mxfp4": "MXFP4", "fp8": "FP8"}
"""``quant_method`` of config.json → the format's name."""
QUANTIZATION = "quantization_config"
NAMED = {"float16": "F16", "float32": "F32"}
ACTIVATIONS = ".activation_scale"
"""Of inputs, for kernels that compute in 8 bits; the weights do not need it."""


def said_of(config: Mapping[str, Any], name: str) -> Any:
    """A field of a config, or else of a section of it, None where neither has one."""
    parts = (part for part in (config, *config.values()) if isinstance(part, Mapping))
    return next((part[name] for part in parts if part.get(name)), None)


def format_of(config: Mapping[str, Any]) -> str | None:
    """The ``quant_method`` that a config or a section of it names, None of plain numbers."""
    found = said_of(config, QUANTIZATION)
    if found is None:
        return None
    return str(found.get("quant_method") if isinstance(found, Mapping) else found)


def without_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model in plain numbers, its sections too."""
    return {
        name: without_format(part) if isinstance(part, Mapping) and QUANTIZATION in part else part
        for name, part in config.items()
        if name != QUANTIZATION
    }


def check_format(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose config names a format that is not read here."""
    found = format_of(config)
    if found not in (None, *FORMATS):
        raise LoRAMError(
            f"expected weights in 16 or 32 bits, {' or '.join(FORMATS.values())}, found "
            f"quantization_config {found!r} in {where}: load the model dequantized, save it, and "
            "prune that"
        )


def check_weights(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], where: str
) -> None:
    """Refuse weights, of `Checkpoint.tensors`, that are packed otherwise than their config says."""
    found = format_of(config)
    named = (name for name, tensor in tensors.items() if tensor.dtype not in FLOATS)
    if found in FORMATS and (name := next(named, None)):
        raise LoRAMError(
            f"expected every weight in {where} in 16 or 32 bits, or in {FORMATS[found]} with its "
            f"scales, found {name} of {tensors[name].dtype} without: the checkpoint is damaged, or "
            "stored in another format"
        )


def plain(stored: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """What is stored in a folder, quantized weights as the numbers that they stand for.

    Raises:
        LoRAMError: A quantized weight and its scales do not belong together.
    """
    seen: dict[str, StoredTensor] = {}
    config: Mapping[str, Any] | None = None
    for name, tensor in stored.items():
        weight = name.removesuffix(BLOCKS)
        if name.endswith(BLOCKS) and (scales := stored.get(weight + SCALES)):
            seen[weight] = mxfp4(weight, tensor, scales)
        elif tensor.dtype == E4M3 and (scales := stored.get(name + SCALE)):
            file = folder / "config.json"
            if config is None:
                config = read_json(file) if file.exists() else {}
            dtype = NAMED.get(
                str(said_of(config, "dtype") or said_of(config, "torch_dtype")), "BF16"
            )
            seen[name] = fp8(name, tensor, scales, dtype, _block_size(config))
        else:
            seen[name] = tensor
    for tensor in list(seen.values()):
        if isinstance(tensor, Quantized):
            del seen[tensor.scales.name]
            seen.pop(tensor.name.removesuffix(".weight") + ACTIVATIONS, None)
    return seen


def _block_size(config: Mapping[str, Any]) -> list[int] | None:
    said = said_of(config, QUANTIZATION)
    found = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if found is None:
        return None
    two = isinstance(found, list) and [type(size) for size in found] == [int, int]
    if not two or min(found) < 1:
        raise LoRAMError(
            f"expected weight_block_size of two positive numbers in config.json, found {found!r}: "
            "check the model's config.json"
        )
    return found
