"""What `evaluate` is asked for, which the command line shows without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Model = Literal["base", "pruned", "pruned+adapter", "base+recovered"]
MODELS: tuple[str, ...] = get_args(Model)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EvaluationRequest:
    """What is to be evaluated, and how: keywords of `api.evaluate`, options of the command.

    Attributes:
        config: The Axolotl YAML of the run.
        batch_size: To start with, by default as many as suit the device; halved where memory does
            not suffice.
    """

    config: Path
    models: tuple[Model, ...] = Field(
        default=get_args(Model), description="What to evaluate, separated by commas."
    )
    also: dict[str, Path] = Field(
        default_factory=dict,
        description="A further adapter for the base, or a whole model. With one called lora, the "
        "share of its gain that the recovered adapter keeps is shown.",
    )
    in_domain: tuple[str, ...] = Field(
        default=(),
        description="Text like the training data: a .txt, .jsonl or Axolotl .yml file, or a data "
        "set on the hub (name, name:subset, name:subset:split). By default what CONFIG holds out "
        "(test_datasets, val_set_size).",
    )
    out_of_domain: tuple[str, ...] = Field(default=(), description="Other text, named alike.")
    tasks: tuple[str, ...] = Field(
        default=(),
        description="Tasks or groups of lm-eval, TASK or TASK:SHOTS, or YAML files that declare "
        "one; commas or several times.",
    )
    suite: Literal["paper"] | None = Field(
        default=None, description="The tasks of the LoRAM paper."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Most documents of a set, and questions of a task."
    )
    length: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens that are read at once; by default as many as suit the model, up "
        "to 2048 or the YAML's sequence_len.",
    )
    batch_size: int | None = Field(default=None, ge=1)
    output: Path | None = Field(
        default=None, description="The JSON to write; by default evaluation.json in output_dir."
    )
    device: str | None = Field(
        default=None, description="cpu, cuda, cuda:1 …, or auto (all GPUs, then CPU memory)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="By default float32 on a CPU, and elsewhere what is stored."
    )
    load_in_4bit: bool = Field(default=False, description="Hold the linear layers in 4 bits (NF4).")
    backend: Literal["peft", "vllm"] = Field(
        default="peft", description="What runs the tasks on the base and its adapters."
    )
    allow_code: bool = Field(default=False, description="Run programs the model writes.")
    seed: int = Field(
        default=1234,
        description="Of what is drawn: documents, examples shown in tasks, sampled answers.",
    )
