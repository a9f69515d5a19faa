"""Settings of pruning; field descriptions are the command line's help too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from axolotl_loram.config_shares import Ratio, check_ratio, check_sparsity, whole_layers
from axolotl_loram.criteria import CRITERIA
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
            raise LoRAMError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """The first of what pydantic finds wrong, as one sentence."""
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    where = ".".join(str(part) for part in problem["loc"])
    return str(cause) if cause else f"{where}: {problem['msg']}, found {problem['input']!r:.80}"


BLOCK_SIZES = (64, 128, 256)
GPTQ = "nf4-gptq"
"""NF4 that is rounded on text (`pruning/rounding`)."""
NATIVE = "native"
QLORAM = {"lm_head": "nf4", "embedding": "cpu"}
"""Default with load_in_4bit. An embedding on the CPU loses nothing; with NF4 for the rest it is the
only pair that keeps LLaMA-3.1-70B at 0.85 within 4 bits per parameter (8.31 GiB)."""
CALIBRATION_LENGTH = 512
"""Tokens of a calibration sequence by default, where the model reads so many."""
PROTECTED = (4, 2)
"""Layers the paper leaves whole at the start and the end, in structured pruning."""
STRUCTURED = tuple(name for name, criterion in CRITERIA.items() if criterion.units)
SPARSE = tuple(name for name, criterion in CRITERIA.items() if criterion.weights)
UNCALIBRATED = tuple(name for name in STRUCTURED if not CRITERIA[name].calibrated)
if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(CRITERIA)]


class PruningArgs(Section):
    """How to prune: `loram: pruning:` in YAML, options of `axolotl-loram prune`.

    A default that depends on anything else is None here, and is settled by `resolve`: Axolotl
    writes every default out before a plugin sees its section, so that a value tells nothing about
    whether somebody named it.
    """

    method: Method | None = Field(
        default=None,
        description="What to remove. Whole units (--pruning-ratio): random ones, or those of least "
        + ", ".join(f"{name} ({row.about})" for name, row in CRITERIA.items() if row.about)
        + f". Single weights (--sparsity): {', '.join(SPARSE)}. By default activation where there "
        "is calibration text (in a training YAML, its own data sets), otherwise random; with a "
        "sparsity, magnitude.",
    )
    ratio: Ratio | None = Field(
        default=None,
        description="Share of the neurons, KV groups and experts to remove from each pruned layer, "
        "between 0 and 1; or one for each kind of unit, such as "
        "{experts: 0.5, expert_neurons: 0.25}, as an option experts=0.5,expert_neurons=0.25.",
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
        "expert) only if they are named. layers, alone: the first ones of the decoder, whole; "
        "training puts the original's hidden states in their place (`anchor: base`).",
    )
    refit: bool | None = Field(
        default=None,
        description="Fit what stays of down_proj and o_proj to stand in for what is removed, by "
        "ridge regression on calibration text, where that lowers the held-out error. On by "
        "default where the method reads such text, or some is named.",
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
    calibration_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens in each calibration sequence; 512 by default, or what the model reads.",
    )
    load_in_4bit: bool = Field(
        default=False, description="Hold the layer that is being calibrated in 4 bits (NF4)."
    )
    device: Literal["cpu", "cuda"] | None = Field(
        default=None, description="Where to run calibration; the GPU by default where there is one."
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
    quantize: Literal["nf4", "nf4-gptq"] | None = Field(
        default=None,
        description="Store the linear layers, the experts and the lm_head in 4 bits, as QLoRA has "
        "them in memory (NF4, double quantization), in the format that transformers loads "
        "(experts: with this package). nf4-gptq: with the decoder's linear layers rounded so that "
        "numbers make up for each other's errors on calibration text (GPTQ), where that lowers the "
        "held-out error.",
    )
    quantize_block_size: int = Field(
        default=64,
        description="Weights that share a scale: 64, as QLoRA's (4.13 bits a weight), 128 (4.06) "
        "or 256 (4.03).",
    )

    @field_validator("ratio", mode="before")
    @classmethod
    def _inside_unit_interval(cls, ratio: Any) -> Ratio | None:
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
        if isinstance(self.ratio, dict) and self.units:
            raise LoRAMError(
                f"expected units ({', '.join(self.units)}) or a ratio for each kind of unit, found "
                f"both: name in ratio all kinds that are to be removed ({', '.join(self.ratio)})"
            )
        scored = self.method not in (None, "random") or self.refit
        text = self.calibration_path and self.quantize != GPTQ
        if self.whole_layers and (scored or text):
            raise LoRAMError(
                "expected neither method, refit nor calibration text with `units: layers`, found "
                f"one: the first layers go, and those that stay are as they were (text is for "
                f"`quantize: {GPTQ}`)"
            )
        methods = SPARSE if self.sparsity else STRUCTURED
        if self.method and self.method not in methods and not self.indices_path:
            raise LoRAMError(
                f"expected method {', '.join(methods)} with {given[0]}, found {self.method!r}"
            )
        if self.sparsity and (self.refit or self.allocation == "global"):
            raise LoRAMError(
                "expected refit and global allocation with a pruning ratio, found them with "
                "sparsity: sparsegpt does its own compensation, and shares are per layer"
            )
        return self

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """Kinds of unit that are named, by `units` or by a ratio of each."""
        return tuple(self.ratio) if isinstance(self.ratio, dict) else self.units  # type: ignore

    @property
    def whole_layers(self) -> bool:
        """Whether whole decoder layers go."""
        return whole_layers(self.ratio, self.units)

    def resolve(self, own_text: bool = False, longest: int | None = None) -> Pruning:
        """Settle every default that depends on something else: the one place that does.

        Args:
            own_text: Whether a training run's own data are at hand, besides text that is named.
            longest: Tokens that the model reads at most, where that is known.

        Returns:
            Settings that say all they mean. Resolved again, they stay the same.
        """
        whole_units = self.ratio is not None
        text = own_text or self.calibration_path is not None
        method = "magnitude" if self.sparsity else "random"
        if whole_units and text and not self.whole_layers:
            # The recovered adapter kept 96 % of LoRA's gain by this (benchmarks/ablation.py).
            method = "activation"
        method = self.method or method
        reads = CRITERIA[method].calibrated and not self.indices_path
        refit = (
            not self.sparsity
            and not self.whole_layers
            and (reads or self.calibration_path is not None)
        )
        length = min(CALIBRATION_LENGTH, longest or CALIBRATION_LENGTH)
        first, last = (0, 0) if self.sparsity else PROTECTED
        settled = {
            "method": method,
            "refit": refit if self.refit is None else self.refit,
            "calibration_length": self.calibration_length or length,
            "protect_first": first if self.protect_first is None else self.protect_first,
            "protect_last": last if self.protect_last is None else self.protect_last,
        }
        return Pruning.model_validate({**self.model_dump(), **settled})


class Pruning(PruningArgs):
    """`PruningArgs` with nothing left open."""

    method: Method
    refit: bool
    calibration_length: int
    protect_first: int
    protect_last: int

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read: by the method, the refit, or the rounding."""
        return (
            self.refit
            or self.quantize == GPTQ
            or (CRITERIA[self.method].calibrated and not self.indices_path)
        )

    @property
    def protected(self) -> tuple[int, int]:
        """Layers to leave whole at the start and the end."""
        return self.protect_first, self.protect_last


