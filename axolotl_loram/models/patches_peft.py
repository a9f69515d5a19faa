"""What is changed of PEFT: as `patches`, whose list this adds to."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn.utils import parametrize

from axolotl_loram.models.patches import _until, _wrap


@_until("PEFT that takes parameters in 4 bits for `target_parameters` as it takes plain ones")
def adapt_packed_stacks() -> None:
    """PEFT 0.20 puts no LoRA on parameters that are expanded as they are read, or the wrong one.

    It knows them by their whole names only, and passes over the ends of names that everybody gives;
    where a name such as down_proj is of linear layers too, it takes what expands them for one. It
    nests LoRA on several parameters of a module in the order of the alphabet, on plain modules
    in the model's: an adapter's tensors would change places. And what the outer one caches hides
    the inner one's update. Axolotl mends this for runs that name `lora_target_parameters`; here it
    is mended for every model that has such parameters, in whichever program.
    """
    _wrap(BaseTuner, "_inject_parameters", _inject_by_place)
    _wrap(ParamWrapper, "_activate_lora", _activate_uncached)
    check = "_check_target_module_exists"
    found = getattr(BaseTuner, check)
    if found.__module__ != __name__:

        @functools.wraps(found, assigned=("__doc__",))
        def is_target(config: Any, key: str) -> Any:
            return ".parametrizations." not in key and found(config, key)

        setattr(BaseTuner, check, staticmethod(is_target))


class _Placed(str):
    """A parameter's whole name, which sorts by its place in the model."""

    place: int

    def __lt__(self, other: str) -> bool:
        return self.place < getattr(other, "place", -1)


def _inject_by_place(
    original: Any, tuner: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    config = peft_config
    named = list(config.target_parameters)
    stacks = [
        f"{path}.{parameter}"
        for path, module in model.named_modules()
        for parameter in getattr(module, "parametrizations", ())
    ]
    placed = [_Placed(name) for name in [*named, *stacks]]
    for place, name in enumerate(placed):
        name.place = place
    config.target_parameters = placed[: len(named)] + [
        name for name in placed[len(named) :] if name.endswith(tuple(f".{end}" for end in named))
    ]
    try:
        return original(tuner, config, model, *args, **kwargs)
    finally:
        config.target_parameters = named


@contextmanager
def _activate_uncached(original: Any, wrapper: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    key = (id(wrapper.get_base_layer()), wrapper.parameter_name)
    with original(wrapper, *args, **kwargs):
        parametrize._cache.pop(key, None)
        try:
            yield
        finally:
            parametrize._cache.pop(key, None)
