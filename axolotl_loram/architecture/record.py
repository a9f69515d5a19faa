"""What `loram.json` says beside the plan: what made an artefact, and what a refit gained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from axolotl_loram import __version__

LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm")


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


def versions() -> dict[str, str]:
    """Versions of what made an artefact, as far as installed."""
    found = {"axolotl_loram": __version__}
    for package in ("axolotl", "transformers", "peft", "torch", "bitsandbytes", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
