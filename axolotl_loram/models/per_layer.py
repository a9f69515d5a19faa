"""Building and loading models whose layers differ in width (transformers' `per_layer_config`).

transformers 5.16 reads and writes such configs but does not build such models (its pull request
45332): it raises, or with `allow_global_per_layer_attribute_access` builds every layer at full
width. So our checkpoints leave that key out: without this module they fail loudly. Importing it
grants the access and makes each decoder layer receive its own layer's config. It steps aside for
each family that transformers builds itself, and either way checks every model it sees: a layer of
another width than its config says is an error, never a silent full-width model.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from axolotl_loram.architecture.config_json import family_of
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.packed_experts import StackedNf4
from axolotl_loram.models.patches import (
    build_each_layer_by_its_own_config,
    check_after_building,
    load_4bit_with,
)


def is_heterogeneous(config: Any) -> bool:
    """Whether a config's layers differ."""
    return bool(getattr(config, "is_heterogeneous", False))


def install() -> None:
    """Make transformers build heterogeneous models. Idempotent; done on import."""
    build_each_layer_by_its_own_config()
    check_after_building(check_widths)
    load_4bit_with(StackedNf4)


def check_widths(model: PreTrainedModel) -> None:
    """Refuse a model, or a part of one, with a linear layer of another width than its config says.

    Looks at in_features and out_features, which stay true under 4-bit and ZeRO-3 weights, and at
    the shapes of stacked experts.
    """
    config = model.config.to_dict()
    if config.get("model_type") not in FAMILIES:
        return
    layers = family_of(config).layers
    declared = {
        tensor.name.removeprefix(f"{layers}."): tensor
        for tensor in parameters(config)
        if tensor.layer is not None and tensor.role in (LINEAR, EXPERTS) and not tensor.bias
    }
    for name, module in model.named_modules():
        path = _below_layers(name, layers).removesuffix(".base_layer")
        own = dict(module.named_parameters(recurse=False)) if path else {}
        for parameter in own:
            tensor = declared.get(f"{path}.{parameter}")
            if tensor is not None and _shape_of(module, parameter) != tensor.shape:
                raise LoRAMError(
                    f"expected {name} to have the shape {list(tensor.shape)}, found "
                    f"{list(_shape_of(module, parameter))}: the model was built without its "
                    "per_layer_config; import axolotl_loram.heterogeneous before loading it"
                )


def _shape_of(module: Any, parameter: str) -> tuple[int, ...]:
    """The shape that a parameter has when it is whole and not quantized."""
    if parameter == "weight" and hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    values = getattr(module, parameter)
    return tuple(getattr(values, "ds_shape", values.shape))


def _below_layers(name: str, layers: str) -> str:
    """The path "17.mlp.up_proj" of a module in the list of layers, whatever stands before that."""
    listed, _, path = f".{name}".partition(f".{layers.rpartition('.')[2]}.")
    wanted = f".{layers}".rpartition(".")[0]
    return path if not listed or listed.endswith(wanted) or wanted.endswith(listed) else ""


install()
