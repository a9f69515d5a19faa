"""What the functions of `api` return: frozen, with the command's JSON, and its text for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_loram.tables import evaluation_table, lines

if TYPE_CHECKING:
    from axolotl_loram.architecture.plan import PruningPlan
    from axolotl_loram.recovery.servable import Verdict
    from axolotl_loram.results.inspect import Check

Json = Mapping[str, Any]


class Result:
    """What a function found or made."""

    def as_dict(self) -> dict[str, Any]:
        """What the command prints with `--json`."""
        raise NotImplementedError

    def __str__(self) -> str:
        """What the command prints without."""
        return lines(self.as_dict())

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True)
class Found(Result):
    """A result that is the command's JSON, and nothing else.

    Attributes:
        found: That JSON.
    """

    found: Json = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """A copy of it, of types that JSON has."""
        return json.loads(json.dumps(self.found))


@dataclass(frozen=True)
class MemoryPlan(Found):
    """What pruning would leave, and the memory that training would take; all sizes in bytes."""

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """lora, qlora, loram and qloram → parts and "peak_bytes"; empty for an alignment."""
        return self.as_dict().get("methods", {})

    @property
    def ways(self) -> list[dict[str, Any]]:
        """Of a comparison, what each way takes, with a bound on its speed; else empty."""
        return self.as_dict().get("ways", [])

    @property
    def gpus(self) -> dict[str, list[str]]:
        """Method → the GPUs that hold it; empty for an alignment."""
        return self.as_dict().get("gpus", {})

    def __str__(self) -> str:
        """Counts, and the table of memory in GiB."""
        from axolotl_loram.memory import cluster, planner
        from axolotl_loram.memory.tables import ways_table

        if "ways" in self.found:
            return ways_table(self.as_dict())
        return (cluster.align_report if "gpu" in self.found else planner.report)(self.as_dict())


@dataclass(frozen=True)
class Pruned(Result):
    """A pruned model that was written.

    Attributes:
        path: Its folder.
        record: What its `loram.json` says.
    """

    path: Path
    record: Json = field(repr=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter counts of base and pruned model, and what follows from them."""
        return dict(self.record["parameters"])

    @property
    def plan(self) -> PruningPlan:
        """Which units were kept."""
        from axolotl_loram.architecture.plan import PruningPlan

        return PruningPlan.load(self.path)

    def as_dict(self) -> dict[str, Any]:
        """Folder, counts, what refit and rounding gained, size and digest of the plan."""
        from axolotl_loram.architecture.record import refit_summary, rounding_summary

        shown = {"output": str(self.path), **self.parameters}
        shown |= refit_summary(self.record["refit"] or {})
        shown |= rounding_summary(self.record.get("rounding") or {})
        return shown | {name: self.record[name] for name in ("weight_bytes", "plan")}


@dataclass(frozen=True)
class Adapter(Result):
    """An adapter for the original model; after `masked=True`, that model itself with its update.

    Attributes:
        path: Its folder.
        base: Folder or hub id of the model it belongs to.
        record: What its `loram.json` says.
    """

    path: Path
    base: str
    record: Json = field(repr=False)

    @property
    def base_revision(self) -> str | None:
        """Revision of the base on the hub."""
        return self.record["base"].get("revision")

    def as_dict(self) -> dict[str, Any]:
        """Folder, base and digest of the plan."""
        return {"output": str(self.path), "base": self.base, "plan": self.record["plan"]}


@dataclass(frozen=True)
class Inspection(Found):
    """What a model or an adapter is.

    Attributes:
        model: What was asked about.
    """

    model: str

    @property
    def kind(self) -> str:
        """Such as "pruned-model" or "recovered-adapter"; "model" or "adapter" of any other."""
        return self.found["kind"]

    @property
    def checks(self) -> tuple[Check, ...]:
        """The checks that `verify=True` made: name, outcome and a sentence."""
        from axolotl_loram.results.inspect import Check

        return tuple(Check(**check) for check in self.found.get("checks", ()))

    @property
    def servable(self) -> tuple[Verdict, ...]:
        """What each server makes of the adapter, where `servable=True` asked for it."""
        from axolotl_loram.recovery.servable import Verdict

        found = self.found.get("servable", ())
        return tuple(Verdict(**one | {"because": tuple(one["because"])}) for one in found)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Those that failed."""
        return tuple(check for check in self.checks if check.outcome == "failed")

    def require_whole(self) -> None:
        """Refuse what failed a check.

        Raises:
            LoRAMError: It names every failure.
        """
        from axolotl_loram.results.inspect import require_whole

        require_whole(self.checks, self.model)

    def __str__(self) -> str:
        """What it is, line by line, and the checks."""
        from axolotl_loram.results.inspect import report

        return report(self.as_dict())


@dataclass(frozen=True)
class Evaluation(Found):
    """Perplexities and task scores.

    Attributes:
        path: The JSON file that holds them.
    """

    path: Path

    @property
    def perplexity(self) -> dict[str, dict[str, float | None]]:
        """Set of text → model → perplexity."""
        return {
            name: {model: found["perplexity"] for model, found in held["models"].items()}
            for name, held in self.found["perplexity"].items()
        }

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Task → model → score."""
        return {
            name: {model: found.get("value") for model, found in task["models"].items()}
            for name, task in self.found["tasks"].items()
        }

    def __str__(self) -> str:
        """Models as rows, sets and tasks as columns, with standard errors."""
        return evaluation_table(self.found)


@dataclass(frozen=True)
class Published(Found):
    """What was uploaded, or of `dry_run=True` what would be."""

    @property
    def url(self) -> str | None:
        """Where it is; None of a dry run."""
        return self.found.get("url")

    @property
    def notices(self) -> list[str]:
        """What the publisher should know."""
        return list(self.found["notices"])

    def __str__(self) -> str:
        """What was published, and its files with their sizes."""
        from axolotl_loram.results.publish import report

        return report(self.found)


@dataclass(frozen=True)
class Exported(Found):
    """An adapter in another program's format."""

    @property
    def path(self) -> Path:
        """Its file."""
        return Path(self.found["file"])
