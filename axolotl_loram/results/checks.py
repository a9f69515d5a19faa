"""What is checked of a folder with `loram.json`: files, and all that a model or adapter says.

A check is a function of a `Subject`. It returns one sentence where all is well (None if there is
nothing of the kind), and raises `Unknown` where there is no telling, a `LoRAMError` for one failure
and `Failed` for several.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, split_name
from axolotl_loram.architecture.pairing import (
    check_adapter_tokenizer,
    check_base_shapes,
    check_base_tokenizer,
    check_base_weights,
    check_fingerprint,
    check_plan,
    check_tensors,
    check_trained_under,
    shapes_of,
)
from axolotl_loram.architecture.plan import PLAN_FILE, Base, PruningPlan, mask_digest
from axolotl_loram.architecture.record import RECORD_FILE, Kind, Record
from axolotl_loram.architecture.vocabulary import differ, vocabulary_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import MODEL_PATTERNS, commit_of, find_local_file, find_local_weights
from axolotl_loram.files.nf4 import logical_shapes
from axolotl_loram.files.progress import Progress
from axolotl_loram.files.tensors import ADAPTER_FILE, BLOCK_BYTES, Checkpoint
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.scatter import LORA_AXES, match
from axolotl_loram.recovery.whole import PROBLEMS, check_modules, names_modules

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*")
STRAYS: Mapping[Kind, tuple[str, ...]] = {
    Kind.PRUNED_MODEL: (*MODEL_PATTERNS, *WEIGHTS, "adapter_*", "*.py"),
    Kind.RECOVERED_MODEL: (*WEIGHTS, "adapter_*", "*.py"),
    Kind.TRAINED_ADAPTER: ("adapter_model.*.safetensors",),
    Kind.RECOVERED_ADAPTER: (*WEIGHTS, "config.json", "*.py"),
}
"""Files that loaders would take notice of: of these, only what is recorded may be there."""


class Unknown(Exception):
    """What a check needs is not on this machine, or not recorded."""


class Failed(Exception):
    """A check failed, for each of the sentences in `args`."""


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        base: Folder or hub id to hold it against, by default `origin`.
    """

    folder: Path
    record: Record
    kind: Kind
    origin: Base
    base: str | None
    progress: Progress

    @cached_property
    def plan(self) -> PruningPlan:
        """The plan in the folder."""
        return PruningPlan.load(self.folder)

    @cached_property
    def weights(self) -> Checkpoint:
        """The model's weights."""
        return Checkpoint(self.folder)

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter."""
        return Adapter.open(self.folder)

    @property
    def base_model(self) -> tuple[str, str | None]:
        """Folder or hub id of the base to compare with, and its revision."""
        if self.base in (None, self.origin.id):
            return self.origin.id, self.origin.revision
        return str(self.base), None

    @property
    def is_recovered(self) -> bool:
        """Whether it is an adapter for the base."""
        return self.kind == Kind.RECOVERED_ADAPTER

    @property
    def pruned_model(self) -> str | None:
        """Folder or hub id of the model that an adapter was trained on, where that is known."""
        named = self.record.run.get("pruned_model")
        if named or self.is_recovered:
            return named if isinstance(named, str) else None
        return self.adapter.model if (self.folder / ADAPTER_CONFIG).exists() else None

    def trained_on(self, file: str) -> Path:
        """The folder of the pruned model that an adapter was trained on, by a file in it."""
        model = self.pruned_model
        if model is None:
            raise Unknown("no pruned model is recorded")
        found = find_local_file(model, file)
        if found is None:
            raise Unknown(f"no {file} of {model} on this machine")
        return found.parent

    @property
    def fitting(self) -> tuple[str | None, PruningPlan]:
        """The model that an adapter is for, the base or the pruned one, and a plan of its shapes.

        Of the base, it keeps all.
        """
        if not self.is_recovered:
            return self.pruned_model, PruningPlan.load(self.trained_on(PLAN_FILE))
        model, revision = self.base_model
        file = find_local_file(model, "config.json", revision)
        if file is None and self.base is None:
            raise Unknown(f"no config of {model} on this machine: pass --base MODEL")
        return model, PruningPlan(load_config(*(str(file),) if file else (model, revision)), {})

    def bits(self, name: str) -> np.ndarray:
        """A weight of the model."""
        if name not in self.weights.tensors:
            raise LoRAMError(f"expected the sparse weight {name}, found none")
        return self.weights[name].read()


def refuse(wrong: Iterable[str]) -> None:
    """Fail a check for every reason there is."""
    reasons = list(wrong)
    if reasons:
        raise Failed(*reasons)


def files(subject: Subject) -> str:
    """Every recorded file is there, with the recorded SHA-256."""
    recorded = subject.record.files or {}
    if not recorded:
        raise Unknown(f"{RECORD_FILE} has no digests of files")
    inside = {name: subject.folder / name for name in recorded if is_inside(name)}
    there = {name: path for name, path in inside.items() if path.is_file()}
    size = sum(path.stat().st_size for path in there.values())
    done, wrong = subject.progress(size, "verifying"), []
    for name, digest in recorded.items():
        if name not in inside:
            wrong.append(f"{RECORD_FILE} lists {name!r}, which is outside of the folder")
        elif name not in there:
            wrong.append(f"{name} is missing")
        elif (found := sha256_of(there[name], done)) != digest:
            wrong.append(
                f"{name} has SHA-256 {found[:16]}…, recorded is {digest[:16]}…: it is damaged or "
                "was changed"
            )
    refuse(wrong)
    return f"{len(recorded)} files, {size:,} bytes, have the recorded SHA-256"


def strays(subject: Subject) -> str:
    """No file beside the recorded ones that a loader would take notice of."""
    recorded = {RECORD_FILE, *(subject.record.files or ())}
    if subject.kind.is_adapter:
        recorded |= {ADAPTER_FILE, ADAPTER_CONFIG}
    names = sorted({file.name for file in subject.folder.iterdir()} - recorded)
    patterns = STRAYS[subject.kind]
    found = [name for name in names if any(fnmatch.fnmatch(name, each) for each in patterns)]
    refuse(f"{name} is not in {RECORD_FILE}, but would be loaded: remove it" for name in found)
    return "no weights, settings or code beside the recorded ones"


def plan(subject: Subject) -> str:
    """The plan is the recorded one, for the recorded base."""
    check_plan(subject.folder, subject.plan)
    recorded, planned = vars(subject.origin), vars(subject.plan.base)
    refuse(
        f"as {name} of the base, {PLAN_FILE} names {value}, {RECORD_FILE} {recorded[name]}"
        for name, value in planned.items()
        if recorded[name] != value
    )
    return f"its digest is {subject.plan.digest[:23]}…, as recorded"


def config(subject: Subject) -> str:
    """config.json gives the widths of the plan."""
    where = str(subject.folder / "config.json")
    check_tensors(subject.plan.pruned_config, shapes_of(load_config(str(subject.folder))), where)
    return "config.json gives every layer the width that the plan leaves"


def weights(subject: Subject) -> str:
    """The tensors are those of the plan, or of the model's own config where there is no plan."""
    planned = (subject.folder / PLAN_FILE).exists()
    expected = subject.plan.pruned_config if planned else load_config(str(subject.folder))
    check_tensors(expected, logical_shapes(subject.weights.tensors), str(subject.folder))
    check_fingerprint(subject.weights, subject.record)
    source = "plan" if planned else "config"
    return f"{len(subject.weights.tensors)} tensors have the shapes of the {source}"


