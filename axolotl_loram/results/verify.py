"""Whether a folder is what its record says: a list of checks, each with an outcome and a sentence.

One failure hides no other: all checks are made, and all that failed are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.pairing import read_record
from axolotl_loram.architecture.plan import RECORD_FILE
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.results import adapters, checks
from axolotl_loram.results.checks import Finding, Outcome, Subject

CheckFunction = Callable[[Subject], Iterator[Finding]]
MODEL = (checks.files, checks.strays, checks.weights)
PRUNED = (checks.plan, checks.config, checks.counts, checks.masks, checks.base, checks.tokenizer)
ADAPTER = (
    checks.strays,
    adapters.tensors,
    adapters.trained_under,
    adapters.shapes,
    adapters.modules,
    adapters.tokenizer,
)
CHECKS: Mapping[str, tuple[CheckFunction, ...]] = {
    "pruned-model": (*MODEL, *PRUNED),
    "recovered-model": MODEL,
    "trained-adapter": ADAPTER,
    "recovered-adapter": (checks.files, adapters.settings, *ADAPTER, checks.base),
}
"""Kind of folder → what can be checked of it."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        outcome: "ok", "failed", or "not checked" where there is no telling.
        detail: One sentence.
    """

    name: str
    outcome: Outcome
    detail: str


def verify(folder: Path, base: str | None = None, progress: Progress = no_progress) -> list[Check]:
    """Check all that can be checked of a pruned model or an adapter.

    Args:
        folder: With `loram.json`.
        base: Folder or hub id of the base model; by default what the record names, where that is
            on this machine.
        progress: Shows the bytes hashed, of all that are to be.

    Returns:
        The checks. Nothing is downloaded but the config of a `base` that is given.

    Raises:
        LoRAMError: There is no record that could be held against the files.
    """
    record = read_record(folder)
    _check_record(record, folder)
    subject = Subject(folder, record, base, progress)
    return [found for check in CHECKS[record["kind"]] for found in _outcomes(check, subject)]


def failures(made: Iterable[Check]) -> list[Check]:
    """The checks that failed."""
    return [check for check in made if check.outcome == "failed"]


def require_whole(made: Iterable[Check], what: object) -> None:
    """Refuse what failed a check.

    Raises:
        LoRAMError: It names every failure.
    """
    failed = failures(made)
    if failed:
        listed = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise LoRAMError(
            f"expected every check of {what} to pass, found {len(failed)} failed: {listed}"
        )


def as_dicts(made: Iterable[Check]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(check) for check in made]


def _outcomes(check: CheckFunction, subject: Subject) -> Iterator[Check]:
    name = check.__name__.replace("_", " ")
    try:
        for outcome, detail in check(subject):
            yield Check(name, outcome, detail)
    except LoRAMError as error:
        yield Check(name, "failed", str(error))
    except OSError as error:
        yield Check(name, "failed", f"a file cannot be read: {error}")


def _check_record(record: Mapping[str, Any], folder: Path) -> None:
    if not record:
        raise LoRAMError(f"expected a folder with {RECORD_FILE}, found none in {folder}")
    base, files = record.get("base"), record.get("files") or {}
    whole = (
        record.get("kind") in CHECKS
        and isinstance(record.get("plan"), str)
        and isinstance(base, dict)
        and isinstance(base.get("id"), str)
        and isinstance(files, dict)
        and all(isinstance(digest, str) for digest in files.values())
        and isinstance(record.get("parameters") or {}, dict)
    )
    if not whole:
        raise LoRAMError(
            f"expected {folder / RECORD_FILE} to name a kind ({', '.join(CHECKS)}), a plan, a base "
            "and the digests of files, found it without: it is damaged, so download it again"
        )
