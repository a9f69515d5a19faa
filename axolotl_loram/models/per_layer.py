"""Building and loading models whose layers differ in width (transformers' `per_layer_config`).

transformers 5.16 reads and writes such configs but does not build such models (its pull request
45332): it raises, or with `allow_global_per_layer_attribute_access` builds every layer at full
width. So our checkpoints leave that key out: without this module they fail loudly. Importing it
grants the access and makes each decoder layer receive its own layer's config. It steps aside where
transformers brings `apply_heterogeneous_modeling`, and either way checks every model it sees: a
layer of another width than its config says is an error, never a silent full-width model.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import heterogeneity

from axolotl_loram.architecture.config_json import family_of
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.four_bit import take_any_width

_MARK = "_loram_per_layer"
_BUILT: dict[int, Iterator[int]] = {}
"""Config (by identity) of a model that is being built → numbers for layers that take none."""


def is_heterogeneous(config: Any) -> bool:
    """Whether a config's layers differ."""
    return bool(getattr(config, "is_heterogeneous", False))


def install() -> None:
    """Make transformers build heterogeneous models. Idempotent; done on import."""
    if not hasattr(heterogeneity, "apply_heterogeneous_modeling"):
        _grant_global_access()
        _wrap(PreTrainedModel, "__init__", _prepare_layers_before)
        _wrap(PreTrainedModel, "set_attn_implementation", _tell_layers_after)
    _wrap(PreTrainedModel, "post_init", _check_widths_before)


def _grant_global_access() -> None:
    """Let the global fields be read unless a config says no: Llama's own validation reads them."""
    key = "allow_global_per_layer_attribute_access"
    setattr(
        heterogeneity.HeterogeneousConfigMixin,
        key,
        property(
            lambda config: config.__dict__.get(key, True),
            lambda config, value: config.__dict__.__setitem__(key, value),
        ),
    )


def _wrap(cls: type, name: str, wrapper: Any) -> None:
    original = getattr(cls, name)
    if getattr(original, _MARK, False):
        return
    wrapped = functools.wraps(original)(functools.partial(wrapper, original))
    method = functools.wraps(original)(lambda self, *args, **kwargs: wrapped(self, *args, **kwargs))
    setattr(method, _MARK, True)
    setattr(cls, name, method)


def _prepare_layers_before(
    original: Any, model: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any
) -> None:
    """Before a model builds its layers, see to it that they take their own layer's config."""
    if is_heterogeneous(config):
        for cls in _decoder_layers(type(model)):
            _wrap(cls, "__init__", _with_own_config)
        _BUILT[id(config)] = itertools.count()
    original(model, config, *args, **kwargs)


def _tell_layers_after(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """A layer's own config is a copy: hand it the attention that was chosen after building."""
    original(model, *args, **kwargs)
    towers = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for tower in (part for part in towers if is_heterogeneous(part.config)):
        for module in tower.modules():
            config: Any = getattr(module, "config", None)
            if config is not None and not isinstance(module, PreTrainedModel):
                config._attn_implementation = tower.config._attn_implementation


def _check_widths_before(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    take_any_width()
    _BUILT.pop(id(model.config), None)
    if is_heterogeneous(model.config):
        check_widths(model)
    original(model, *args, **kwargs)


def _with_own_config(original: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    bound = inspect.signature(original).bind(layer, *args, **kwargs)
    config = bound.arguments["config"]
    if is_heterogeneous(config):
        numbered = "layer_idx" in bound.arguments
        index = bound.arguments["layer_idx"] if numbered else next(_BUILT[id(config)])
        bound.arguments["config"] = config.per_layer_config[index]
    original(*bound.args, **bound.kwargs)


def _decoder_layers(model_class: type[PreTrainedModel]) -> list[type]:
    """The layer classes that a model class names in `_no_split_modules`.

    They take `config`, and mostly `layer_idx`; those that do not (a ViT's) are counted as they are
    built.

    Raises:
        LoRAMError: None of them does.
    """
    module = sys.modules[model_class.__module__]
    named = [getattr(module, name, None) for name in model_class._no_split_modules or ()]
    takes = [(cls, _takes(cls)) for cls in named if cls is not None]
    classes = [cls for cls, names in takes if {"config", "layer_idx"} <= names]
    classes = classes or [cls for cls, names in takes if names == {"config"}]
    if not classes:
        raise LoRAMError(
            f"expected {model_class.__name__} to name layers that take config (and layer_idx), "
            f"found {model_class._no_split_modules}: layers of different widths cannot be built "
            "for this architecture"
        )
    return classes


def _takes(cls: type) -> set[str]:
    original: Any = getattr(cls.__init__, "__wrapped__", cls.__init__)  # type: ignore[misc]
    return set(inspect.signature(original).parameters) - {"self"}


def check_widths(model: PreTrainedModel) -> None:
    """Refuse a model with a linear layer of another width than its config says.

    Looks at in_features and out_features, which stay true under 4-bit and ZeRO-3 weights, and at
    the shapes of stacked experts.

    Args:
        model: A model, or a part of one (transformers builds inner models first).

    Raises:
        LoRAMError: A layer was built at another width, such as the base's.
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
        for parameter in _parameters_of(module) if path else ():
            tensor = declared.get(f"{path}.{parameter}")
            if tensor is not None and _shape_of(module, parameter) != tensor.shape:
                raise LoRAMError(
                    f"expected {name} to have the shape {list(tensor.shape)}, found "
                    f"{list(_shape_of(module, parameter))}: the model was built without its "
                    "per_layer_config; import axolotl_loram.heterogeneous before loading it"
                )


def _parameters_of(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


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
