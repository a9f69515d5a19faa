"""What of a run can be evaluated: its base and its pruned model, with adapters on them and off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper

import axolotl_loram.models.per_layer  # noqa: F401  (to load pruned models)
from axolotl_loram.architecture.config_json import family_of, load_config, with_defaults
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, named_model, split_name
from axolotl_loram.architecture.pairing import check_pair, check_plan, check_recorded_base
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.record import Kind, Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, has_weights
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.models.four_bit import dequantized, qlora_config
from axolotl_loram.models.masked import confine
from axolotl_loram.recovery.older import of_today
from axolotl_loram.recovery.scatter import vocabulary_of
from axolotl_loram.results.artefacts import ALSO, BASE, MODELS, PRUNED, RECOVERED, TRAINED
from axolotl_loram.text.axolotl_text import one_line

DEFAULT_OUTPUT = "./model-out"  # Axolotl's, which it fills in only after `register`
TRAINED_FOLDER = "pruned"


@dataclass(frozen=True)
class Candidate:
    """A model, or a model with an adapter, that is evaluated.

    Attributes:
        name: One of MODELS, or "also:" and the user's name.
        confined_to: Folder of the sparse pruned model whose zeros the adapter's update keeps to.
    """

    name: str
    model: str
    revision: str | None = None
    adapter: Path | None = None
    confined_to: Path | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens it has, those included that training added."""
        config = load_config(self.model, self.revision)
        tensors = Checkpoint(self.adapter, ADAPTER_FILE).tensors if self.adapter else {}
        return vocabulary_of(tensors, config)

    def describe(self) -> dict[str, Any]:
        """For the results: what it is, by name and by content."""
        found: dict[str, Any] = {"label": self.name.removeprefix(ALSO), "model": self.model}
        if self.revision:
            found["revision"] = self.revision
        found["fingerprint"] = Checkpoint(find_folder(self.model, self.revision)).fingerprint()
        if self.adapter is not None:
            found["adapter"] = str(self.adapter)
            settings = (self.adapter / ADAPTER_CONFIG).read_bytes()
            both = settings + Checkpoint(self.adapter, ADAPTER_FILE).fingerprint().encode()
            found["adapter_fingerprint"] = f"sha256:{hashlib.sha256(both).hexdigest()}"
        if self.confined_to is not None:
            found["masked"] = True
        return found


@dataclass(frozen=True)
class Trial:
    """What is to be evaluated of a run, under the plan of this digest, if there is one."""

    base: Base
    output: Path
    plan: str | None
    candidates: tuple[Candidate, ...]


def trial_of(settings: Mapping[str, Any], names: Sequence[str], also: Mapping[str, Path]) -> Trial:
    """Find what an Axolotl YAML's run made (`names`), and what else is named; check it all.

    Raises:
        LoRAMError: Something that is asked for is not there, or belongs to another model.
    """
    section = settings.get("loram")
    if not isinstance(section, Mapping) or not settings.get("base_model"):
        raise LoRAMError(
            "expected a YAML with base_model and a `loram:` section, found none: give the YAML "
            "that the run was trained with"
        )
    base = Base(str(settings["base_model"]), settings.get("revision_of_model"))
    output = Path(str(settings.get("output_dir") or DEFAULT_OUTPUT))
    record = _record_of(output, names)
    pruned = _pruned_folder(record, section, bool({PRUNED, TRAINED} & set(names)))
    if pruned is not None:
        checked = _check_pruned(pruned, base, record, output)
        if checked.removed and set(names) == set(MODELS):  # all that say something by themselves
            names = (BASE, RECOVERED)
        if {PRUNED, TRAINED} & set(names):
            checked.check_runs_alone(pruned, f"evaluate --models {BASE},{RECOVERED}")
    check_recorded_base(record, base.id, base.revision)
    confined = pruned if record.masked else None
    exact = confined if section.get("recovery") == "masked" else None
    narrow = str(pruned)
    candidates = {
        BASE: Candidate(BASE, base.id, base.revision),
        PRUNED: Candidate(PRUNED, narrow),
        TRAINED: Candidate(TRAINED, narrow, None, output / TRAINED_FOLDER, confined),
        RECOVERED: Candidate(RECOVERED, base.id, base.revision, output, exact),
    }
    chosen = [candidates[name] for name in MODELS if name in names]
    chosen += [_also(name, folder, base) for name, folder in also.items()]
    plan = record.plan or (PruningPlan.load(pruned).digest if pruned else None)
    return Trial(base, output, plan, tuple(chosen))


def _record_of(output: Path, names: Sequence[str]) -> Record:
    """What the run's `loram.json` says; empty where no adapter is asked for and none is there."""
    record = Record.load(output)
    wanted = {TRAINED, RECOVERED} & set(names)
    if wanted and record.kind != Kind.RECOVERED_ADAPTER:
        raise LoRAMError(
            f"expected a recovered adapter in output_dir, found none in {output}: run `axolotl "
            "train` first, or evaluate --models base,pruned"
        )
    if TRAINED in names and not (output / TRAINED_FOLDER / ADAPTER_CONFIG).is_file():
        raise LoRAMError(
            f"expected the adapter as trained in {output / TRAINED_FOLDER}, found none: evaluate "
            f"--models {BASE},{PRUNED},{RECOVERED}"
        )
    return record


