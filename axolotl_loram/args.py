"""Settings of pruning; field descriptions are the command line's help too."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from axolotl_loram.errors import LoRAMError


class Section(BaseModel):
    """A section that names an unknown key and the keys there are.

    Keys whose values may be paths are named `…_path` or `…_dir`: by these parts of their names
    Axolotl's telemetry, which sees a YAML before it knows of plugins, knows what not to send.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        unknown = sorted(set(data) - set(cls.model_fields)) if isinstance(data, dict) else []
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0]!r} in loram: expected {', '.join(cls.model_fields)}"
            )
        return data

    @classmethod
    def parse(cls, **values: Any) -> Self:
        """Build from loose values, with the first problem as one sentence.

        Raises:
            LoRAMError: A value is not allowed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            cause = problem.get("ctx", {}).get("error")
            where = ".".join(str(part) for part in problem["loc"])
            found = f"{where}: {problem['msg']}, found {problem['input']!r:.80}"
            raise LoRAMError(str(cause) if cause else found) from None


STRUCTURED = ("random", "magnitude", "activation", "fluctuation", "taylor")
SPARSE = ("magnitude", "wanda", "sparsegpt")
CALIBRATED = ("activation", "fluctuation", "taylor", "wanda", "sparsegpt")
BLOCK_SIZES = (64, 128, 256)
NATIVE = "native"
QLORAM = {"lm_head": "nf4", "embedding": "cpu"}
"""Default with load_in_4bit. An embedding on the CPU loses nothing; with NF4 for the rest it is the
only pair that keeps LLaMA-3.1-70B at 0.85 within 4 bits per parameter (8.31 GiB)."""
OWN_DATA = {"method": "activation"}
"""Default where there is text. With it and the refit, on the fine-tuning data, the recovered
adapter kept 95 % of the gain of LoRA at 0.75, and hurt other text less (benchmarks/ablation.py)."""
PROTECTED = (4, 2)
"""Layers the paper leaves whole at the start and the end, in structured pruning."""


class PruningArgs(Section):
    """How to prune: `loram: pruning:` in YAML, options of `axolotl-loram prune`."""

    method: Literal[
        "random", "magnitude", "activation", "fluctuation", "taylor", "wanda", "sparsegpt"
    ] = Field(
        default="random",
        description="What to remove. Whole units (--pruning-ratio): random ones, or those of least "
        "magnitude (group L2 norm), activation (Wanda: norm of the weights times norm of the "
        "inputs), fluctuation (FLAP: variance of the inputs), taylor (LLM-Pruner: first-order "
        "change of the loss). Single weights (--sparsity): magnitude, wanda, sparsegpt. By default "
        "activation where there is calibration text (in a training YAML, its own data sets).",
    )
    ratio: float | None = Field(
        default=None,
        description="Share of the neurons and KV groups to remove from each pruned layer, between "
        "0 and 1.",
    )
    sparsity: float | str | None = Field(
        default=None,
        description="Instead of a ratio: share of each layer's weights to set to zero, such as "
        '0.55, or a pattern such as "2:4" (2 of each 4 consecutive inputs stay). Zeros save no '
        "memory by themselves.",
    )
    allocation: Literal["uniform", "global"] = Field(
        default="uniform",
        description="Remove the same share from each layer, or let the scores of all layers "
        "compete for the same number of units in all.",
    )
    units: tuple[str, ...] | str | None = Field(
        default=None,
        description="Kinds of unit to remove, separated by commas: by default neurons, kv_groups "
        "(or heads) and experts, as the model has them; expert_neurons (an equal share of each "
        "expert) only if they are named.",
    )
    refit: bool | None = Field(
        default=None,
        description="Fit what stays of down_proj and o_proj to stand in for what is removed, by "
        "ridge regression on calibration text, where that lowers the held-out error. On by "
        "default where there is calibration text.",
    )
    calibration_path: str | None = Field(
        default=None,
        description="Calibration text: a .txt or .jsonl file, an Axolotl YAML (its datasets), or a "
        "data set on the hub (org/name or org/name:subset). In a training YAML, its own datasets "
        "by default.",
    )
    calibration_samples: int = Field(
        default=128, ge=2, description="Calibration sequences; an eighth is held out by the refit."
    )
    calibration_length: int = Field(
        default=512, ge=2, description="Tokens in each calibration sequence."
    )
    load_in_4bit: bool = Field(
        default=False,
        description="Hold the layer that is being calibrated in 4 bits (NF4).",
    )
    device: Literal["cpu", "cuda"] | None = Field(
        default=None,
        description="Where to run calibration; the GPU by default where there is one.",
    )
    protect_first: int | None = Field(
        default=None,
        ge=0,
        description="Decoder layers at the start that stay whole; 4 by default, 0 with sparsity.",
    )
    protect_last: int | None = Field(
        default=None,
        ge=0,
        description="Decoder layers at the end that stay whole; 2 by default, 0 with sparsity.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the random method and of the calibration samples."
    )
    indices_path: str | None = Field(
        default=None,
        description="Folder of index files of the LoRAM reference code, used instead of a method.",
    )
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="Store the linear layers and the lm_head in 4 bits, as QLoRA has them in "
        "memory (NF4, double quantization), in the format that transformers loads.",
    )
    quantize_block_size: int = Field(
        default=64,
        description="Weights that share a scale: 64, as QLoRA's (4.13 bits a weight), 128 (4.06) "
        "or 256 (4.03).",
    )

    @model_validator(mode="before")
    @classmethod
    def _magnitude_where_single_weights_go(cls, data: Any) -> Any:
        """Random zeros are of no use: with a sparsity, the default method is magnitude."""
        if isinstance(data, dict) and data.get("sparsity") is not None:
            return {**data, "method": data.get("method") or "magnitude"}
        return data

    @field_validator("ratio")
    @classmethod
    def _inside_unit_interval(cls, ratio: float | None) -> float | None:
        return None if ratio is None else check_ratio(ratio)

    @field_validator("units", mode="before")
    @classmethod
    def _names(cls, units: Any) -> Any:
        return tuple(part.strip() for part in units.split(",")) if isinstance(units, str) else units

    @field_validator("sparsity", mode="before")
    @classmethod
    def _share_or_pattern(cls, sparsity: Any) -> float | str | None:
        return None if sparsity is None else check_sparsity(sparsity)

    @field_validator("quantize_block_size")
    @classmethod
    def _known_block_size(cls, size: int) -> int:
        if size not in BLOCK_SIZES:
            raise LoRAMError(f"expected quantize_block_size 64, 128 or 256, found {size}")
        return size

    @model_validator(mode="before")
    @classmethod
    def _activation_where_there_is_text(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "method" in data or not data.get("calibration_path"):
            return data
        return data if data.get("sparsity") or data.get("indices_path") else data | OWN_DATA

    @model_validator(mode="after")
    def _whole_units_if_quantized(self) -> PruningArgs:
        if self.quantize and self.sparsity:
            raise LoRAMError(
                "expected quantize with a pruning ratio, found it with sparsity: which weights are "
                "zero would no longer be known; train with load_in_4bit instead"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_prune(self) -> PruningArgs:
        given = [name for name in ("ratio", "sparsity", "indices_path") if getattr(self, name)]
        if not given:
            raise LoRAMError("expected a pruning ratio, found none: give one such as 0.85")
        if len(given) > 1:
            raise LoRAMError(
                f"expected one of ratio, sparsity and indices, found {' and '.join(given)}: units "
                "are removed by ratio or indices, single weights by sparsity"
            )
        methods = SPARSE if self.sparsity else STRUCTURED
        if self.method not in methods and not self.indices_path:
            raise LoRAMError(
                f"expected method {', '.join(methods)} with {given[0]}, found {self.method!r}"
            )
        if self.sparsity and (self.refit or self.allocation == "global"):
            raise LoRAMError(
                "expected refit and global allocation with a pruning ratio, found them with "
                "sparsity: sparsegpt does its own compensation, and shares are per layer"
            )
        return self

    def on_own_data(self) -> PruningArgs:
        """The settings where a training run's own data are at hand, as in its YAML."""
        named = "method" in self.model_fields_set or self.ratio is None
        return self if named else self.model_copy(update=OWN_DATA)

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read: by the method, by the refit, or because it is given."""
        method = self.method in CALIBRATED and not self.indices_path
        return method or self.refits

    @property
    def refits(self) -> bool:
        """Whether the kept weights are refitted."""
        if self.refit is not None or self.sparsity:
            return bool(self.refit)
        return self.calibration_path is not None or (
            self.method in CALIBRATED and not self.indices_path
        )

    @property
    def protected(self) -> tuple[int, int]:
        """Layers to leave whole at the start and the end."""
        first, last = (0, 0) if self.sparsity else PROTECTED
        first = first if self.protect_first is None else self.protect_first
        return first, last if self.protect_last is None else self.protect_last


def check_ratio(ratio: float) -> float:
    """Refuse a pruning ratio outside (0, 1)."""
    if not 0 < ratio < 1:
        raise LoRAMError(
            f"expected a pruning ratio between 0 and 1 (both excluded), found {ratio}: 0.85 "
            "removes 85 % of each pruned layer's neurons and KV groups"
        )
    return ratio


def check_sparsity(sparsity: Any) -> float | str:
    """A share of zeros in (0, 1), or a pattern "N:M" with 0 < N < M.

    YAML 1.1 reads an unquoted 2:4 as the base-60 number 124, which is taken back here.
    """
    if isinstance(sparsity, int) and not isinstance(sparsity, bool) and sparsity > 60:
        sparsity = "{}:{}".format(*divmod(sparsity, 60))
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", str(sparsity))
    if found and 0 < int(found[1]) < int(found[2]):
        return f"{int(found[1])}:{int(found[2])}"
    try:
        share = float(sparsity)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise LoRAMError(
            "expected a sparsity between 0 and 1 (both excluded) or a pattern such as 2:4, found "
            f"{sparsity!r}: 0.55 sets 55 % of the weights to zero"
        )
    return share


class FillArgs(Section):
    """What a recovered adapter holds for what was pruned: options of `axolotl-loram recover`."""

    fill: Literal["zeros", "normal", "corrected", "fitted"] = Field(
        default="zeros",
        description="What the adapter holds for pruned features: zeros (the paper's recovery); "
        "normal (random values in A, as the reference code's normA); corrected (as EMLoC: B takes "
        "back what the two models' weights differ by along A); fitted (B such that each layer's "
        "output changes as in the pruned model, on --calibration text).",
    )
    calibration_path: str | None = Field(
        default=None,
        description="Text for fitted: best that of the fine-tuning. A .txt or .jsonl file, an "
        "Axolotl YAML (its datasets), or a data set on the hub (org/name or org/name:subset).",
    )
    calibration_samples: int = Field(
        default=32, ge=2, description="Sequences of it; an eighth is held out."
    )
    calibration_length: int = Field(default=512, ge=2, description="Tokens in each sequence.")
    device: Literal["cpu", "cuda"] | None = Field(
        default=None,
        description="Where to compute; the GPU by default where there is one.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the samples, and of normal.")

    @model_validator(mode="after")
    def _text_to_fit_on(self) -> FillArgs:
        if (self.fill == "fitted") != (self.calibration_path is not None):
            found = "text" if self.calibration_path else "none"
            raise LoRAMError(
                f"expected --calibration with --fill fitted and with no other, found {found} with "
                f"{self.fill}: fitted needs text, best that of the fine-tuning"
            )
        return self
