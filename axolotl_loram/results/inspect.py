"""What `axolotl-loram inspect` tells of a folder or a model on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.pairing import check_pruned, read_record
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import refit_summary
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import MODEL_PATTERNS, find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.tensors import has_weights
from axolotl_loram.results.artefacts import EVALUATION_FILE
from axolotl_loram.results.ordinary import describe_ordinary, shown
from axolotl_loram.results.verify import as_dicts, failures, verify
from axolotl_loram.tables import lines

SMALL_PATTERNS = ("config.json", "loram*", ADAPTER_CONFIG, EVALUATION_FILE)
ALL_PATTERNS = (*MODEL_PATTERNS, ADAPTER_CONFIG, EVALUATION_FILE, "*.py")
STRUCTURED = ("alignments", "calibration", "memory", "checks", "failed", "versions")
"""Entries with parts of their own, which people see on lines of their own."""


def inspect(
    model: str,
    revision: str | None = None,
    verifying: bool = False,
    base: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Tell what a model or an adapter is, and with `verifying` whether what LoRAM made is whole.

    Args:
        model: A folder, or a hub id: of that, only small files are downloaded unless `verifying`.
        revision: Revision on the hub.
        verifying: Make every check of `verify`.
        base: Folder or hub id of the base model, for the checks.
        progress: Shows the bytes hashed.

    Returns:
        What `loram.json` says; "checks" and "failed" (how many) where they were made. Of a folder
        without one, what `describe_ordinary` finds.

    Raises:
        LoRAMError: No such model, nothing to verify it by, or (without `verifying`) files that do
            not fit one another.
    """
    folder = find_folder(model, revision, ALL_PATTERNS if verifying else SMALL_PATTERNS)
    record = read_record(folder)
    if not record and not verifying:
        return describe_ordinary(folder, model)
    made = verify(folder, base, progress) if verifying else []
    try:
        told = describe(folder, record)
        if not verifying and "model_type" in told and has_weights(folder):
            check_pruned(folder, PruningPlan.load(folder))
    except LoRAMError:
        if not failures(made):
            raise
        told = _told(record)  # what is wrong is among the checks
    return told | ({"checks": as_dicts(made), "failed": len(failures(made))} if made else {})


def describe(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record and the plan beside it say.

    Raises:
        LoRAMError: The plan is damaged.
    """
    told = _told(record)
    if (folder / PLAN_FILE).exists():
        found = PruningPlan.load(folder)
        told |= {**(record.get("parameters") or {}), **summary(found.config, found.counts)}
        told |= refit_summary(record.get("refit") or {})
    return told


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    base, pruning = record["base"], record.get("pruning") or {}
    trained = record.get("trained") or record.get("training") or {}
    told = {
        "kind": record["kind"],
        "base": base["id"],
        "base_revision": base.get("revision"),
        "base_fingerprint": base.get("fingerprint"),
        "plan": record["plan"],
        **{name: pruning.get(name) for name in ("method", "ratio", "sparsity", "allocation")},
        "quantize": pruning.get("quantize"),
        "weight_bytes": record.get("weight_bytes"),
        "calibration": record.get("calibration"),
        "alignments": record.get("alignments"),
        "masked": record.get("masked"),
        "pruned_model": trained.get("pruned_model"),
        "warm_start": trained.get("warm_start"),
        "memory": trained.get("memory"),
        "versions": record.get("versions"),
    }
    return {name: value for name, value in told.items() if value is not None}


def report(found: Mapping[str, Any]) -> str:
    """What `inspect` returns, for people."""
    if found["kind"] in ("model", "adapter"):
        return lines(shown(found))
    named = {name: value for name, value in found.items() if name not in STRUCTURED}
    if found.get("calibration"):
        named["calibration"] = calibration_line(found["calibration"])
    for index, alignment in enumerate(found.get("alignments") or [], start=1):
        named[f"alignment {index}"] = alignment_line(alignment)
    if found.get("versions"):
        named["made with"] = ", ".join(f"{n} {v}" for n, v in found["versions"].items())
    told = lines(named)
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
