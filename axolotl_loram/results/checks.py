"""What is checked of a folder with `loram.json`: files, and all that a model or adapter says.

A check is a generator function of a `Subject`: it yields findings, an outcome with one sentence,
and where it raises a `LoRAMError`, that is the sentence of a failure.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from axolotl_loram.architecture.config_json import Config, load_config
from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, named_model, split_name
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
from axolotl_loram.architecture.plan import PLAN_FILE, RECORD_FILE, Base, PruningPlan, mask_digest
from axolotl_loram.architecture.vocabulary import differ, vocabulary_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import MODEL_PATTERNS, commit_of, find_local_file, find_local_weights
from axolotl_loram.files.nf4 import logical_shapes
from axolotl_loram.files.progress import Progress
from axolotl_loram.files.tensors import ADAPTER_FILE, BLOCK_BYTES, Checkpoint
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.recovery.scatter import LORA_AXES, match
from axolotl_loram.recovery.whole import PROBLEMS, check_modules, names_modules

Outcome = Literal["ok", "failed", "not checked"]
Finding = tuple[Outcome, str]
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*")
STRAYS = {
    "pruned-model": (*MODEL_PATTERNS, *WEIGHTS, "adapter_*", "*.py"),
    "recovered-model": (*WEIGHTS, "adapter_*", "*.py"),
    "trained-adapter": ("adapter_model.*.safetensors",),
    "recovered-adapter": (*WEIGHTS, "config.json", "*.py"),
}
"""Files that loaders would take notice of: of these, only what is recorded may be there."""


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        folder: The folder.
        record: Its `loram.json`.
        base: Folder or hub id to hold it against, by default the base that it names.
        progress: Shows the bytes hashed.
    """

    folder: Path
    record: Mapping[str, Any]
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
    def adapter(self) -> Checkpoint:
        """The adapter's tensors."""
        return Checkpoint(self.folder, ADAPTER_FILE)

    @property
    def base_model(self) -> tuple[str, str | None]:
        """Folder or hub id of the base to compare with, and its revision."""
        named = self.record["base"]
        if self.base in (None, named["id"]):
            return named["id"], named.get("revision")
        return str(self.base), None


def files(subject: Subject) -> Iterator[Finding]:
    """Every recorded file is there, with the recorded SHA-256."""
    recorded: Mapping[str, str] = subject.record.get("files") or {}
    if not recorded:
        yield "not checked", f"{RECORD_FILE} has no digests of files"
        return
    inside = {name: subject.folder / name for name in recorded if is_inside(name)}
    there = {name: path for name, path in inside.items() if path.is_file()}
    size = sum(path.stat().st_size for path in there.values())
    done, whole = subject.progress(size, "verifying"), 0
    for name, digest in recorded.items():
        if name not in inside:
            yield "failed", f"{RECORD_FILE} lists {name!r}, which is outside of the folder"
        elif name not in there:
            yield "failed", f"{name} is missing"
        elif (found := sha256_of(there[name], done)) != digest:
            yield (
                "failed",
                f"{name} has SHA-256 {found[:16]}…, recorded is {digest[:16]}…: it is damaged or "
                "was changed",
            )
        else:
            whole += 1
    if whole == len(recorded):
        yield "ok", f"{whole} files, {size:,} bytes, have the recorded SHA-256"


def strays(subject: Subject) -> Iterator[Finding]:
    """No file beside the recorded ones that a loader would take notice of."""
    kind, recorded = subject.record["kind"], {RECORD_FILE, *(subject.record.get("files") or ())}
    if "adapter" in kind:
        recorded |= {ADAPTER_FILE, ADAPTER_CONFIG}
    found = [
        file.name
        for file in sorted(subject.folder.iterdir())
        if file.name not in recorded
        and any(fnmatch.fnmatch(file.name, pattern) for pattern in STRAYS[kind])
    ]
    for name in found:
        yield "failed", f"{name} is not in {RECORD_FILE}, but would be loaded: remove it"
    if not found:
        yield "ok", "no weights, settings or code beside the recorded ones"


def plan(subject: Subject) -> Iterator[Finding]:
    """The plan is the recorded one, for the recorded base."""
    check_plan(subject.folder, subject.plan)
    recorded, planned = subject.record["base"], vars(subject.plan.base)
    differing = [name for name, value in planned.items() if recorded.get(name) != value]
    for name in differing:
        of_both = f"{planned[name]}, {RECORD_FILE} {recorded.get(name)}"
        yield "failed", f"as {name} of the base, {PLAN_FILE} names {of_both}"
    if not differing:
        yield "ok", f"its digest is {subject.plan.digest[:23]}…, as recorded"


