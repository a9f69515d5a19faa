"""What a folder or a model on the hub is, and whether it is what its record says.

Of checks, one failure hides no other: all are made, and all that failed are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from axolotl_loram.architecture.config_json import (
    Config,
    layer_count,
    layer_fields,
    load_config,
    sizes_of,
)
from axolotl_loram.architecture.counts import keep_counts, protected_layers, summary
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.model import layer_groups, parameter_count
from axolotl_loram.architecture.pairing import check_pruned, check_tensors
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import (
    RECORD_FILE,
    Kind,
    Record,
    refit_summary,
    rounding_summary,
)
from axolotl_loram.architecture.ties import by_weights
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_shares import spelled
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import MODEL_PATTERNS, find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.quantized import FORMATS, check_format, format_of
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, has_weights
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.recovery.servable import Verdict, as_json, subject_of, verdicts
from axolotl_loram.results import checks
from axolotl_loram.results.artefacts import EVALUATION_FILE
from axolotl_loram.results.checks import Failed, Subject, Unknown
from axolotl_loram.tables import lines

SMALL_PATTERNS = ("config.json", "loram*", ADAPTER_CONFIG, EVALUATION_FILE)
ALL_PATTERNS = (*MODEL_PATTERNS, ADAPTER_CONFIG, EVALUATION_FILE, "*.py")
STRUCTURED = ("alignments", "calibration", "memory", "checks", "failed", "versions", "servable")
"""Entries with parts of their own, which people see on lines of their own."""
PRUNING = ("method", "ratio", "sparsity", "allocation", "quantize")
TOLD = ("weight_bytes", "calibration", "alignments", "masked")
TRAINING = ("pruned_model", "warm_start", "memory")
"""What is told: of the pruning's settings, of the record itself, of the training."""
RATIOS = (0.5, 0.75, 0.85)
"""Pruning ratios that people are shown first."""
Outcome = Literal["ok", "failed", "not checked"]
CheckFunction = Callable[[Subject], str | None]
MODEL = (checks.files, checks.strays, checks.weights)
PRUNED = (checks.plan, checks.config, checks.counts, checks.masks, checks.base, checks.tokenizer)
ADAPTER = (
    checks.strays,
    checks.tensors,
    checks.trained_under,
    checks.shapes,
    checks.modules,
    checks.tokenizer,
)
CHECKS: Mapping[Kind, tuple[CheckFunction, ...]] = {
    Kind.PRUNED_MODEL: (*MODEL, *PRUNED),
    Kind.RECOVERED_MODEL: MODEL,
    Kind.TRAINED_ADAPTER: ADAPTER,
    Kind.RECOVERED_ADAPTER: (checks.files, checks.settings, *ADAPTER, checks.base),
}
"""Kind of folder → what can be checked of it."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        outcome: "ok", "failed", or "not checked" where there is no telling.
    """

    name: str
    outcome: Outcome
    detail: str


def verify(folder: Path, base: str | None = None, progress: Progress = no_progress) -> list[Check]:
    """Check all that can be checked of a pruned model or an adapter, in a folder with `loram.json`.

    The base is by default what the record names, where that is on this machine; nothing is
    downloaded but the config of a `base` that is given.

    Raises:
        LoRAMError: There is no record that could be held against the files.
    """
    record = Record.load(folder)
    kind, origin = record.require(folder)
    if kind not in CHECKS:
        raise LoRAMError(f"expected one of {', '.join(CHECKS)} to check, found {kind} in {folder}")
    subject = Subject(folder, record, kind, origin, base, progress)
    return [found for check in CHECKS[kind] for found in _outcomes(check, subject)]


def failures(made: Iterable[Check]) -> list[Check]:
    """The checks that failed."""
    return [check for check in made if check.outcome == "failed"]


def require_whole(made: Iterable[Check], what: object) -> None:
    """Refuse what failed a check, naming every failure."""
    failed = failures(made)
    if failed:
        listed = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise LoRAMError(
            f"expected every check of {what} to pass, found {len(failed)} failed: {listed}"
        )


def _outcomes(check: CheckFunction, subject: Subject) -> Iterator[Check]:
    name = check.__name__.replace("_", " ")
    try:
        told = check(subject)
        if told is not None:
            yield Check(name, "ok", told)
    except Unknown as why:
        yield Check(name, "not checked", str(why))
    except Failed as reasons:
        yield from (Check(name, "failed", reason) for reason in reasons.args)
    except LoRAMError as error:
        yield Check(name, "failed", str(error))
    except OSError as error:
        yield Check(name, "failed", f"a file cannot be read: {error}")


