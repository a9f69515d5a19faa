"""How much a pruning leaves, before it is done: units of each layer, parameters, zeros."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import (
    Config,
    family_of,
    layer_count,
    own_fields,
    sizes_of,
)
from axolotl_loram.architecture.model import (
    changed,
    config_changes,
    has_experts,
    layer_groups,
    layer_weights,
    parameter_count,
    tensors,
)
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.reference import read_indices
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR, Group, Sizes
from axolotl_loram.config import Pruning
from axolotl_loram.config_shares import LAYERS, Ratio, check_ratio, share_of, whole_layers
from axolotl_loram.errors import LoRAMError

LOG = logging.getLogger(__name__)


def protected_layers(layers: int, first: int, last: int) -> set[int]:
    """Layers that stay whole: the `first` and `last` ones, at most a quarter of them at each end.

    The paper's 4 and 2 suit 32 layers and more; of an 8-layer model they would leave two to prune.
    """
    if min(first, last) < 0:
        raise LoRAMError(f"expected 0 or more protected layers, found {first} first, {last} last")
    kept_first, kept_last = min(first, layers // 4), min(last, layers // 4)
    if (kept_first, kept_last) != (first, last):
        _say_fewer(kept_first, kept_last, layers, first, last)
    return set(range(kept_first)) | set(range(layers - kept_last, layers))


@functools.cache  # once: a search for a ratio asks dozens of times
def _say_fewer(*numbers: int) -> None:
    LOG.warning(
        "protecting the first %d and last %d of %d layers, not %d and %d: at most a quarter at "
        "each end",
        *numbers,
    )


def keep_counts(
    config: Config, ratio: Ratio, first: int, last: int, units: Collection[str] | None = None
) -> dict[int, dict[str, int]]:
    """Layer → kind → units kept at a uniform pruning ratio; protected layers are missing.

    Args:
        config: The base's config.
        ratio: Share of the units to remove, of all kinds or of each.
        first: Layers at the start that stay whole.
        last: Layers at the end that stay whole.
        units: Kinds of unit to remove, by default those that the ratio names, or else all but the
            optional ones.

    Raises:
        LoRAMError: The ratio is outside (0, 1), leaves a layer without a unit of some kind, the
            model has no such units, or is pruned already.
    """
    ratio = check_ratio(ratio)
    if own_fields(config):
        raise LoRAMError(
            "expected a model whose layers are all alike, found per_layer_config in its config: "
            "prune the original model, not one that is pruned already"
        )
    if whole_layers(ratio, units):
        return _without_layers(config, share_of(ratio, LAYERS))
    protected = protected_layers(layer_count(config), first, last)
    wanted = _kinds(config, ratio if isinstance(ratio, dict) else units)
    counts: dict[int, dict[str, int]] = {}
    for layer in range(layer_count(config)):
        groups = [group for group in layer_groups(config, layer) if group.kind in wanted]
        if layer not in protected and groups:
            sizes = sizes_of(config, layer)
            counts[layer] = {
                group.kind: _keep_count(group, share_of(ratio, group.kind), sizes)
                for group in groups
            }
    return counts


def _without_layers(config: Config, ratio: float) -> dict[int, dict[str, int]]:
    """No unit of any kind in the first layers, whose place the base's hidden states take."""
    layers = layer_count(config)
    gone = int(layers * Fraction(str(ratio)))
    if not gone:
        raise LoRAMError(
            f"expected a ratio that removes one of the {layers} layers at least, found {ratio}: "
            f"use {1 / layers:.4g} or more"
        )
    counts = {
        layer: {group.kind: 0 for group in layer_groups(config, layer) if not group.inside}
        for layer in range(gone)
    }
    emptied = changed(config, config_changes(config, counts))
    weights = (weight for layer in counts for weight in layer_weights(emptied, layer))
    stays = [weight.module for weight in weights if weight.role in (LINEAR, EXPERTS)]
    if stays:
        raise LoRAMError(
            f"expected layers whose weights are all units' for `units: layers`, found {stays[0]}, "
            f"of which {config['model_type']} has no units: remove units of the layers instead"
        )
    return counts


def _kinds(config: Config, units: Collection[str] | None) -> set[str]:
    groups = family_of(config).groups
    unknown = set(units or ()) - {group.kind for group in groups}
    if unknown:
        raise LoRAMError(
            f"expected units among {', '.join(group.kind for group in groups)} for "
            f"{config['model_type']}, found {min(unknown)}"
        )
    return set(units) if units else {group.kind for group in groups if not group.optional}


def _keep_count(group: Group, ratio: float, sizes: Sizes) -> int:
    count, fewest, total = group.keep_count(ratio, sizes), group.fewest(sizes), sizes[group.kind]
    if count < total and group.kind == "experts" and (groups := sizes.get("router_groups", 1)) > 1:
        raise LoRAMError(
            f"expected all {total} experts of each layer to stay, found {count} left at pruning "
            f"ratio {ratio}: the router picks among {groups} equal groups of them (n_group), which "
            "would be split; use `units:` without experts"
        )
    if count < fewest:
        least = f"a {group.noun}" if fewest == 1 else f"{fewest} {group.kind}"
        found = "none" if count == 0 else str(count)
        most = f"use a ratio of at most {1 - fewest / total:.4g}" if fewest < total else "use"
        raise LoRAMError(
            f"expected every layer to keep {least}, found {found} of {total} left at pruning "
            f"ratio {ratio}: {most}, or `units:` without {group.kind}".replace("use, or", "use")
        )
    return count