def config(subject: Subject) -> Iterator[Finding]:
    """config.json gives the widths of the plan."""
    where = str(subject.folder / "config.json")
    check_tensors(subject.plan.pruned_config, shapes_of(load_config(str(subject.folder))), where)
    yield "ok", "config.json gives every layer the width that the plan leaves"


def weights(subject: Subject) -> Iterator[Finding]:
    """The tensors are those of the plan, or of the model's own config where there is no plan."""
    planned = (subject.folder / PLAN_FILE).exists()
    expected = subject.plan.pruned_config if planned else load_config(str(subject.folder))
    check_tensors(expected, logical_shapes(subject.weights.tensors), str(subject.folder))
    check_fingerprint(subject.weights, subject.record)
    source = "plan" if planned else "config"
    yield "ok", f"{len(subject.weights.tensors)} tensors have the shapes of the {source}"


def counts(subject: Subject) -> Iterator[Finding]:
    """Recorded sizes and parameter counts are those of the files."""
    stored = sum(tensor.nbytes for tensor in subject.weights.tensors.values())
    found = {**summary(subject.plan.config, subject.plan.counts), "weight_bytes": stored}
    recorded = {"weight_bytes": subject.record.get("weight_bytes")}
    recorded |= subject.record.get("parameters") or {}
    wrong = [
        name
        for name in ("base_parameters", "pruned_parameters", "weight_bytes")
        if recorded.get(name) != found[name]
    ]
    for name in wrong:
        yield "failed", f"{name} is {found[name]:,}, recorded is {recorded.get(name)}"
    if not wrong:
        yield "ok", f"{found['pruned_parameters']:,} parameters in {stored:,} bytes, as recorded"


def masks(subject: Subject) -> Iterator[Finding]:
    """Of a sparse model: the zeros are still where pruning put them."""
    planned = subject.plan.masks
    names = [name for name in planned if mask_digest(_bits(subject, name)) != planned[name]]
    for name in names:
        yield "failed", f"{name} has other zeros than it was pruned to"
    if planned and not names:
        yield "ok", f"{len(planned)} weights have the zeros they were pruned to"


def base(subject: Subject) -> Iterator[Finding]:
    """The base is the one that was pruned, where it is on this machine."""
    (model, revision), recorded = (
        subject.base_model,
        Base.from_json(subject.record["base"], RECORD_FILE),
    )
    file = find_local_file(model, "config.json", revision)
    if file is None and subject.base is None:
        yield "not checked", f"no config of {model} on this machine: pass --base FOLDER"
        return
    if (subject.folder / PLAN_FILE).exists():
        recorded = subject.plan.base
        check_base_shapes(subject.plan, model, revision)
    found = find_local_weights(model, revision)
    if found is None or recorded.fingerprint is None:
        why = "no fingerprint was recorded" if found else f"no weights of {model} on this machine"
        yield "not checked", f"{why}: pass --base FOLDER" if recorded.fingerprint else why
        return
    commit = commit_of(found, revision)
    fingerprint = check_base_weights(recorded, model, found, commit)
    yield "ok", f"{model} has the recorded fingerprint {fingerprint[:23]}…"


def tokenizer(subject: Subject) -> Iterator[Finding]:
    """The tokenizer is the recorded one: of an adapter, its model's; of a model, its base's."""
    adapter = "adapter" in subject.record["kind"]
    yield from (_adapter_tokenizer if adapter else _model_tokenizer)(subject)


def _model_tokenizer(subject: Subject) -> Iterator[Finding]:
    """It is the one that was there when the model was pruned, and its base's."""
    (model, revision), own = subject.base_model, vocabulary_digest(subject.folder)
    recorded = subject.record.get("vocabulary")
    if own is None:
        if recorded:
            raise LoRAMError(f"expected the tokenizer that {RECORD_FILE} records, found none")
        yield "not checked", "there is no tokenizer"
        return
    if differ(own, recorded):
        raise LoRAMError(f"the vocabulary is another than the one that {RECORD_FILE} records")
    check_base_tokenizer(subject.folder, model, revision)
    yield "ok", f"its vocabulary is the recorded one, and that of {model} where it is here"


def _adapter_tokenizer(subject: Subject) -> Iterator[Finding]:
    """It is the pruned model's."""
    model, own = _pruned_model(subject), vocabulary_digest(subject.folder)
    found = find_local_file(model, RECORD_FILE) if model else None
    if own is None or found is None:
        named = f"no pruned model {model or ''} on this machine".replace("  ", " ")
        yield "not checked", named if own else "there is no tokenizer beside the adapter"
        return
    check_adapter_tokenizer(subject.folder, found.parent)
    yield "ok", f"its vocabulary is that of {model}, as far as that tells"


