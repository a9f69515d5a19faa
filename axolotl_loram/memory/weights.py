"""Bytes of a model's weights, by part and by format, exactly as bitsandbytes 0.50 stores them.

NF4 keeps two values to a byte, and for every block of 64 a scale (absmax). Linear4bit with double
quantization keeps the scales in 8 bits, in blocks of 256 with a float32 scale each, plus, for each
weight, its own copy of the 16-entry table of values (`code`), of the 256-entry table of scales, and
one float32 offset. Linear8bitLt keeps a byte per value and a float32 scale (SCB) per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from axolotl_loram.architecture.model import Tensor
from axolotl_loram.files.nf4 import BLOCK, FLOAT32, nf4_sizes
from axolotl_loram.memory.layout import PARTS, Layout, Part, part_of

Format = Literal["native", "float32", "int8", "nf4", "cpu"]


def nf4_bytes(values: int, block: int = BLOCK, double: bool = True) -> int:
    """Bytes of a weight in NF4 with its whole quantization state; arguments as `nf4_sizes`'s."""
    offset = FLOAT32 if double else 0  # checkpoints have it in their JSON
    return sum(nf4_sizes(values, block, double).values()) + offset


def int8_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a weight in LLM.int8() with a float32 scale for each row."""
    return math.prod(shape) + math.prod(shape[:-1]) * FLOAT32


@dataclass(frozen=True)
class Storage:
    """How a model's weights are stored.

    Attributes:
        linears: Format of the linear weights inside the decoder layers.
        lm_head: Format of the output embedding. A tied native one is not stored again.
        embedding: "native", or "cpu", in host memory.
        native: Bytes of a weight that is not quantized: 2 in bfloat16 and float16, 4 in float32.
        block: Weights to a scale in NF4.
        experts: Format of raw expert tensors, which bitsandbytes quantizes only where told to.
        double: Whether the scales of NF4 are quantized too.
    """

    linears: Format = "native"
    lm_head: Format = "native"
    embedding: Format = "native"
    native: int = 2
    block: int = BLOCK
    experts: Format = "native"
    double: bool = True

    def format_of(self, tensor: Tensor) -> Format:
        """The format that a tensor is stored in.

        In a 4- or 8-bit model, PEFT's `prepare_model_for_kbit_training` makes everything float32
        that is not quantized, and Axolotl turns norms, embedding and lm_head back. Biases go back
        in the first forward pass (Linear4bit). What is none of these stays float32: routers, and
        experts unless they are quantized, in which case Axolotl leaves PEFT's function out.
        """
        part = part_of(tensor)
        if part in ("linears", "lm_head", "embedding"):
            return {"linears": self.linears, "lm_head": self.lm_head}.get(part, self.embedding)
        if part == "experts" and self.experts != "native":
            return self.experts
        turned_back = part in ("norms", "biases")
        never_cast = self.linears == "native" or self.experts != "native"
        return "native" if turned_back or never_cast else "float32"

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes of a tensor, wherever it lies."""
        return self.bytes_in(self.format_of(tensor), tensor.shape)

    def bytes_in(self, form: Format, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape in a format."""
        values = math.prod(shape)
        if form == "nf4":
            return nf4_bytes(values, self.block, self.double)
        if form == "int8":
            return int8_bytes(shape)
        return values * (FLOAT32 if form == "float32" else self.native)

    def unpacked_bytes(self, form: Format, shape: tuple[int, ...]) -> int:
        """Bytes of the copy in the compute dtype that a quantized weight is multiplied by.

        With NF4's double quantization, the float32 scales that make it are there at the time too.
        """
        if form not in ("nf4", "int8"):
            return 0
        values = math.prod(shape)
        made = form == "nf4" and self.double
        scales = nf4_sizes(values, self.block, double=False)[".absmax"] if made else 0
        return values * self.native + scales


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights: those on the device by part, and those in host memory."""

    device: dict[Part, int]
    host: int

    @property
    def on_device(self) -> int:
        """Bytes on the device in all."""
        return sum(self.device.values())


def weight_bytes(layout: Layout, storage: Storage) -> WeightBytes:
    """Bytes of the weights of a model, from its declaration alone.

    Tied embeddings are two where the lm_head is in 4 bits.
    """
    device: dict[Part, int] = dict.fromkeys(PARTS, 0)
    host = 0
    for tensor, count in layout.tensors:
        if storage.format_of(tensor) == "cpu":
            host += count * storage.bytes_of(tensor)
        else:
            device[part_of(tensor)] += count * storage.bytes_of(tensor)
    if layout.lm_head is None and storage.lm_head == "nf4":
        device["lm_head"] += storage.bytes_in(storage.lm_head, layout.embedding.shape)
    return WeightBytes(device, host)
