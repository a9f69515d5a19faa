"""What `inspect` tells of a model or an adapter that LoRAM has not made yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from axolotl_loram.architecture.pairing import check_tensors
from axolotl_loram.architecture.plan import RECORD_FILE
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint, has_weights
from axolotl_loram.files.untrusted import read_json

RATIOS = (0.5, 0.75, 0.85)
"""Pruning ratios that people are shown first."""


def describe_ordinary(folder: Path, model: str) -> dict[str, Any]:
    """What a folder without `loram.json` holds, and what can be done with it.

    Args:
        folder: With config.json or adapter_config.json, the weights or without them.
        model: What the user calls it.

    Raises:
        LoRAMError: It holds neither, or a model of an unknown architecture, or weights that do not
            belong to its config.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(read_json(folder / ADAPTER_CONFIG))
    if not (folder / "config.json").is_file():
        raise LoRAMError(
            f"expected a folder with config.json, {ADAPTER_CONFIG} or {RECORD_FILE}, found none of "
            f"them in {model}: give a model or an adapter"
        )
    config = load_config(str(folder))
    fields = layer_fields(config, None)
    told = {
        "kind": "model",
        "model_type": config["model_type"],
        "layers": layer_count(config),
        "hidden_size": sizes_of(config)["hidden"],
        "vocabulary": fields.get("vocab_size"),
        "tied_embeddings": bool(fields.get("tie_word_embeddings")),
        "parameters": parameter_count(config),
        **_weights(folder, config),
        **_pruning(config, model),
    }
    return {name: value for name, value in told.items() if value is not None}


def _weights(folder: Path, config: Config) -> dict[str, Any]:
    if not has_weights(folder):
        return {}
    stored = Checkpoint(folder).tensors
    if not config.get("quantization_config"):
        check_tensors(config, {name: t.shape for name, t in stored.items()}, str(folder))
    return {
        "weight_bytes": sum(tensor.nbytes for tensor in stored.values()),
        "stored_as": ", ".join(sorted({tensor.dtype for tensor in stored.values()})),
    }


def _pruning(config: Config, model: str) -> dict[str, Any]:
    """Units of the layers that pruning touches, sizes at a few ratios, and the next command."""
    layers, settings = layer_count(config), PruningArgs(ratio=RATIOS[0]).resolve()
    if config.get("quantization_config"):
        return {"cannot_be_pruned": "its weights are quantized: save it in 16 bits first"}
    try:
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


def _adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
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


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
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
