"""What `axolotl-loram plan` answers: parameter counts, and the memory of the four methods."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

from axolotl_loram.architecture.config_json import Config, family_of, removed_layers
from axolotl_loram.architecture.counts import (
    plan_of_size,
    planned_nonzero,
    sparse_layers,
    sparse_summary,
    summary,
)
from axolotl_loram.architecture.model import embedding_module
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.ties import config_of
from axolotl_loram.files.find import find_folder
from axolotl_loram.memory.data import anchor_costs
from axolotl_loram.memory.gpus import that_hold
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import METHODS, compare, predict, pruned_config, smallest_ratio
from axolotl_loram.memory.request import Request
from axolotl_loram.memory.tables import anchor_line, memory_table
from axolotl_loram.tables import lines

LOG = logging.getLogger(__name__)


def plan(asked: Request) -> dict[str, Any]:
    """Parameter counts, the memory of each method, and which GPUs hold it.

    Raises:
        LoRAMError: No ratio fits, or the model is not to be had.
    """
    fitted: dict[str, Any] = {}
    if asked.budget is not None:
        asked, fitted = _fit(asked, asked.budget)
    base, pruned, counted = sizes(asked)
    if embedding_module(base) is None:
        LOG.warning("memory is planned for language models only: %s is counted", base["model_type"])
        return counted
    missing = not_counted(asked, base)
    for what in missing:
        LOG.warning("not counted: %s: the plan is for one GPU without it", what)
    pruned_too = asked.pruning or asked.pruned or fitted
    if not pruned_too:
        LOG.info("nothing is pruned: give --pruning-ratio to see loram and qloram too")
    methods = compare(base, pruned, asked.run, METHODS if pruned_too else METHODS[:2])
    anchor = {"anchor": anchoring(asked, base, pruned)} if asked.anchor == "here" else {}
    return {
        **counted,
        **({"fit": fitted} if fitted else {}),
        **anchor,
        "training": asked.run.model_dump(),
        "not_counted": missing,
        "methods": {name: asdict(method) for name, method in methods.items()},
        "gpus": {name: that_hold(method.peak_bytes) for name, method in methods.items()},
    }


def anchoring(asked: Request, base: Config, pruned: Config) -> dict[str, Any]:
    """`anchor_costs` of a pruned model's run."""
    upper = Layout.of(pruned) if removed_layers(pruned) else None
    return anchor_costs(Layout.of(base), asked.run, asked.data, upper)


def not_counted(asked: Request, base: Config) -> list[str]:
    """What of a run is not predicted: settings, and modules that are not declared."""
    found = list(asked.not_counted)
    loss = asked.run.cross_entropy
    if asked.anchor and loss != "plain" and not removed_layers(sizes(asked)[1]):
        found.append(f"anchor (the logits that {loss} would not make)")  # the loss is another then
    towers = (f"{prefix}* (weights and LoRA: not declared)" for prefix in family_of(base).whole)
    return [*found, *towers]


def report(result: dict[str, Any]) -> str:
    """What `plan` returns, for people."""
    structured = ("fit", "anchor", "training", "not_counted", "methods", "gpus")
    shown = {name: value for name, value in result.items() if name not in structured}
    if "methods" not in result:
        return lines(shown)
    if "fit" in result:
        shown |= {f"fit {name}": value for name, value in result["fit"].items()}
    training = ", ".join(f"{name} {value}" for name, value in result["training"].items() if value)
    missing = "".join(f"\nnot counted: {what}" for what in result["not_counted"])
    missing += f"\n{anchor_line(result['anchor'])}" if "anchor" in result else ""
    return f"{lines(shown)}\n\n{training}{missing}\n\n{memory_table(result['methods'])}"


def _fit(asked: Request, budget: int) -> tuple[Request, dict[str, Any]]:
    """The request at the smallest ratio that fits, and what to say of it."""
    assert asked.pruning is not None  # `request` saw to it
    config = config_of(asked.model, asked.revision)
    protected, units = asked.pruning.protected, asked.pruning.kinds
    ratio = smallest_ratio(config, asked.run, protected, budget, asked.adapter, units)
    fitted = pruned_config(config, ratio, protected, units) if ratio else config
    peak = predict(Layout.of(fitted), asked.run, asked.adapter).peak_bytes
    pruning = asked.pruning.model_copy(update={"ratio": ratio, "units": units}) if ratio else None
    return replace(asked, pruning=pruning), {
        "budget_bytes": budget,
        "adapter": asked.adapter,
        "pruning_ratio": ratio,
        "peak_bytes": peak,
        "gpus": that_hold(peak),
    }


def sizes(asked: Request) -> tuple[Config, Config, dict[str, Any]]:
    """Configs of base and pruned model, and what `plan.summary` counts."""
    if asked.pruned:
        found = PruningPlan.load(find_folder(*asked.pruned, patterns=["config.json", "loram*"]))
        return (found.config, found.pruned_config, summary(found.config, found.counts))
    base, settings = config_of(asked.model, asked.revision), asked.pruning
    if settings is None:
        return base, base, summary(base, {})
    sketch = plan_of_size(base, Base(asked.model, asked.revision), settings)
    counted = summary(base, sketch.counts)
    if settings.sparsity is not None:
        layers = sparse_layers(base, settings.sparsity, *settings.protected)
        counted |= sparse_summary(base, planned_nonzero(base, layers, settings.sparsity))
    return base, sketch.pruned_config, counted
