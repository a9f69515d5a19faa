"""The JSON that runs leave, as `report` reads it: which kind it is, and what is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from pydantic import BaseModel, ValidationError

from axolotl_loram.architecture.config_json import layer_count, sizes_of
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.model import layer_groups
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import RECORD_FILE, Kind, Record
from axolotl_loram.config_evaluate import MODELS
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import is_folder
from axolotl_loram.files.quantized import format_of
from axolotl_loram.files.untrusted import read_json

BASE, PRUNED, TRAINED, RECOVERED = MODELS
ALSO = "also:"
EVALUATION_FILE = "evaluation.json"
EVALUATION_VERSION = 1
TRAINER_STATE = "trainer_state.json"
EXPECTED = (
    "an output_dir of `axolotl train`, a pruned model, an evaluation.json, or what `axolotl-loram "
    "plan --json` prints"
)
RunKind = Literal["loram", "lora", "pruned", "plan", "evaluation"]
Units = tuple[int, int] | None
"""Of a layer: kept, of how many in the base; None where it has no such units."""


class Loss(BaseModel):
    """Mean nats per token of a model on a set, and the standard error over documents."""

    loss: float
    standard_error: float | None = None


class Paired(BaseModel):
    """A model's loss (or score) minus that of another on the same documents."""

    against: str = ""
    difference: float
    standard_error: float | None = None


class TextSet(BaseModel):
    """Held-out text and the models' losses on it."""

    kind: str = "in_domain"
    source: str | None = None
    tokens: int | None = None
    documents: int | None = None
    models: dict[str, Loss]
    paired: dict[str, Paired] = {}
    recovered_against: dict[str, Paired] = {}


class Score(BaseModel):
    """A task's score, and its standard error over samples."""

    value: float
    standard_error: float | None = None


class TaskScores(BaseModel):
    """A task and the models' scores."""

    metric: str = ""
    num_fewshot: int | None = None
    samples: int | None = None
    models: dict[str, Score]
    paired: dict[str, Paired] = {}


class Evaluation(BaseModel):
    """What `axolotl-loram evaluate` writes to evaluation.json."""

    base: dict[str, Any] = {}
    plan: str | None = None
    models: dict[str, dict[str, Any]] = {}
    perplexity: dict[str, TextSet] = {}
    tasks: dict[str, TaskScores] = {}
    seed: int | None = None
    batch_size: Any = None
    device: str | None = None
    dtype: str | None = None
    versions: dict[str, str] = {}


