"""Where calculations run that a user gave no device for."""

from __future__ import annotations

import torch


def choose_device(device: str | None = None) -> str:
    """The device named, or the GPU where there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
