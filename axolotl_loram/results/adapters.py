"""What is checked of an adapter: its tensors, its plan where that is at hand, and what it fits."""

from __future__ import annotations

from collections.abc import Iterator

from axolotl_loram.architecture.config_json import Config, load_config
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, named_model, split_name
from axolotl_loram.architecture.pairing import check_adapter_tokenizer, check_trained_under
from axolotl_loram.architecture.plan import PLAN_FILE, RECORD_FILE, PruningPlan
from axolotl_loram.architecture.vocabulary import vocabulary_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_local_file
from axolotl_loram.files.tensors import ADAPTER_FILE
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.recovery.scatter import LORA_AXES, match
from axolotl_loram.recovery.whole import PROBLEMS, check_modules, names_modules
from axolotl_loram.results.checks import Finding, Subject


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


def tokenizer(subject: Subject) -> Iterator[Finding]:
    """The tokenizer beside the adapter is the pruned model's."""
    model, own = _pruned_model(subject), vocabulary_digest(subject.folder)
    found = find_local_file(model, RECORD_FILE) if model else None
    if own is None or found is None:
        named = f"no pruned model {model or ''} on this machine".replace("  ", " ")
        yield "not checked", named if own else "there is no tokenizer beside the adapter"
        return
    check_adapter_tokenizer(subject.folder, found.parent)
    yield "ok", f"its vocabulary is that of {model}, as far as that tells"


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
