"""GPUs: the memory that PyTorch finds on them in GiB, and what NVIDIA says they do in a second.

Memory is as `torch.cuda.get_device_properties(0).total_memory` and out-of-memory messages give it,
which is less than the name says: the driver and error correction take their part. Drivers differ by
some hundredths; the lower figure stands here.

Speeds are from NVIDIA's architecture whitepapers (GA102, Ada, RTX Blackwell) and data sheets (T4,
A10, L4, L40S, A100, H100, H200, B200), at the rated boost clock: dense bfloat16 matrix products
that are summed in float32 (of a T4, float16), and reading memory. Cards may clock higher than they
are rated. PCIe is what 16 lanes carry in one direction (3.0: 15.75, 4.0: 31.5, 5.0: 63 GB/s).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from axolotl_loram.errors import LoRAMError

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
PCIE: Mapping[int, float] = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}
"""Generation → bytes a second, one way, on 16 lanes."""


@dataclass(frozen=True)
class Card:
    """What a card holds, and what it can do in a second.

    Attributes:
        memory: Its name in `GPUS`.
        tflops: 10¹² floating-point operations a second.
        bandwidth: 10⁹ bytes a second from its memory.
        pcie: Generation of PCIe, 16 lanes.
    """

    memory: str
    tflops: float
    bandwidth: float
    pcie: int

    @property
    def memory_bytes(self) -> int:
        """Bytes that PyTorch finds."""
        return int(GPUS[self.memory] * 2**30)

    @property
    def pcie_bytes(self) -> float:
        """Bytes a second from the host, and as many to it at the same time."""
        return PCIE[self.pcie]


CARDS: Mapping[str, Card] = {
    "RTX 3060": Card("RTX 3060 12 GB", 25.5, 360, 4),
    "T4": Card("T4 16 GB", 65.0, 320, 3),
    "RTX 4080": Card("RTX 4080 16 GB", 97.5, 716.8, 4),
    "A10": Card("A10, L4 24 GB", 125.0, 600, 4),
    "L4": Card("A10, L4 24 GB", 121.0, 300, 4),
    "RTX 3090": Card("RTX 3090, 4090 24 GB", 71.0, 936, 4),
    "RTX 4090": Card("RTX 3090, 4090 24 GB", 165.2, 1008, 4),
    "RTX 5090": Card("RTX 5090 32 GB", 209.5, 1792, 5),
    "A100 40 GB": Card("A100 40 GB", 312.0, 1555, 4),
    "L40S": Card("L40S 48 GB", 362.05, 864, 4),
    "RTX A6000": Card("RTX A6000 48 GB", 154.8, 768, 4),
    "A100 80 GB": Card("A100, H100 80 GB", 312.0, 2039, 4),
    "H100": Card("A100, H100 80 GB", 989.4, 3350, 5),
    "H200": Card("H200 141 GB", 989.4, 4800, 5),
    "B200": Card("B200 192 GB", 2250.0, 8000, 5),
}


def that_hold(peak_bytes: int) -> list[str]:
    """Names of the GPUs whose memory holds a peak of so many bytes, smallest first."""
    return [name for name, memory in GPUS.items() if peak_bytes <= memory * 2**30]


def card_of(name: str) -> Card:
    """A card by its name, however spaced and spelt large.

    Raises:
        LoRAMError: It is not known.
    """

    def plain(text: str) -> str:
        return text.lower().replace(" ", "").removeprefix("nvidia").removeprefix("geforce")

    found = [card for known, card in CARDS.items() if plain(known) == plain(name)]
    if not found:
        raise LoRAMError(
            f"expected a GPU whose speed is known, found {name!r}: give one of {', '.join(CARDS)}"
        )
    return found[0]