def settings(subject: Subject) -> Iterator[Finding]:
    """adapter_config.json names the recorded base."""
    found = named_model(subject.folder)
    if found != subject.record["base"]["id"]:
        named = subject.record["base"]["id"]
        raise LoRAMError(f"{ADAPTER_CONFIG} is for {found}, {RECORD_FILE} for {named}")
    yield "ok", f"{ADAPTER_CONFIG} names the recorded base, {found}"


def tensors(subject: Subject) -> Iterator[Finding]:
    """The adapter holds whole, finite, trained pairs of A and B."""
    adapter = subject.adapter
    found = {problem: names for problem, find in PROBLEMS.items() if (names := find(adapter))}
    for problem, names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield "failed", f"{names[0]}{more}: {problem}"
    if not any(split_name(name)[1] in LORA_AXES for name in adapter.tensors):
        yield "failed", f"there is no LoRA in {ADAPTER_FILE}"
    elif not found:
        yield "ok", f"{len(adapter.tensors)} tensors are whole, finite and trained"


def trained_under(subject: Subject) -> Iterator[Finding]:
    """The pruned model that the adapter was trained on has the recorded plan."""
    model = _pruned_model(subject)
    found = find_local_file(model, PLAN_FILE) if model else None
    if found is None:
        named = f"no plan of {model} on this machine" if model else "no pruned model is recorded"
        yield "not checked", named
        return
    check_trained_under(subject.folder, PruningPlan.load(found.parent))
    yield "ok", f"{model} has the plan that the adapter was trained under"


def shapes(subject: Subject) -> Iterator[Finding]:
    """The adapter fits the model that it is for: the pruned one, once recovered the base."""
    recovered, (model, fitting) = _is_recovered(subject), _plan_of_model(subject)
    if fitting is None:
        yield "not checked", f"no config of {model} on this machine: pass --base MODEL"
        return
    match(subject.adapter, fitting, full_size=recovered)
    yield "ok", f"{len(subject.adapter.tensors)} tensors have the shapes of {model}"


def modules(subject: Subject) -> Iterator[Finding]:
    """The tensors are those of the modules that adapter_config.json names."""
    file = subject.folder / ADAPTER_CONFIG
    config, (model, fitting) = read_json(file), _plan_of_model(subject)
    if fitting is None or not names_modules(config):
        named = f"no config of {model} on this machine: pass --base MODEL"
        yield "not checked", named if fitting is None else f"{ADAPTER_CONFIG} names no modules"
        return
    check_modules(subject.adapter, config, fitting)
    yield "ok", f"A and B are there of every module that {ADAPTER_CONFIG} names, and of no other"


def _is_recovered(subject: Subject) -> bool:
    return subject.record["kind"] == "recovered-adapter"


def _plan_of_model(subject: Subject) -> tuple[str | None, PruningPlan | None]:
    """The model that an adapter is for, the base or the pruned one, and a plan with its shapes."""
    if _is_recovered(subject):
        return subject.base_model[0], _plan_of_base(subject)
    model = _pruned_model(subject)
    return model, _plan_of_pruned(model)


def _plan_of_base(subject: Subject) -> PruningPlan | None:
    """A plan that keeps all of the base, if its config is on this machine, or is asked for."""
    model, revision = subject.base_model
    file = find_local_file(model, "config.json", revision)
    if file is None and subject.base is None:
        return None
    config: Config = load_config(str(file)) if file else load_config(model, revision)
    return PruningPlan(config, {})


def _plan_of_pruned(model: str | None) -> PruningPlan | None:
    file = find_local_file(model, PLAN_FILE) if model else None
    return PruningPlan.load(file.parent) if file else None


def _pruned_model(subject: Subject) -> str | None:
    """Folder or hub id of the pruned model that an adapter was trained on, where it is recorded."""
    trained = subject.record.get("trained") or subject.record.get("training") or {}
    if trained.get("pruned_model") or _is_recovered(subject):
        named = trained.get("pruned_model")
        return named if isinstance(named, str) else None
    has_config = (subject.folder / ADAPTER_CONFIG).exists()
    return named_model(subject.folder) if has_config else None


def is_inside(name: str) -> bool:
    """Whether a recorded name is of a file in the folder, or of one in a folder of it."""
    path = Path(name)
    return name == path.as_posix() and 0 < len(path.parts) < 3 and not {"..", "/"} & {*path.parts}


def _bits(subject: Subject, name: str) -> Any:
    if name not in subject.weights.tensors:
        raise LoRAMError(f"expected the sparse weight {name}, found none")
    return subject.weights[name].read()


def sha256_of(file: Path, done: Callable[[int], Any] = lambda count: None) -> str:
    """A file's SHA-256 in hexadecimal, read a block at a time; `done` hears of every block."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(BLOCK_BYTES):
            digest.update(block)
            done(len(block))
    return digest.hexdigest()