def _pruned_folder(record: Record, section: Mapping[str, Any], needed: bool) -> Path | None:
    """The pruned model that the YAML names, or else the one that the run recorded.

    Raises:
        LoRAMError: It is needed, and there is none.
    """
    recorded = (record.trained or {}).get("pruned_model")
    named = section.get("pruned_model_path") or (recorded if isinstance(recorded, str) else None)
    if named and (needed or Path(named).is_dir()):
        return find_folder(named, section.get("pruned_model_revision"))
    if needed:
        raise LoRAMError(
            "expected the run's pruned model, found none: train first, name it by "
            f"`pruned_model_path`, or evaluate --models {BASE}"
        )
    return None


def _check_pruned(pruned: Path, base: Base, record: Record, output: Path) -> PruningPlan:
    plan = PruningPlan.load(pruned)
    check_plan(pruned, plan)
    if record.plan not in (None, plan.digest):
        raise LoRAMError(
            f"expected the adapter in {output} to be trained on {pruned}, found it trained under "
            f"another plan ({str(record.plan)[:19]}…, not {plan.digest[:19]}…): name the pruned "
            "model that it was trained on"
        )
    check_pair(pruned, plan, base.id, base.revision)
    return plan


def _also(name: str, folder: Path, base: Base) -> Candidate:
    """An adapter for the base, or a whole model, such as a merged one."""
    if (folder / ADAPTER_CONFIG).is_file():
        record = Record.load(folder)
        record.refuse_unrecovered(folder)
        check_recorded_base(record, base.id, base.revision)
        return Candidate(f"{ALSO}{name}", base.id, base.revision, folder)
    if not has_weights(folder):
        raise LoRAMError(
            f"expected an adapter or a model in {folder}, found neither {ADAPTER_CONFIG} nor "
            "weights: give the folder that training wrote"
        )
    return Candidate(f"{ALSO}{name}", str(folder))


def load_model(
    model: str,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    load_in_4bit: bool = False,
) -> Any:
    """A model for evaluation.

    Args:
        model: Folder or hub id.
        revision: Of a hub id.
        device: As torch names it, or "auto": over all GPUs, and the CPU's memory for the rest.
        dtype: As torch names it; by default float32 on a CPU, and elsewhere what is stored.
        load_in_4bit: Hold the linear layers in NF4.

    Raises:
        LoRAMError: transformers cannot load it.
    """
    auto = getattr(transformers, family_of(load_config(model, revision)).auto_class)
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    options["dtype"] = dtype or ("float32" if device == "cpu" else "auto")
    if load_in_4bit:
        compute = torch.float32 if device == "cpu" else torch.bfloat16
        options["quantization_config"] = qlora_config(getattr(torch, dtype) if dtype else compute)
    else:
        options |= dequantized(load_config(model, revision))
    placed = device if device == "auto" else {"": device}
    try:
        loaded = auto.from_pretrained(model, revision=revision, device_map=placed, **options)
    except (OSError, ValueError, ImportError) as error:
        raise LoRAMError(
            f"expected a model that transformers loads, found {model} refused "
            f"({one_line(error)}): check the folder and the device"
        ) from error
    return loaded.eval()


@contextmanager
def with_adapter(
    model: Any, adapter: Path | None, confined_to: Path | None = None
) -> Iterator[Any]:
    """In the block, a model has an adapter (or none), confined to the zeros of a sparse model.

    Afterwards the model is what it was.

    Raises:
        LoRAMError: The adapter is for another model.
    """
    if adapter is None:
        yield model
        return
    with _grown(model, adapter):
        adapted = put_on(model, adapter)
        try:
            if confined_to is not None:
                confine(adapted, PruningPlan.load(confined_to), confined_to)
            yield adapted.eval()
        finally:
            _take_off(adapted)


@contextmanager
def _grown(model: Any, adapter: Path) -> Iterator[None]:
    """In the block, the model has the tokens that training added to an adapter's vocabulary."""
    tensors = Checkpoint(adapter, ADAPTER_FILE).tensors
    rows = vocabulary_of(tensors, with_defaults(model.config.to_dict()))
    before = [part.weight.data for part in _embeddings(model)]
    if not before or rows == len(before[0]):
        yield
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        yield
    finally:
        model.resize_token_embeddings(len(before[0]), mean_resizing=False)
        for part, weight in zip(_embeddings(model), before, strict=True):
            part.weight.data = weight  # the adapter's file has these, too


def _embeddings(model: Any) -> list[Any]:
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in found if part is not None]


def put_on(model: Any, adapter: Path) -> PeftModel:
    """An adapter on a model, every tensor of it in its place.

    Raises:
        LoRAMError: It is for another model.
    """
    settings = read_json(adapter / ADAPTER_CONFIG)
    named, problem = named_model(settings, adapter), ""
    stored = Checkpoint(adapter, ADAPTER_FILE).tensors  # PEFT would take a pickle too
    names = of_today(stored, settings, with_defaults(model.config.to_dict()))[0].keys()
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError) as error:
        problem = one_line(error)
    else:
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        modules = dict(adapted.get_base_model().named_modules())
        whole = {name for name in names if ".lora_" not in name}
        homeless = {name for name in whole if split_name(name)[0] not in modules}
        homeless |= names - whole - expected
        problem = f"no place for {min(homeless)}" if homeless else ""
        absent = expected - names
        problem = problem or (f"it has no {min(absent)}" if absent else "")
        if problem:
            _take_off(adapted)
    if problem:
        raise LoRAMError(
            f"expected an adapter for {model.name_or_path}, found {adapter}, made for {named} "
            f"({problem}): give one for this model"
        )
    return adapted


def _take_off(adapted: PeftModel) -> None:
    """Take LoRA off; modules saved whole too, whose trained copies PEFT's `unload` leaves there."""
    model = adapted.get_base_model()
    wrapped = {
        name: module.original_module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    adapted.unload()
    for name, original in wrapped.items():
        model.set_submodule(name, original)
