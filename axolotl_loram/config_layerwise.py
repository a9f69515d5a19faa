"""Settings of layer-wise alignment, which the command line shows without importing torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from axolotl_loram.config import Section


class LayerwiseArgs(Section):
    """How to align layer by layer: options of `axolotl-loram align`."""

    calibration_path: str = Field(
        description="Text to align on: a .txt or .jsonl file, an Axolotl YAML (its datasets), or a "
        "data set on the hub (org/name or org/name:subset). Best what the base was trained on.",
    )
    calibration_samples: int = Field(
        default=512, ge=2, description="Sequences of it; an eighth is held out."
    )
    calibration_length: int = Field(default=512, ge=2, description="Tokens in each sequence.")
    steps: int = Field(default=200, ge=1, description="Steps of AdamW for each pruned layer.")
    batch_size: int = Field(default=8, ge=1, description="Sequences in each step.")
    learning_rate: float = Field(
        default=1e-4, gt=0, description="Its highest value; warmup and a cosine follow it."
    )
    device: Literal["cpu", "cuda"] | None = Field(
        default=None, description="Where to compute; the GPU by default where there is one."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the samples and of their order.")