def inspect(
    model: str,
    revision: str | None = None,
    verifying: bool = False,
    base: str | None = None,
    progress: Progress = no_progress,
    servable: bool = False,
) -> dict[str, Any]:
    """Tell what a model or an adapter is, and with `verifying` whether what LoRAM made is whole.

    See `api.inspect`, which says what the arguments mean and when LoRAMError is raised. Of a hub
    id, only small files are downloaded unless `verifying`.

    Returns:
        What `loram.json` says; "checks" and "failed" (how many) where they were made; "servable",
        a verdict for each server. Of a folder without a record, what `describe_ordinary` finds.
    """
    patterns = (*SMALL_PATTERNS, ADAPTER_FILE) if servable else SMALL_PATTERNS
    folder = find_folder(model, revision, ALL_PATTERNS if verifying else patterns)
    record = Record.load(folder)
    served = {"servable": as_json(verdicts(subject_of(folder)))} if servable else {}
    if not record and not verifying:
        return describe_ordinary(folder, model) | served
    made = verify(folder, base, progress) if verifying else []
    told = _told(folder, record) | served
    try:
        if (folder / PLAN_FILE).exists():
            plan = PruningPlan.load(folder)
            told |= {**(record.parameters or {}), **summary(plan.config, plan.counts)}
            told |= refit_summary(record.refit or {}) | rounding_summary(record.rounding or {})
            if not verifying and has_weights(folder):
                check_pruned(folder, plan)
    except LoRAMError:
        if not failures(made):
            raise  # else what is wrong is among the checks
    counted = {"checks": list(map(asdict, made)), "failed": len(failures(made))}
    return told | (counted if made else {})


def _told(folder: Path, record: Record) -> dict[str, Any]:
    """What a record says, as far as people ask for it."""
    kind, base = record.require(folder)
    pruning, said = record.pruning or {}, record.as_json()
    told = {
        "kind": kind,
        **{f"base_{name}".removesuffix("_id"): value for name, value in vars(base).items()},
        "plan": record.plan,
        **{name: pruning.get(name) for name in PRUNING},
        **{name: said.get(name) for name in TOLD},
        **{name: record.run.get(name) for name in TRAINING},
        "versions": record.versions,
    }
    return {name: value for name, value in told.items() if value is not None}


def describe_ordinary(folder: Path, model: str) -> dict[str, Any]:
    """What a folder without `loram.json`, called `model`, holds, and what can be done with it.

    Raises:
        LoRAMError: It holds neither, or a model of an unknown architecture, or weights that do not
            belong to its config.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _describe_adapter(read_json(folder / ADAPTER_CONFIG))
    if not (folder / "config.json").is_file():
        raise LoRAMError(
            f"expected a folder with config.json, {ADAPTER_CONFIG} or {RECORD_FILE}, found none of "
            f"them in {model}: give a model or an adapter"
        )
    config = load_config(str(folder))
    checkpoint = Checkpoint(folder) if has_weights(folder) else None
    config = by_weights(config, checkpoint) if checkpoint else config
    fields = layer_fields(config, None)
    told = {
        "kind": "model",
        "model_type": config["model_type"],
        "layers": layer_count(config),
        "hidden_size": sizes_of(config)["hidden"],
        "vocabulary": fields.get("vocab_size"),
        "tied_embeddings": bool(fields.get("tie_word_embeddings")),
        "parameters": parameter_count(config),
        **(_weights(checkpoint, config) if checkpoint else {}),
        **_pruning(config, model),
    }
    return {name: value for name, value in told.items() if value is not None}


def _weights(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    stored = checkpoint.stored
    if format_of(config) in (None, *FORMATS):
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        check_tensors(config, shapes, str(checkpoint.folder))
    return {
        "weight_bytes": sum(tensor.nbytes for tensor in stored.values()),
        "stored_as": ", ".join(sorted({tensor.dtype for tensor in stored.values()})),
    }


def _pruning(config: Config, model: str) -> dict[str, Any]:
    """Units of the layers that pruning touches, sizes at a few ratios, and the next command."""
    layers, settings = layer_count(config), PruningArgs(ratio=RATIOS[0]).resolve()
    try:
        check_format(config, model)
        sizes = list(_sizes(config, settings.protected))
    except LoRAMError as error:
        return {"cannot_be_pruned": str(error)}
    return {
        "units_of_a_layer": {
            group.kind: sizes_of(config, layer)[group.kind]
            for layer in range(layers)
            for group in layer_groups(config, layer)
        },
        "layers_left_whole": sorted(protected_layers(layers, *settings.protected)),
        "pruned": sizes,
        "next": f"axolotl-loram plan {model} --pruning-ratio {RATIOS[0]}",
    }


def _sizes(config: Config, protected: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for ratio in RATIOS:
        try:
            counted = summary(config, keep_counts(config, ratio, *protected))
        except LoRAMError:
            if ratio == RATIOS[0]:
                raise
            return  # a layer would lose its last unit of some kind
        kept = ("kept_per_pruned_layer", "pruned_parameters", "parameter_reduction")
        yield {"pruning_ratio": ratio, **{name: counted[name] for name in kept}}


def _describe_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    base, targets = settings.get("base_model_name_or_path"), settings.get("target_modules")
    told = {
        "kind": "adapter",
        "peft_type": settings.get("peft_type"),
        "base": base,
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "target_modules": ", ".join(sorted(map(str, targets)))
        if isinstance(targets, list)
        else targets,
        "next": "lora_model_dir of a LoRAM run on this base starts from it; an adapter trained on "
        "a pruned model outside `axolotl train`: axolotl-loram recover ADAPTER --pruned-model "
        "MODEL",
    }
    return {name: value for name, value in told.items() if value is not None}


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe_ordinary` returns, as names and values for people."""
    told = dict(found)
    if "units_of_a_layer" in told:
        told["units_of_a_layer"] = _units(told["units_of_a_layer"])
        told["layers_left_whole"] = ", ".join(map(str, told["layers_left_whole"]))
        for size in told.pop("pruned"):
            told[f"pruned_at_{size['pruning_ratio']}"] = (
                f"{size['pruned_parameters']:,} parameters (×{size['parameter_reduction']}), "
                f"{_units(size['kept_per_pruned_layer'])} in each pruned layer"
            )
        told["next"] = told.pop("next")
    return told