@dataclass
class Artefact:
    """One RUN that `report` is given.

    Attributes:
        record: `loram.json`, or what `plan --json` printed; empty for plain LoRA.
        pruned: `loram.json` of the pruned model, where that is on this machine.
        widths: What `kept_units` tells of the pruned model.
        quantized: Whether plain LoRA ran on a quantized model; None where that is not recorded.
    """

    label: str
    path: Path
    kind: RunKind
    record: dict[str, Any] = field(default_factory=dict)
    pruned: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    widths: dict[str, list[Units]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    quantized: bool | None = None

    @property
    def trained(self) -> bool:
        """Whether it is a run of training."""
        return self.kind in ("loram", "lora")

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of what was logged under `key`, leaving out what is not finite."""
        points = [(entry.get("step"), entry.get(key)) for entry in self.history]
        return [
            (int(step), float(value))
            for step, value in points
            if _is_number(step) and _is_number(value)
        ]


def read(paths: Sequence[Path]) -> list[Artefact]:
    """Read every RUN.

    Raises:
        LoRAMError: One is not there, is of no known kind, is damaged, or of a newer version.
    """
    labels = _labels(paths)
    return [_read(path, label) for path, label in zip(paths, labels, strict=True)]


def _read(path: Path, label: str) -> Artefact:
    if path.name == RECORD_FILE:
        path = path.parent
    if path.is_dir():
        return _read_folder(path, label)
    if not path.exists():
        raise LoRAMError(f"expected a RUN at {path}, found nothing there: give {EXPECTED}")
    found = read_json(path, linked=True)
    if found.get("kind") == "evaluation":
        return Artefact(label, path, "evaluation", evaluation=_evaluation(found, path))
    if isinstance(found.get("methods"), dict) and "base_parameters" in found:
        return Artefact(label, path, "plan", record=found)
    if isinstance(found.get("log_history"), list):
        return Artefact(label, path, "lora", history=_entries(found))
    raise LoRAMError(f"expected a RUN at {path}, found other JSON: give {EXPECTED}")


def _read_folder(folder: Path, label: str) -> Artefact:
    record = Record.load(folder)
    file, state = folder / EVALUATION_FILE, _trainer_state(folder)
    evaluation = _evaluation(read_json(file), file) if file.exists() else None
    settings = folder / ADAPTER_CONFIG
    artefact = Artefact(label, folder, "lora", evaluation=evaluation)
    artefact.record = record.as_json() if record else {}
    artefact.settings = read_json(settings) if settings.exists() else {}
    artefact.history = _entries(read_json(state)) if state else []
    if record.kind == Kind.PRUNED_MODEL:
        artefact.kind, artefact.pruned = "pruned", artefact.record
        artefact.widths = kept_units(PruningPlan.load(folder))
    elif record:
        artefact.kind = "loram"
        _add_training(artefact, record)
    elif artefact.settings or state:
        config = folder / "config.json"
        artefact.quantized = bool(format_of(read_json(config))) if config.exists() else None
    elif evaluation:
        artefact.kind = "evaluation"
    else:
        raise LoRAMError(f"expected a RUN in {folder}, found no JSON of one: give {EXPECTED}")
    return artefact


def training_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a LoRAM adapter's record says of its training."""
    return dict(record.get("trained") or record.get("training") or {})


def _entries(state: Mapping[str, Any], key: str = "log_history") -> list[dict[str, Any]]:
    """What a trainer logged."""
    found = state.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _add_training(artefact: Artefact, record: Record) -> None:
    """What a LoRAM run's own record, and the pruned model it names, add."""
    training = record.run
    artefact.history = _entries(training, "history") or artefact.history
    named = str(training.get("pruned_model") or "")
    folder = Path(named)
    if named and is_folder(named) and (folder / PLAN_FILE).exists():
        plan = PruningPlan.load(folder)
        if plan.digest == record.plan:
            artefact.pruned, artefact.widths = Record.load(folder).as_json(), kept_units(plan)


def _trainer_state(folder: Path) -> Path | None:
    """The trainer's latest state in an output_dir, or in what a LoRAM run keeps of training."""
    here = [folder / TRAINER_STATE, folder / "pruned" / TRAINER_STATE]
    checkpoints = [*folder.glob("checkpoint-*"), *folder.glob("pruned/checkpoint-*")]
    steps = {int(c.name[11:]): c for c in checkpoints if c.name[11:].isdigit()}
    here += [steps[step] / TRAINER_STATE for step in sorted(steps, reverse=True)]
    return next((file for file in here if file.exists()), None)


def kept_units(plan: PruningPlan) -> dict[str, list[Units]]:
    """What a kind of unit that is pruned anywhere is called, "KV groups" → units of each layer."""
    pruned = {kind for counts in plan.counts.values() for kind in counts}
    found: dict[str, list[Units]] = {}
    for layer in range(layer_count(plan.config)):
        for group in layer_groups(plan.config, layer):
            if group.kind in pruned:
                total = sizes_of(plan.config, layer)[group.kind]
                kept = plan.counts.get(layer, {}).get(group.kind, total)
                head, of, rest = group.noun.partition(" of ")
                name = f"{head}s{of}{rest}"
                column = found.setdefault(name, [None] * layer_count(plan.config))
                column[layer] = kept, total
    return found


def _evaluation(found: Mapping[str, Any], file: Path) -> Evaluation:
    version = found.get("schema_version", EVALUATION_VERSION)
    if version != EVALUATION_VERSION:
        raise LoRAMError(
            f"expected schema version {EVALUATION_VERSION} in {file}, found {version}: upgrade "
            "axolotl-loram"
        )
    try:
        return Evaluation.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LoRAMError(
            f"expected an evaluation in {file}, found {where}: {first['msg']}: write it again "
            "with `axolotl-loram evaluate`"
        ) from None


def _labels(paths: Sequence[Path]) -> list[str]:
    """For each path its last parts, as few as tell the paths apart."""
    named = [path.parent if path.name == RECORD_FILE else path for path in paths]
    parts = [
        path.resolve().with_suffix("" if path.suffix == ".json" else path.suffix).parts
        for path in named
    ]
    for count in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(each[-count:]) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