def summary(config: Config, counts: Mapping[int, Mapping[str, int]]) -> dict[str, Any]:
    """Parameter counts of base and pruned model, as the paper's tables count them.

    `nominal_qloram_reduction` is four times the parameter reduction: it counts every parameter as
    4 bits, embeddings and quantization constants included, which no real checkpoint reaches.
    """
    base = parameter_count(config)
    pruned = parameter_count(changed(config, config_changes(config, counts)))
    return {
        "model_type": config["model_type"],
        "layers": layer_count(config),
        "pruned_layers": len(counts),
        "kept_per_pruned_layer": {k: n for kept in counts.values() for k, n in kept.items()},
        "base_parameters": base,
        "pruned_parameters": pruned,
        "parameter_reduction": round(base / pruned, 4),
        "nominal_qloram_reduction": round(4 * base / pruned, 4),
    }


Sparsity = float | str
"""A share of zeros, or a pattern "N:M"."""


def pattern_of(sparsity: Sparsity) -> tuple[int, int] | None:
    """(N, M) of "N:M"; None of a share."""
    if isinstance(sparsity, str):
        kept, _, group = sparsity.partition(":")
        return int(kept), int(group)
    return None


def sparse_layers(config: Config, sparsity: Sparsity, first: int, last: int) -> list[int]:
    """Layers to make sparse.

    Raises:
        LoRAMError: A pattern does not divide the inputs of one of their weights, or the model is
            made of more than alike layers of linear weights.
    """
    family = family_of(config)
    if has_experts(config) or family.section or family.auto_class != "AutoModelForCausalLM":
        raise LoRAMError(
            f"expected a dense language model for sparsity, found {family.model_type}: remove "
            "whole units (--pruning-ratio) of such a model"
        )
    layers = sorted(
        set(range(layer_count(config))) - protected_layers(layer_count(config), first, last)
    )
    pattern = pattern_of(sparsity)
    for tensor in tensors(config):
        if pattern and tensor.linear and tensor.shape[1] % pattern[1]:
            raise LoRAMError(
                f"expected the {tensor.shape[1]} inputs of {tensor.name} to be a multiple of "
                f"{pattern[1]}, found pattern {sparsity}: use another pattern, or a share such as "
                "0.5"
            )
    return layers


def removed_of(total: int, sparsity: Sparsity) -> int:
    """How many of `total` weights become zero, exact in decimal."""
    return int(total * Fraction(str(sparsity)))


def sparse_summary(config: Config, nonzero: Mapping[str, int]) -> dict[str, Any]:
    """Counts of a sparse model, given those of its sparse weights; it takes the base's memory."""
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in tensors(config)}
    touched = sum(sizes[name] for name in nonzero)
    left = sum(nonzero.values())
    return {
        "sparse_weights": touched,
        "zeros": touched - left,
        "sparsity": round(1 - left / touched, 6),
        "nonzero_parameters": sum(sizes.values()) - touched + left,
    }


def planned_nonzero(config: Config, layers: list[int], sparsity: Sparsity) -> dict[str, int]:
    """Weight → weights left, before anything is pruned (methods round by row or block)."""
    pattern, counts = pattern_of(sparsity), {}
    for tensor in tensors(config):
        if tensor.layer in layers and tensor.linear:
            size = math.prod(tensor.shape)
            kept = size * pattern[0] // pattern[1] if pattern else size - removed_of(size, sparsity)
            counts[tensor.name] = kept
    return counts


def plan_of_size(config: dict[str, Any], base: Base, settings: Pruning) -> PruningPlan:
    """A plan as large as the one to come, to count with; refuses what cannot be planned.

    Raises:
        LoRAMError: The ratio, the pattern or the index files do not suit the model.
    """
    if settings.indices_path is not None:
        plan = PruningPlan(config, read_indices(Path(settings.indices_path), config), base)
        plan.check_runs_alone(settings.indices_path, "use `units: layers` for that")
        return plan
    if settings.sparsity is not None:
        sparse_layers(config, settings.sparsity, *settings.protected)
        return PruningPlan(config, {}, base)
    assert settings.ratio is not None  # PruningArgs saw to it
    family = family_of(config)
    counts = keep_counts(config, settings.ratio, *settings.protected, settings.units)
    kept = {}
    for layer, count in counts.items():
        sizes = sizes_of(config, layer)
        for group in family.groups:
            if group.kind in count:
                units = np.arange(count[group.kind], dtype=np.int32)
                rows = count.get(group.inside, sizes[group.inside]) if group.inside else None
                stacked = units if rows is None else np.tile(units, (rows, 1))
                kept[family.entry(layer, group)] = stacked
    return PruningPlan(config, kept, base)