GONE_FILLS = ("normal", "corrected")


def _still_there(fill: Any) -> Any:
    if fill in GONE_FILLS:
        raise LoRAMError(
            f"expected a fill out of zeros and fitted, found {fill}, which is gone, as it won "
            "nowhere in our measurements: use fitted, or zeros"
        )
    return fill


Fill = Annotated[Literal["zeros", "fitted"], BeforeValidator(_still_there)]
"""How a recovered adapter is filled."""


class FillArgs(Section):
    """What a recovered adapter holds for what was pruned: options of `axolotl-loram recover`."""

    fill: Fill = Field(
        default="zeros",
        description="What the adapter holds for pruned features: zeros (the paper's recovery); "
        "fitted (B such that each layer's output changes as in the pruned model, on --calibration "
        "text).",
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
        default=None, description="Where to compute; the GPU by default where there is one."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the samples.")

    @model_validator(mode="after")
    def _text_to_fit_on(self) -> FillArgs:
        if (self.fill == "fitted") != (self.calibration_path is not None):
            found = "text" if self.calibration_path else "none"
            raise LoRAMError(
                f"expected --calibration with --fill fitted and with no other, found {found} with "
                f"{self.fill}: fitted needs text, best that of the fine-tuning"
            )
        return self


ADAPTERS = {"loram": "lora", "qloram": "qlora", "lora": "lora", "qlora": "qlora"}
"""What a YAML may name as its adapter → what Axolotl calls it.

The first two mean the same as the others, but Axolotl refuses them where this package is not
installed, whereas it would train the original model under the others.
"""
