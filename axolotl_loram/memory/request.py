"""What `axolotl-loram plan` is asked: by options, or by an Axolotl YAML that options override."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.config import Pruning, PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import untrusted
from axolotl_loram.memory.settings import TrainingArgs, settings_of

NOT_COUNTED = (
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "activation_offloading",
    "layer_offloading",
    "tiled_mlp",
    "rl",
    "context_parallel_size",
)
"""Keys of an Axolotl config that change the memory in ways that are not predicted."""
NOTHING = type(None)
TYPES: dict[str, type | tuple] = {
    "base_model": (str, NOTHING),
    "revision_of_model": (str, NOTHING),
    "loram": (dict, NOTHING),
    "plugins": (list, NOTHING),
    "lora_modules_to_save": (list, NOTHING),
    "lora_target_modules": (list, str, NOTHING),
}
SECTION_TYPES: dict[str, type | tuple] = {
    "pruning": (dict, NOTHING),
    "pruned_model_path": (str, NOTHING),
    "pruned_model_revision": (str, NOTHING),
}
"""Of settings that are read before Axolotl, or a schema, has looked at them."""
UNITS = {"": 1} | {
    unit: base**power
    for base, end in ((1000, ""), (1024, "I"))
    for power, letter in enumerate("KMGT", start=1)
    for unit in (letter + end,)
}


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        model: The base: a folder, a config.json or a hub id.
        revision: Its revision on the hub.
        pruning: How it is pruned; None where `pruned` says so.
        pruned: Folder or hub id of a model that is pruned already, and its revision.
        run: Settings of the training run.
        adapter: "loram" or "qloram": what has to fit the budget.
        budget: Bytes; the ratio in `pruning` then only stands for the smallest that fits.
        not_counted: What of the config is not predicted.
    """

    model: str
    revision: str | None
    pruning: Pruning | None
    pruned: tuple[str, str | None] | None
    run: TrainingArgs
    adapter: str
    budget: int | None = None
    not_counted: tuple[str, ...] = ()


def request(
    model: str,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    fit: str | None = None,
) -> Request:
    """From a model, or from an Axolotl YAML, whose settings options override.

    Args:
        model: A folder, a config.json, a hub id, or an Axolotl YAML.
        revision: Revision on the hub.
        options: Fields of `PruningArgs` and `TrainingArgs`; None stands for not given.
        adapter: "loram", "qloram", or None for what the YAML says (qloram where there is none).
        fit: A size; the pruning ratio is to be the smallest at which the run fits it.

    Raises:
        LoRAMError: The YAML cannot be read, nothing says how to prune, or a setting is not allowed.
    """
    given, training = options_of(options or {})
    cfg = read_yaml(Path(model)) if model.endswith((".yml", ".yaml")) else {}
    section = cfg.get("loram") or {}
    if fit is not None and "ratio" in given:
        raise LoRAMError(
            f"expected a pruning ratio or a size to fit, found both ({given['ratio']} and {fit}): "
            "the ratio is what --fit finds"
        )
    pruning = {**({"ratio": 0.5} if fit else {}), **(section.get("pruning") or {}), **given}
    pruned = None if pruning else section.get("pruned_model_path")
    how = None if pruned else PruningArgs.parse(**pruning).resolve(own_text=bool(cfg))
    in_4_bits = {
        "prequantized": bool(how and how.quantize),
        "block_size": how.quantize_block_size if how else 64,
    }
    four_bit = "q" in str(cfg.get("adapter") or "q") or bool(cfg.get("load_in_4bit"))
    return Request(
        str(cfg.get("base_model") or model),
        revision or cfg.get("revision_of_model"),
        how,
        (str(pruned), section.get("pruned_model_revision")) if pruned else None,
        TrainingArgs.parse(**(settings_of(cfg) if cfg else {}) | training | in_4_bits),
        adapter or ("qloram" if four_bit else "loram"),
        None if fit is None else parse_size(fit),
        tuple(key for key in NOT_COUNTED if cfg.get(key)),
    )


def options_of(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options, as fields of `PruningArgs` and of `TrainingArgs`; None stands for not given."""
    given = {name: value for name, value in options.items() if value is not None}
    training = {name: given.pop(name) for name in list(given) if name in TrainingArgs.model_fields}
    return given, training


def read_yaml(file: Path) -> dict[str, Any]:
    """An Axolotl config.

    Raises:
        LoRAMError: There is no such file, it does not parse, or it names no base_model.
    """
    cfg = untrusted.read_yaml(file)
    check_settings(cfg, file)
    if not cfg.get("base_model"):
        raise LoRAMError(
            f"expected {file} to name a base_model, found none: give an Axolotl config, or a model"
        )
    return cfg


def check_settings(cfg: Mapping[str, Any], file: Path) -> None:
    """Refuse an Axolotl config in which a setting that is read here is of another type.

    Raises:
        LoRAMError: The first that is.
    """
    untrusted.check_types(cfg, TYPES, file)
    for name in ("loram", "pruning"):
        cfg = cfg.get(name) or {}
        untrusted.check_types(cfg, SECTION_TYPES, file)
        if not all(isinstance(key, str) for key in cfg):
            raise LoRAMError(f"expected names of settings in `{name}:` of {file}, found a number")


def parse_size(text: str) -> int:
    """Bytes of a size such as 20GiB, 24 GB or 8.5g (GB is 10⁹ bytes, GiB 2³⁰).

    Raises:
        LoRAMError: It is not such a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]I?)B?", text.strip().upper())
    if not found or float(found[1]) <= 0:
        raise LoRAMError(f"expected a size such as 20GiB or 24GB, found {text!r}: give a unit")
    return int(float(found[1]) * UNITS[found[2]])
