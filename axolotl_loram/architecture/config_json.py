"""What a model's config.json says: its family, the fields of each layer, sizes; without torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from axolotl_loram.architecture.blocks import ALIASES, positive
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.spaces import Family, Sizes
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import stored_config

Config = Mapping[str, Any]
MOST_LAYERS, MOST_EXPERTS, MOST_FEATURES = 1_000, 1_024, 2**31
"""Bounds beyond any model, so that what a config claims takes bounded time."""
TIED = "tie_word_embeddings"
PER_LAYER = "per_layer_config"
"""Where transformers keeps what differs between layers; `own_fields` reads it."""


def family_of(config: Config) -> Family:
    """The row that declares `config`'s model family.

    Raises:
        LoRAMError: No row has this `model_type`, or its structure is not the declared one.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise LoRAMError(
            f"unknown architecture: expected model_type to be one of {', '.join(FAMILIES)}, found "
            f"{model_type!r}: `axolotl-loram inspect MODEL --propose` drafts its row, and "
            'CONTRIBUTING.md ("Add a model family") says where to put it'
        )
    family = FAMILIES[model_type]
    fields = {**config, **section_of(config, family)}
    refused = {**family.refused, "num_kv_shared_layers": "layers that share keys and values"}
    for name, reason in refused.items():
        if fields.get(name):
            raise LoRAMError(
                f"expected a {model_type} model without {name}, found {fields[name]!r} in its "
                f"config: {reason}"
            )
    return family


def section_of(config: Config, family: Family) -> Config:
    """The part of a config that describes the decoder layers (all of it in text models).

    Early configs of vision-language models have the fields of the language tower at the top.
    """
    own = config.get(family.section) if family.section else None
    return own if isinstance(own, dict) else config


def with_defaults(config: Config) -> dict[str, Any]:
    """A config as config.json holds it, with the size fields that it leaves out."""
    family = family_of(config)
    own = section_of(config, family)
    known = _canonical(own)
    section = {name: v for name, v in family.defaults.items() if name not in known} | dict(own)
    whole = {**config, family.section: section} if family.section else section
    whole[TIED] = is_tied(config)
    check_config(whole)
    return whole


def is_tied(config: Config) -> bool:
    """Whether the output embedding is the input embedding.

    What is said of the language tower alone counts only where `tied_by_section`.
    """
    family = family_of(config)
    tied = config.get(TIED, family.defaults.get(TIED))
    return bool(tied or (family.tied_by_section and section_of(config, family).get(TIED)))


def check_config(config: Config) -> None:
    """Refuse a config whose sizes cannot be worked out, in bounded time whatever it says.

    Raises:
        LoRAMError: A field is missing, of another type, or beyond any model.
    """
    family = family_of(config)
    own_fields(config)
    try:
        for layer in places(config):
            found = sizes_of(config, layer)
            if max(found.values()) > MOST_FEATURES or found.get("experts", 0) > MOST_EXPERTS:
                raise LoRAMError(
                    f"expected sizes of at most {MOST_FEATURES} and {MOST_EXPERTS} experts, found "
                    f"{dict(found)} in layer {layer}: check the model's config.json"
                )
    except LoRAMError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise LoRAMError(
            f"expected config fields of a {family.model_type} model, found one of another type "
            f"({error}): check the model's config.json"
        ) from None


def _canonical(fields: Config) -> dict[str, Any]:
    return {ALIASES.get(name, name): value for name, value in fields.items()}


def layer_fields(config: Config, layer: int | None) -> dict[str, Any]:
    """The config as layer `layer` sees it: global fields, then its `per_layer_config`."""
    section = section_of(config, family_of(config))
    own = {} if layer is None else _own_fields(config, layer)
    return {**config, **_canonical(section), **_canonical(own), TIED: is_tied(config)}


def _own_fields(config: Config, layer: int) -> Config:
    given = section_of(config, family_of(config)).get(PER_LAYER) or {}
    found: Any = next((given[key] for key in _keys_of(layer) if key in given), {}) if given else {}
    return found


def own_fields(config: Config) -> dict[int, Config]:
    """Layer → the fields of its own that `per_layer_config` gives it, however it is numbered.

    Raises:
        LoRAMError: Something is no number of a layer, or two are of one, or their fields are none.
    """
    given = section_of(config, family_of(config)).get(PER_LAYER) or {}
    layers = {key: layer for layer in range(layer_count(config)) for key in _keys_of(layer)}
    pairs: Any = given.items() if isinstance(given, dict) else [(None, given)]
    found: dict[int, Config] = {
        layers[key]: own for key, own in pairs if key in layers and isinstance(own, dict)
    }
    if len(found) != len(pairs):
        raise LoRAMError(
            f"expected {PER_LAYER} to give fields of layers 0…{layer_count(config) - 1}, each "
            f"once, found {str(given)[:80]}: check the model's config.json"
        )
    return found


@functools.cache
def _keys_of(layer: int) -> tuple[int | str, ...]:
    """What stands for a layer in `per_layer_config`: 4, "4", or "04" as transformers saves it.

    It pads the numbers (5.16) to as many digits as the last layer with fields of its own has.
    """
    most = len(str(MOST_LAYERS - 1))
    return (layer, *dict.fromkeys(str(layer).zfill(digits) for digits in range(1, most + 1)))


def sizes_of(config: Config, layer: int | None = None) -> Sizes:
    """Sizes that the spaces of a layer (or of what lies outside the layers) are made of.

    Raises:
        LoRAMError: A field is missing or does not suit the others.
    """
    family = family_of(config)
    if not is_removed(config, layer):
        return family.sizes(layer_fields(config, layer), layer)
    whole = family.sizes(layer_fields(config, None), layer)
    return {**whole, **{group.kind: 0 for group in family.groups}}


def is_removed(config: Config, layer: int | None) -> bool:
    """Whether a layer has no unit of any kind left: it hands its input on."""
    own = {} if layer is None else _canonical(_own_fields(config, layer))
    if not own or any(type(count) is not int or count for count in own.values()):
        return False
    family = family_of(config)
    whole = family.sizes(layer_fields(config, None), layer)
    kinds = [group for group in family.groups if not group.inside and whole.get(group.kind, 0) > 0]
    return own.keys() == {ALIASES.get(field, field) for group in kinds for field in group.fields}


def removed_layers(config: Config) -> list[int]:
    """The layers of a pruned model's config that hand their input on."""
    return [layer for layer in range(layer_count(config)) if is_removed(config, layer)]


def layer_count(config: Config) -> int:
    """Number of decoder layers."""
    count = positive(layer_fields(config, None), "num_hidden_layers")
    if count > MOST_LAYERS:
        raise LoRAMError(
            f"expected at most {MOST_LAYERS} layers, found {count}: check the model's config.json"
        )
    return count


def load_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config, with the sizes that it leaves out, from a folder, file or hub id.

    It is read as it is, without transformers, whose config classes take seconds to import; no code
    from the checkpoint is run.

    Raises:
        LoRAMError: No such model, or an unknown architecture.
    """
    return with_defaults(stored_config(model, revision))


def places(config: Config) -> Iterator[int | None]:
    """Where weights are: outside the layers (None), then in each layer."""
    yield None
    yield from range(layer_count(config))
