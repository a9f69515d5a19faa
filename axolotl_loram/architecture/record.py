"""`loram.json`: what made an artefact, from which base, under which plan. Read and written here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from axolotl_loram import __version__
from axolotl_loram.architecture.plan import SCHEMA_VERSION, Base
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import new_file, write_json
from axolotl_loram.files.untrusted import check_types, read_json

RECORD_FILE = "loram.json"
LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm")


class Kind(StrEnum):
    """What lies in a folder with `loram.json`."""

    PRUNED_MODEL = "pruned-model"
    TRAINED_ADAPTER = "trained-adapter"
    RECOVERED_ADAPTER = "recovered-adapter"
    RECOVERED_MODEL = "recovered-model"
    ALIGNMENT = "alignment"
    """A checkpoint of an alignment's trainer."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is LoRA, and no model."""
        return self in (Kind.TRAINED_ADAPTER, Kind.RECOVERED_ADAPTER)


RECOVERED = ("base", "plan", "trained", "masked", "files")
KEYS: Mapping[Kind, tuple[str, ...]] = {
    Kind.PRUNED_MODEL: (
        *("base", "pruning", "calibration", "refit", "alignments", "parameters", "weight_bytes"),
        *("plan", "fingerprint", "vocabulary", "versions", "files"),
    ),
    Kind.TRAINED_ADAPTER: ("base", "plan", "masked", "training"),
    Kind.RECOVERED_ADAPTER: RECOVERED,
    Kind.RECOVERED_MODEL: RECOVERED,
    Kind.ALIGNMENT: ("pruned_model", "fingerprint", "plan", "seconds"),
}
"""What each kind of record always holds, in the order of the file."""
OBJECT, TEXT, NUMBER = (dict, type(None)), (str, type(None)), (int, float, type(None))
TYPES: dict[str, type | tuple] = {
    "kind": TEXT,
    **dict.fromkeys(("plan", "vocabulary", "fingerprint", "pruned_model"), TEXT),
    **dict.fromkeys(("pruning", "calibration", "refit", "parameters", "versions"), OBJECT),
    **dict.fromkeys(("training", "trained", "files", "fill", "rounding"), OBJECT),
    "base": dict,
    "alignments": (list, type(None)),
    "weight_bytes": NUMBER,
    "masked": (bool, type(None)),
    "seconds": NUMBER,
}
REFIT_TYPES: dict[str, type | tuple] = {
    "heldout_error_before": (int, float),
    "heldout_error_after": (int, float),
    "accepted": bool,
}


