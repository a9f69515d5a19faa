"""GPUs and the memory that PyTorch finds on them, in GiB.

As `torch.cuda.get_device_properties(0).total_memory` and out-of-memory messages give it, which is
less than the name says: the driver and error correction take their part. Drivers differ by some
hundredths; the lower figure stands here.
"""

from __future__ import annotations

from collections.abc import Mapping

GPUS: Mapping[str, float] = {
    "RTX 3060 12 GB": 11.76,
    "T4 16 GB": 14.74,
    "RTX 4080 16 GB": 15.70,
    "A10, L4 24 GB": 21.99,
    "RTX 3090, 4090 24 GB": 23.52,
    "RTX 5090 32 GB": 31.36,
    "A100 40 GB": 39.38,
    "L40S 48 GB": 44.39,
    "RTX A6000 48 GB": 47.40,
    "A100, H100 80 GB": 79.10,
    "H200 141 GB": 139.70,
    "B200 192 GB": 178.35,
}


def that_hold(peak_bytes: int) -> list[str]:
    """Names of the GPUs whose memory holds a peak of so many bytes, smallest first."""
    return [name for name, memory in GPUS.items() if peak_bytes <= memory * 2**30]