def counts(subject: Subject) -> str:
    """Recorded sizes and parameter counts are those of the files."""
    stored = subject.weights.nbytes
    found = {**summary(subject.plan.config, subject.plan.counts), "weight_bytes": stored}
    recorded = {"weight_bytes": subject.record.weight_bytes, **(subject.record.parameters or {})}
    refuse(
        f"{name} is {found[name]:,}, recorded is {recorded.get(name)}"
        for name in ("base_parameters", "pruned_parameters", "weight_bytes")
        if recorded.get(name) != found[name]
    )
    return f"{found['pruned_parameters']:,} parameters in {stored:,} bytes, as recorded"


def masks(subject: Subject) -> str | None:
    """Of a sparse model: the zeros are still where pruning put them."""
    planned = subject.plan.masks
    refuse(
        f"{name} has other zeros than it was pruned to"
        for name in planned
        if mask_digest(subject.bits(name)) != planned[name]
    )
    return f"{len(planned)} weights have the zeros they were pruned to" if planned else None


def base(subject: Subject) -> str:
    """The base is the one that was pruned, where it is on this machine."""
    (model, revision), recorded = subject.base_model, subject.origin
    if find_local_file(model, "config.json", revision) is None and subject.base is None:
        raise Unknown(f"no config of {model} on this machine: pass --base FOLDER")
    if (subject.folder / PLAN_FILE).exists():
        recorded = subject.plan.base
        check_base_shapes(subject.plan, model, revision)
    found = find_local_weights(model, revision)
    if recorded.fingerprint is None:
        raise Unknown("no fingerprint was recorded")
    if found is None:
        raise Unknown(f"no weights of {model} on this machine: pass --base FOLDER")
    fingerprint = check_base_weights(recorded, model, found, commit_of(found, revision))
    return f"{model} has the recorded fingerprint {fingerprint[:23]}…"