def _units(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items())


def report(found: Mapping[str, Any]) -> str:
    """What `inspect` returns, for people."""
    served = "\n\n" + servable_lines(found["servable"]) if "servable" in found else ""
    if found["kind"] in ("model", "adapter"):
        return lines(_shown({n: v for n, v in found.items() if n != "servable"})) + served
    named = {name: value for name, value in found.items() if name not in STRUCTURED}
    if "ratio" in named:
        named["ratio"] = spelled(named["ratio"])
    if found.get("calibration"):
        named["calibration"] = calibration_line(found["calibration"])
    for index, alignment in enumerate(found.get("alignments") or [], start=1):
        named[f"alignment {index}"] = alignment_line(alignment)
    if found.get("versions"):
        named["made with"] = ", ".join(f"{n} {v}" for n, v in found["versions"].items())
    told = lines(named) + served
    return f"{told}\n\n{check_lines(found['checks'])}" if "checks" in found else told


def calibration_line(calibration: Mapping[str, Any]) -> str:
    """Calibration text in one line."""
    sizes = f"{calibration.get('samples')} × {calibration.get('length')} tokens"
    return f"{sizes} of {calibration.get('source')}, seed {calibration.get('seed')}"


def alignment_line(alignment: Mapping[str, Any]) -> str:
    """One alignment in one line: how, how long, on what, and what it gained."""
    tokens, heldout = alignment.get("tokens"), alignment.get("heldout_loss")
    parts = [
        f"{alignment.get('objective', 'next-token')}",
        f"{alignment.get('steps')} steps",
        f"{tokens:,} tokens" if isinstance(tokens, int) else "",
        f"of {sources_of(alignment.get('data'))}" if alignment.get("data") else "",
    ]
    gained = (
        f"held-out loss {heldout['before']:.4f} → {heldout['after']:.4f}"
        if heldout and None not in (heldout.get("before"), heldout.get("after"))
        else "held-out loss not measured"
    )
    return f"{', '.join(part for part in parts if part)}; {gained}"


def sources_of(data: Any) -> str:
    """What an alignment's data is called, whichever way the YAML named it."""
    if isinstance(data, Mapping):
        named = data.get("path") or data.get("source") or data
        settings = [str(data[key]) for key in ("name", "split") if data.get(key)]
        return f"{named}" + (f" ({', '.join(settings)})" if settings else "")
    if isinstance(data, Sequence) and not isinstance(data, str):
        return " + ".join(sources_of(part) for part in data)
    return str(data)


def check_lines(checks: Sequence[Mapping[str, str]]) -> str:
    """Checks, one to a line: outcome, name, sentence."""
    width = max(len(check["name"]) for check in checks)
    return "\n".join(
        f"{check['outcome']:<11}  {check['name']:<{width}}  {check['detail']}" for check in checks
    )


def servable_lines(made: Sequence[Mapping[str, Any]]) -> str:
    """Verdicts of servers, one to a line."""
    versions = ", ".join(one["version"] for one in made)
    told = {one["server"]: Verdict(**one) for one in made}
    return f"taken as it is, by the rules of {versions}:\n{lines(told)}"
