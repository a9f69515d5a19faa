"""Schema of the `loram:` section; field descriptions are the command line's help too."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from axolotl_loram.errors import LoRAMError


class _Section(BaseModel):
    """A section that names an unknown key and the keys there are."""

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


class PruningArgs(_Section):
    """How to prune: `loram: pruning:` in YAML, options of `axolotl-loram prune`."""

    method: Literal["random", "magnitude"] = Field(
        default="random",
        description="Which units to remove: random ones, or those of the smallest weights "
        "(group L2 norm).",
    )
    ratio: float | None = Field(
        default=None,
        description="Share of the neurons and KV groups to remove from each pruned layer, between "
        "0 and 1.",
    )
    protect_first: int = Field(
        default=4, ge=0, description="Decoder layers at the start that stay whole."
    )
    protect_last: int = Field(
        default=2, ge=0, description="Decoder layers at the end that stay whole."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random method.")
    indices: str | None = Field(
        default=None,
        description="Folder of index files of the LoRAM reference code, used instead of a method.",
    )

    @field_validator("ratio")
    @classmethod
    def _inside_unit_interval(cls, ratio: float | None) -> float | None:
        return None if ratio is None else check_ratio(ratio)

    @model_validator(mode="after")
    def _ratio_or_indices(self) -> PruningArgs:
        if self.ratio is None and self.indices is None:
            raise LoRAMError("expected a pruning ratio, found none: give one such as 0.85")
        return self

    @classmethod
    def parse(cls, **values: Any) -> PruningArgs:
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
            found = f"{where}: {problem['msg']}, found {problem['input']!r}"
            raise LoRAMError(str(cause) if cause else found) from None


def check_ratio(ratio: float) -> float:
    """Refuse a pruning ratio outside (0, 1)."""
    if not 0 < ratio < 1:
        raise LoRAMError(
            f"expected a pruning ratio between 0 and 1 (both excluded), found {ratio}: 0.85 "
            "removes 85 % of each pruned layer's neurons and KV groups"
        )
    return ratio


class LoRAMConfig(_Section):
    """The `loram:` section."""

    pruned_model_path: str | None = Field(
        default=None, description="Pruned model to train on: a folder or a hub id."
    )
    pruned_model_revision: str | None = Field(
        default=None, description="Revision of the pruned model on the hub."
    )
    pruning: PruningArgs | None = Field(
        default=None, description="Prune base_model this way first, into a cache."
    )
    cache_dir: str | None = Field(
        default=None,
        description="Where `pruning:` keeps pruned models; $AXOLOTL_LORAM_CACHE or "
        "~/.cache/axolotl-loram by default.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> LoRAMConfig:
        if (self.pruned_model_path is None) == (self.pruning is None):
            found = "both" if self.pruning else "neither"
            raise LoRAMError(
                f"expected pruned_model_path or pruning in loram:, found {found}: give the one "
                "that says where the pruned model comes from"
            )
        return self


class LoRAMArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    loram: LoRAMConfig = Field(
        description="LoRAM: train the adapter on a pruned model, recover it for base_model."
    )
