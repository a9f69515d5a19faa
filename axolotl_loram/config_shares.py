"""How much to prune, as people write it: ratios of units, sparsities of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from axolotl_loram.errors import LoRAMError

Ratio = float | dict[str, float]
"""Share of the units to remove: of all kinds alike, or kind → share."""


def check_ratio(ratio: Any) -> Ratio:
    """A share in (0, 1), or one for each kind of unit, by name in order.

    Args:
        ratio: Number, mapping, or text such as "0.5" and "experts=0.5,expert_neurons=0.25".

    Raises:
        LoRAMError: A share is none, or outside (0, 1), or a kind is named twice.
    """
    if isinstance(ratio, str) and "=" in ratio:
        pairs = [part.partition("=") for part in ratio.split(",")]
        ratio = {kind.strip(): share for kind, _, share in pairs}
        if len(ratio) < len(pairs):
            raise LoRAMError(
                "expected one pruning ratio for each kind of unit, found "
                f"{', '.join(kind for kind, _, _ in pairs)}: name each kind once"
            )
    if isinstance(ratio, Mapping):
        return {str(kind): _share(ratio[kind], f" for {kind}") for kind in sorted(ratio, key=str)}
    return _share(ratio)


def _share(said: Any, of: str = "") -> float:
    try:
        share = float(said)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise LoRAMError(
            f"expected a pruning ratio between 0 and 1 (both excluded), found {said}{of}: 0.85 "
            "removes 85 % of each pruned layer's units; experts=0.5,expert_neurons=0.25 takes "
            "other shares of each kind"
        )
    return share


LAYERS = "layers"
"""Whole decoder layers, from the first on: a kind of unit that goes alone."""


def whole_layers(ratio: Ratio | None, units: Collection[str] | None) -> bool:
    """Whether whole decoder layers are to be removed.

    Raises:
        LoRAMError: And something else, too.
    """
    kinds = list(ratio) if isinstance(ratio, Mapping) else list(units or ())
    if LAYERS in kinds and len(kinds) > 1:
        raise LoRAMError(
            f"expected layers alone as the unit to remove, found {', '.join(kinds)}: the layers "
            "that stay are whole"
        )
    return LAYERS in kinds


def share_of(ratio: Ratio, kind: str) -> float:
    """The share of a kind of unit to remove."""
    return ratio[kind] if isinstance(ratio, Mapping) else ratio


def largest(ratio: Ratio | None) -> float:
    """The largest share of any kind; 0 where nothing is pruned."""
    return max(ratio.values()) if isinstance(ratio, Mapping) else ratio or 0.0


def spelled(ratio: Ratio | None) -> str | None:
    """A ratio as the command line takes it."""
    if isinstance(ratio, Mapping):
        return ",".join(f"{kind}={share}" for kind, share in ratio.items())
    return None if ratio is None else str(ratio)


def check_sparsity(sparsity: Any) -> float | str:
    """A share of zeros in (0, 1), or a pattern "N:M" with 0 < N < M.

    YAML 1.1 reads an unquoted 2:4 as the base-60 number 124, which is taken back here.
    """
    if isinstance(sparsity, int) and not isinstance(sparsity, bool) and sparsity > 60:
        sparsity = "{}:{}".format(*divmod(sparsity, 60))
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", str(sparsity))
    if found and 0 < int(found[1]) < int(found[2]):
        return f"{int(found[1])}:{int(found[2])}"
    try:
        share = float(sparsity)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise LoRAMError(
            "expected a sparsity between 0 and 1 (both excluded) or a pattern such as 2:4, found "
            f"{sparsity!r}: 0.55 sets 55 % of the weights to zero"
        )
    return share
