"""Schema of the `loram:` section of an Axolotl YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from axolotl_loram.config import Fill, PruningArgs, Section
from axolotl_loram.errors import LoRAMError

Server = Literal["peft", "merge-lora", "vllm", "llama.cpp", "sglang"]
TEACHER_KEYS = ("teacher_path", "teacher_revision", "teacher_top_k", "next_token_share")
ALIGN_KEYS = ("train_lm_head", "objective")
"""Keys of the `loram:` section that only `stage: align` has."""
ANY_STAGE = ("stage", "cache_dir")
"""Those that both stages have; all others are of `stage: train`."""


class LoRAMConfig(Section):
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
        description="Where pruned models, and a teacher's outputs, are kept; $AXOLOTL_LORAM_CACHE "
        "or ~/.cache/axolotl-loram by default.",
    )
    masked: bool | None = Field(
        default=None,
        description="Confine the update to the weights that are left; on by default where the "
        "pruned model is sparse.",
    )
    anchor: Literal["none", "base"] = Field(
        default="none",
        description="base: the pruned model's predictions are corrected by what lies between it "
        "and base_model, so that the adapter learns what base_model lacks, and not to repair the "
        "pruned model. What base_model says of the training data is computed once, a layer at a "
        "time, and kept on disk. Where whole layers are removed, it is their hidden states, which "
        "take their place. none: the loss of the pruned model alone.",
    )
    anchor_path: str | None = Field(
        default=None,
        description="With `anchor: base`, where base_model is not on this machine: the folder that "
        "`axolotl-loram anchor` wrote.",
    )
    recovery: Literal["plain", "masked"] = Field(
        default="plain",
        description="plain: the adapter for base_model in output_dir. masked: also base_model with "
        "exactly the masked update that was trained, in output_dir/merged.",
    )
    fill: Fill = Field(
        default="zeros",
        description="What the recovered adapter holds for what was pruned, as `axolotl-loram "
        "recover --fill` says; fitted reads the run's own datasets, and the weights of base_model, "
        "a layer at a time, when training has ended.",
    )
    lm_head_format: Literal["native", "nf4"] | None = Field(
        default=None,
        description="What the frozen lm_head is kept in during training: native (as loaded), or "
        "nf4 (as QLoRA's linear layers). With load_in_4bit nf4 by default, where nothing needs it "
        "native; otherwise native.",
    )
    embedding_format: Literal["native", "cpu"] | None = Field(
        default=None,
        description="Where the frozen embedding is kept during training: native, on the device, or "
        "cpu, in the CPU's memory; the rows that a batch needs are sent over. With load_in_4bit "
        "cpu by default, where nothing needs it native; otherwise native.",
    )
    evaluate_recovered_every: int | None = Field(
        default=None,
        ge=1,
        description="Every so many training steps, log loss and perplexity of base_model with the "
        "adapter recovered. The base must fit into memory beside the pruned model; off by default.",
    )
    evaluate_recovered_path: str | None = Field(
        default=None,
        description="Held-out text for that: a .txt or .jsonl file, an Axolotl YAML, or a data set "
        "on the hub. By default what the run holds out (test_datasets, val_set_size).",
    )
    evaluate_recovered_documents: int = Field(
        default=64, ge=1, description="Most documents of that text."
    )
    evaluate_recovered_device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Where the base is held for that."
    )
    serve_with: tuple[Server, ...] | None = Field(
        default=None,
        description="A list of servers that are to take the adapter as it is: one that would not "
        "ends the run before its work, with the setting that avoids it. By default a warning tells "
        "of vllm and llama.cpp.",
    )
    stage: Literal["train", "align"] = Field(
        default="train",
        description="train: LoRA on the pruned model, recovered for base_model. align: continual "
        "pre-training of the pruned model that base_model names, all of its weights.",
    )
    train_lm_head: bool = Field(
        default=False,
        description="In the align stage, train the lm_head too; the paper freezes it.",
    )
    objective: Literal["next-token", "distillation"] = Field(
        default="next-token",
        description="What alignment minimizes: the loss on the data (as the paper), or the "
        "divergence from what the base says on it, computed once and kept on disk.",
    )
    teacher_path: str | None = Field(
        default=None,
        description="Where the base is, for distillation: a folder or hub id; by default what the "
        "pruned model's plan names.",
    )
    teacher_revision: str | None = Field(default=None, description="Its revision on the hub.")
    teacher_top_k: int = Field(
        default=32, ge=1, description="Most likely tokens kept of each place; the rest is one."
    )
    next_token_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of the next-token loss in distillation's."
    )

    @model_validator(mode="after")
    def _keys_of_the_stage(self) -> LoRAMConfig:
        fields = type(self).model_fields
        of_training = [n for n in fields if n not in (*ANY_STAGE, *ALIGN_KEYS, *TEACHER_KEYS)]
        other: dict[str, Sequence[str]] = {
            "stage": ALIGN_KEYS if self.stage == "train" else of_training,
            "objective": TEACHER_KEYS if self.objective == "next-token" else (),
            "anchor": ("anchor_path",) if self.anchor == "none" else (),
        }
        for key, names in other.items():
            found = [name for name in names if getattr(self, name) != fields[name].default]
            if found:
                raise LoRAMError(
                    f"expected no {found[0]} with `{key}: {getattr(self, key)}` in loram:, found "
                    f"{getattr(self, found[0])!r}: take it out, or choose the other {key}"
                )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> LoRAMConfig:
        if self.stage == "align":
            return self  # base_model is the pruned model
        if (self.pruned_model_path is None) == (self.pruning is None):
            found = "both" if self.pruning else "neither"
            raise LoRAMError(
                f"expected pruned_model_path or pruning in loram:, found {found}: give the one "
                "that says where the pruned model comes from"
            )
        return self

    @model_validator(mode="after")
    def _hidden_states_for_layers(self) -> LoRAMConfig:
        if self.pruning and self.pruning.whole_layers and self.anchor != "base":
            raise LoRAMError(
                "expected `anchor: base` in loram: with `units: layers`, found none: the "
                "original's hidden states take the removed layers' place"
            )
        return self

    @model_validator(mode="after")
    def _masks_are_there(self) -> LoRAMConfig:
        if self.recovery == "masked" and self.masked is False:
            raise LoRAMError(
                "expected `recovery: plain` with `masked: false`, found masked: the update that "
                "was trained is not the masked one"
            )
        if self.recovery == "masked" and self.fill != "zeros":
            raise LoRAMError(
                f"expected `fill: zeros` with `recovery: masked`, found {self.fill}: no features "
                "were pruned that something could be put in for"
            )
        structured = self.pruning is not None and not self.pruning.sparsity
        if structured and (self.masked or self.recovery == "masked"):
            raise LoRAMError(
                "expected `sparsity` in pruning: with `masked: true` or `recovery: masked`, found "
                "none: where whole units are removed there is nothing to mask"
            )
        return self


class LoRAMArgs(BaseModel):
    """What the plugin adds to Axolotl's schema."""

    loram: LoRAMConfig = Field(
        description="LoRAM: train the adapter on a pruned model, recover it for base_model; or, "
        "as `stage: align`, align a pruned model."
    )
