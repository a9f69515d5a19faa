"""Opaque bits as torch's numbers, and back: what `files/tensors` does without torch, with it."""

from __future__ import annotations

import numpy as np
import torch

from axolotl_loram.files.tensors import StoredTensor

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def from_bits(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """The numbers that bits (of `StoredTensor.read`, or bytes) stand for, in the same memory."""
    return torch.from_numpy(bits).view(TORCH_DTYPES[dtype])


def to_bits(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Values rounded to one of `FLOATS`, as opaque bits."""
    rounded = values.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
    flat = rounded.reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"u{rounded.element_size()}").reshape(rounded.shape)


def to_torch(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """A stored tensor's values on the CPU.

    Raises:
        LoRAMError: It holds no plain floats, or a NaN or an infinity.
    """
    return from_bits(stored.read_floats("to calibrate"), stored.dtype).to(dtype)