@dataclass(frozen=True)
class Record:
    """One `loram.json`; falsy, and without a kind, where a folder has none.

    Attributes:
        refit: Projection → its held-out errors before and after, and whether it was accepted.
        rounding: The same of each weight that was rounded to 4 bits on text, where some were.
        alignments: What each alignment did, in order.
        parameters: Counts of the base's and of the pruned model's.
        weight_bytes: Size of a pruned model's tensors.
        fingerprint: A pruned model's `weights_fingerprint`.
        vocabulary: Its `vocabulary_digest`.
        masked: Whether the update is confined to the weights that sparse pruning left.
        training: How an adapter was trained: on which model, steps, losses, memory.
        trained: The same, of a recovered one.
        files: File → SHA-256.
        fill: What a recovered adapter holds for what was pruned, where that is not zeros.
        pruned_model: Of an alignment's checkpoint, the model that is aligned.
        seconds: How long that took so far.
    """

    kind: Kind | None = None
    base: Base | None = None
    plan: str | None = None
    pruning: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    refit: Mapping[str, Any] | None = None
    rounding: Mapping[str, Any] | None = None
    alignments: list[Any] | None = None
    parameters: Mapping[str, Any] | None = None
    weight_bytes: int | None = None
    fingerprint: str | None = None
    vocabulary: str | None = None
    versions: Mapping[str, str] | None = None
    masked: bool | None = None
    training: Mapping[str, Any] | None = None
    trained: Mapping[str, Any] | None = None
    files: Mapping[str, str] | None = None
    fill: Mapping[str, Any] | None = None
    pruned_model: str | None = None
    seconds: float | None = None

    def __bool__(self) -> bool:
        """Whether there is a record at all."""
        return self != Record()

    @property
    def run(self) -> Mapping[str, Any]:
        """How an adapter was trained, recovered or not; empty where that is not recorded."""
        return self.trained or self.training or {}

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read and check `loram.json` in a folder; empty where there is none.

        Raises:
            LoRAMError: It is damaged, or was written by a newer version.
        """
        file = folder / RECORD_FILE
        if not file.exists():
            return cls()
        found = read_json(file)
        written = found.get("schema_version", SCHEMA_VERSION)
        if written != SCHEMA_VERSION:
            raise LoRAMError(
                f"expected schema version {SCHEMA_VERSION} in {file}, found {written}: upgrade "
                "axolotl-loram"
            )
        _check(found, file)
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        if "base" in known:
            known["base"] = Base.from_json(known["base"], file)
        if known.get("kind") is not None:
            known["kind"] = Kind(known["kind"])
        return cls(**known)

    def require(self, folder: Path) -> tuple[Kind, Base]:
        """Refuse a record that names no kind, plan or base; returns kind and base."""
        if not self:
            raise LoRAMError(f"expected a folder with {RECORD_FILE}, found none in {folder}")
        if self.kind is None or self.base is None or self.plan is None:
            raise LoRAMError(
                f"expected {folder / RECORD_FILE} to name a kind, a plan and a base, found it "
                "without: it is damaged, so download it again"
            )
        return self.kind, self.base

    def refuse_unrecovered(self, folder: Path) -> None:
        """Refuse an adapter that is still one for the pruned model."""
        if self.kind == Kind.TRAINED_ADAPTER:
            raise LoRAMError(
                f"expected an adapter for the original model, found {folder} trained on the pruned "
                f"one: run `axolotl-loram recover {folder}` first"
            )

    def as_json(self) -> dict[str, Any]:
        """What the file holds: what its kind always has, and what else there is."""
        always = KEYS[self.kind] if self.kind else ()
        rest = [field.name for field in fields(self) if field.name not in ("kind", *always)]
        names = (*always, *(name for name in rest if getattr(self, name) is not None))
        found = {name: getattr(self, name) for name in names}
        if self.base is not None:
            found["base"] = dict(vars(self.base))
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **found}

    def save(self, folder: Path, in_use: bool = False) -> None:
        """Write `loram.json`; `in_use`, so that others find the old record or the new one."""
        if not in_use:
            write_json(folder / RECORD_FILE, self.as_json())
            return
        with new_file(folder / RECORD_FILE) as file:
            write_json(file, self.as_json())


def _check(found: Mapping[str, Any], file: Path) -> None:
    """Refuse what has a known key of another type."""
    check_types(found, TYPES, file)
    if found.get("kind") not in (None, *Kind):
        raise LoRAMError(
            f"expected {file} to name a kind out of {', '.join(Kind)}, found {found['kind'][:80]}: "
            "it is damaged, or not ours"
        )
    for name, digest in (found.get("files") or {}).items():
        check_types({name: digest}, {name: str}, f"the files of {file}")
    for what in ("refit", "rounding"):
        for module, about in (found.get(what) or {}).items():
            where = f"the {what} of {module[:80]} in {file}"
            check_types({what: about}, {what: dict}, where)
            check_types(dict.fromkeys(REFIT_TYPES) | about, REFIT_TYPES, where)


def refit_summary(refit: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the refit gained: means over the projections of the relative held-out errors."""
    if not refit:
        return {}
    means = {
        f"heldout_error_{when}": round(
            sum(found[f"heldout_error_{when}"] for found in refit.values()) / len(refit), 6
        )
        for when in ("before", "after")
    }
    accepted = sum(found["accepted"] for found in refit.values())
    return {"refits_accepted": accepted, "refits_tried": len(refit), **means}


def rounding_summary(rounding: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same of the rounding to 4 bits, by other names."""
    found = refit_summary(rounding)
    return {
        name.replace("refits", "roundings").replace("heldout", "rounding"): value
        for name, value in found.items()
    }


def losses_of(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of a trainer's log makes curves: losses, perplexities and learning rates, by step."""
    kept = [
        {
            name: value
            for name, value in entry.items()
            if (
                name in LOGGED
                or (name.startswith("eval_") and name.endswith(("loss", "perplexity")))
            )
            and isinstance(value, int | float)
            and math.isfinite(value)
        }
        for entry in log_history
    ]
    return [entry for entry in kept if any(name.endswith("loss") for name in entry)]


_version = cache(version)  # reading a package's metadata takes milliseconds


def versions() -> dict[str, str]:
    """Versions of what made an artefact, as far as installed."""
    found = {"axolotl_loram": __version__}
    for package in ("axolotl", "transformers", "peft", "torch", "bitsandbytes", "numpy"):
        try:
            found[package] = _version(package)
        except PackageNotFoundError:
            continue
    return found