def tokenizer(subject: Subject) -> str:
    """The tokenizer is the recorded one: of an adapter, its model's; of a model, its base's."""
    own, recorded = vocabulary_digest(subject.folder), subject.record.vocabulary
    if subject.kind.is_adapter:
        if own is None:
            raise Unknown("there is no tokenizer beside the adapter")
        check_adapter_tokenizer(subject.folder, subject.trained_on(RECORD_FILE))
        return f"its vocabulary is that of {subject.pruned_model}, as far as that tells"
    if own is None and not recorded:
        raise Unknown("there is no tokenizer")
    if own is None:
        raise LoRAMError(f"expected the tokenizer that {RECORD_FILE} records, found none")
    if differ(own, recorded):
        raise LoRAMError(f"the vocabulary is another than the one that {RECORD_FILE} records")
    check_base_tokenizer(subject.folder, *subject.base_model)
    named = subject.base_model[0]
    return f"its vocabulary is the recorded one, and that of {named} where it is here"


def settings(subject: Subject) -> str:
    """adapter_config.json names the recorded base."""
    found, recorded = subject.adapter.model, subject.origin.id
    if found != recorded:
        raise LoRAMError(f"{ADAPTER_CONFIG} is for {found}, {RECORD_FILE} for {recorded}")
    return f"{ADAPTER_CONFIG} names the recorded base, {found}"


def tensors(subject: Subject) -> str:
    """The adapter holds whole, finite, trained pairs of A and B."""
    stored, wrong = subject.adapter.tensors, []
    for problem, find in PROBLEMS.items():
        if names := find(stored):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            wrong.append(f"{names[0]}{more}: {problem}")
    if not any(split_name(name)[1] in LORA_AXES for name in stored):
        wrong.append(f"there is no LoRA in {ADAPTER_FILE}")
    refuse(wrong)
    return f"{len(stored)} tensors are whole, finite and trained"


def trained_under(subject: Subject) -> str:
    """The pruned model that the adapter was trained on has the recorded plan."""
    trained = PruningPlan.load(subject.trained_on(PLAN_FILE))
    check_trained_under(subject.record, trained, subject.folder)
    return f"{subject.pruned_model} has the plan that the adapter was trained under"


def shapes(subject: Subject) -> str:
    """The adapter fits the model that it is for: the pruned one, once recovered the base."""
    model, fitting = subject.fitting
    adapter = subject.adapter.of_today(fitting.pruned_config)  # which of the base is the base's
    match(adapter, fitting, full_size=subject.is_recovered)
    return f"{len(subject.adapter.tensors)} tensors have the shapes of {model}"


def modules(subject: Subject) -> str:
    """The tensors are those of the modules that adapter_config.json names."""
    _, fitting = subject.fitting
    if not names_modules(subject.adapter.settings):
        raise Unknown(f"{ADAPTER_CONFIG} names no modules")
    check_modules(subject.adapter.of_today(fitting.pruned_config), fitting)
    return f"A and B are there of every module that {ADAPTER_CONFIG} names, and of no other"


def is_inside(name: str) -> bool:
    """Whether a recorded name is of a file in the folder, or of one in a folder of it."""
    path = Path(name)
    return name == path.as_posix() and 0 < len(path.parts) < 3 and not {"..", "/"} & {*path.parts}


def sha256_of(file: Path, done: Callable[[int], Any] = lambda count: None) -> str:
    """A file's SHA-256 in hexadecimal, read a block at a time; `done` hears of every block."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(BLOCK_BYTES):
            digest.update(block)
            done(len(block))
    return digest.hexdigest()
