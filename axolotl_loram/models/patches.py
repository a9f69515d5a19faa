"""Every change of somebody else's code, with its reason and what makes it unnecessary.

A function here makes one change, or lasts as long as its `with` block; its docstring is the reason,
and `PATCHES` says what will end it. What a change belongs to (Axolotl's modules, a trainer, a
model) is handed in where importing it is not this floor's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, MutableSet, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed, heterogeneity
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.removed import replace_whole

PATCHES: dict[str, str] = {}
"""Name of each function that changes foreign code → what makes it unnecessary."""
_MARK = "_loram_per_layer"
_BUILT: dict[int, Iterator[int]] = {}
"""Config (by identity) of a model that is being built → numbers for layers that take none."""
_UNDONE_BY: list[Callable[[], None]] = []


def _until(end: str) -> Callable[[Any], Any]:
    def listed(function: Any) -> Any:
        PATCHES[function.__name__] = end
        return function

    return listed


def undo() -> None:
    """Take back what was changed for one configuration, when Axolotl has refused that."""
    while _UNDONE_BY:
        _UNDONE_BY.pop()()


def _replace_until_undone(owner: Any, name: str, value: Any) -> None:
    _UNDONE_BY.append(functools.partial(setattr, owner, name, getattr(owner, name)))
    setattr(owner, name, value)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object is another in the block."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


# transformers


@_until("transformers' own building (its PR 45332); family by family, this steps aside for it")
def build_each_layer_by_its_own_config() -> None:
    """Transformers 5.16 reads per-layer configs but builds every layer at full width, or raises."""
    _grant_global_access()
    _wrap(PreTrainedModel, "__init__", _prepare_layers_before)
    _wrap(PreTrainedModel, "set_attn_implementation", _tell_layers_after)


@_until("a check of transformers' own that a layer has the width that its config says")
def check_after_building(check: Callable[[PreTrainedModel], None]) -> None:
    """A layer of another width than its config says is an error, never a full-width model."""

    def check_before(original: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        take_any_width()
        _BUILT.pop(id(model.config), None)
        if getattr(model.config, "is_heterogeneous", False):
            check(model)
        original(model, *args, **kwargs)

    _wrap(PreTrainedModel, "post_init", check_before)


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
    if getattr(config, "is_heterogeneous", False) and not _has_own_way(type(model), config):
        for cls in _decoder_layers(type(model)):
            _wrap(cls, "__init__", _with_own_config)
        _BUILT[id(config)] = itertools.count()
    original(model, config, *args, **kwargs)


def _has_own_way(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether transformers builds this family: its pull request has a list of those that it does.

    For another, depending on its revision, it finds nothing, or raises a ValueError.
    """
    find = getattr(heterogeneity, "get_heterogeneous_modeling_spec", None)
    own = getattr(model_class, "_heterogeneous_modeling_spec", None)
    unbuilt = SimpleNamespace(config=config, _heterogeneous_modeling_spec=own)
    with suppress(ValueError):
        return find is not None and find(unbuilt) is not None
    return False


def _tell_layers_after(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """A layer's own config is a copy: hand it the attention that was chosen after building."""
    original(model, *args, **kwargs)
    towers = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for tower in (part for part in towers if getattr(part.config, "is_heterogeneous", False)):
        for module in tower.modules():
            config: Any = getattr(module, "config", None)
            if config is not None and not isinstance(module, PreTrainedModel):
                config._attn_implementation = tower.config._attn_implementation


def _with_own_config(original: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
    bound = inspect.signature(original).bind(layer, *args, **kwargs)
    config = bound.arguments["config"]
    if getattr(config, "is_heterogeneous", False):
        numbered = "layer_idx" in bound.arguments
        index = bound.arguments["layer_idx"] if numbered else next(_BUILT[id(config)])
        if getattr(config.per_layer_config[index], "num_attention_heads", None) == 0:
            return replace_whole(original, layer, *bound.args[1:], **bound.kwargs)
        bound.arguments["config"] = config.per_layer_config[index]
    original(*bound.args, **bound.kwargs)


def _decoder_layers(model_class: type[PreTrainedModel]) -> list[type]:
    """The layer classes that a model class names in `_no_split_modules`.

    They take `config`, and mostly `layer_idx`; those that do not (a ViT's) are counted as they are
    built.
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


@_until("a way to build one model whole while transformers' ZeRO-3 settings are there")
@contextmanager
def not_partitioned() -> Iterator[None]:
    """Inside a run under ZeRO-3, transformers would deal any model it builds out to the ranks."""
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


@_until("lm-eval that leaves weights tied as they are, or transformers that ties under LoRA")
def tied_as_it_is(model: Any) -> Any:
    """lm-eval ties weights anew, which transformers 5.16 cannot with LoRA on a tied lm_head."""
    return _replaced(model, "tie_weights", lambda *_, **__: None)


@_until("a hook of Axolotl's between the vocabulary's last size and the cast to float32")
def once_sized(model: Any, then: Callable[[], None]) -> None:
    """Axolotl settles the vocabulary's size by one call of either, and has no hook there.

    Right after it, what is not quantized becomes float32: 8.4 GB of LLaMA-3.1-70B's.
    """
    names = ("resize_token_embeddings", "tie_weights")
    own = {name: model.__dict__.get(name) for name in names}

    def and_then(name: str, *args: Any, **kwargs: Any) -> Any:
        for other, method in own.items():  # as they were, also for calls from one to the other
            model.__dict__.pop(other)
            model.__dict__.update({other: method} if method else {})
        result = getattr(model, name)(*args, **kwargs)
        then()
        return result

    model.__dict__.update({name: functools.partial(and_then, name) for name in names})


# transformers' Trainer, one of a run


@_until("a trainer that counts real tokens under packed attention masks (transformers 5.16)")
def count_ones(trainer: Any) -> None:
    """Under sample packing Axolotl's masks number the samples in a row; they would be added up."""
    count = trainer._track_num_input_tokens

    def count_as_ones(inputs: Any) -> None:
        mask = inputs.get("attention_mask")
        count(inputs if mask is None else {**inputs, "attention_mask": mask != 0})

    trainer._track_num_input_tokens = count_as_ones


@_until("a trainer that, resumed after its last step, does no more (transformers 5.16 does one)")
def train_no_more(trainer: Any) -> None:
    """A run that ended between its last checkpoint and the aligned one has no step left."""
    trainer._run_epoch = lambda **epoch: None


@_until("a hook of the trainer's that sees a batch before its loss is computed")
def see_batches(trainer: Any, look: Callable[[Any, Any], None]) -> None:
    """`compute_loss_func` is handed logits and labels, but not the tokens that they are of."""
    compute_loss = trainer.compute_loss

    def look_first(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        look(model, inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = look_first


# Axolotl


@_until("a hook of Axolotl's telemetry for the texts of errors (0.19 has this set alone)")
def keep_errors_from_telemetry(redacted: MutableSet[str]) -> None:
    """Our messages name the files that they are about.

    It stays when a configuration is refused: what is sent of that comes after the plugins' turn.
    """
    redacted |= {"exception", "stack_trace"}


@_until("a setting of `axolotl merge-lora` for the NF4 round trip (0.19 has none)")
def merge_without_nf4(merge_lora: ModuleType) -> None:
    """The round trip makes a merged base equal to that of training: LoRAM's was never quantized."""
    name = "merge_lora_sharded_efficient"
    original = getattr(merge_lora, name)

    def plainly(**kwargs: Any) -> Any:
        return original(**{**kwargs, "simulate_nf4": False, "simulate_nf4_experts": False})

    _replace_until_undone(merge_lora, name, plainly)


@_until("Axolotl's merging (0.19) knowing MXFP4, and experts stored one by one in FP8")
def merge_into(merge_lora: ModuleType, plain: Callable[[Any], Any]) -> None:
    """Into what `plain` of cfg gives: Axolotl rounds to FP8 again, and leaves MXFP4 out."""
    original = merge_lora.do_merge_lora

    def from_plain(*, cfg: Any) -> Any:
        with plain(cfg) as base:
            cfg.base_model = cfg.base_model_config = base
            return original(cfg=cfg)

    _replace_until_undone(merge_lora, "do_merge_lora", from_plain)


@_until("transformers that loads FP8 models (5.16.1 fails on each that can be split over ranks)")
def load_fp8() -> None:
    """It looks up by which plan experts are split, and has one for a single implementation."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    plans = getattr(FP8Experts, "_impl_tp_layer_overrides", {})  # not there where it is mended
    plans |= {name: {} for name in (None, "eager", "batched_mm", "grouped_mm", "deepgemm")}


@_until("Axolotl's merging by shards knowing what checkpoints call a language tower")
def find_language_tower(lora_merge: ModuleType, names: dict[str, str]) -> None:
    """Axolotl merges without a word what it finds: of Gemma 3, the vision tower alone.

    `names` are patterns of how a stored name begins → how the running model's does.
    """
    name = "_get_conversion_info"
    original = getattr(lora_merge, name)

    def conversion_info(*args: Any, **kwargs: Any) -> Any:
        renamings, converters = original(*args, **kwargs)
        return {**renamings, **names}, converters

    _replace_until_undone(lora_merge, name, conversion_info)


@_until("Axolotl's SIGINT handler leaving the data loader's workers alone, and asking plugins")
def before_exit_on_interrupt(write: Callable[[], None]) -> None:
    """On SIGINT Axolotl saves the adapter and exits: the record has to say how far that one is.

    Ctrl-C reaches the data loader's forks too, which Axolotl (0.19) would have save theirs over it.
    """
    save_and_exit, trainer = signal.getsignal(signal.SIGINT), os.getpid()

    def interrupted(number: int, frame: Any) -> None:
        if os.getpid() != trainer:
            raise KeyboardInterrupt
        write()
        if callable(save_and_exit):
            save_and_exit(number, frame)

    signal.signal(signal.SIGINT, interrupted)


@_until("lora_kernels of Axolotl that patch only the model that is trained (0.19: its class)")
def plain_projections(model: nn.Module, kernels: ModuleType) -> None:
    """Give all models of a class that `lora_qkv_kernel` patches what only the trained one gets."""
    for layer in model.modules():
        for attention in kernels.find_self_attn_in_layer(layer):
            kinds: tuple[Any, ...] = type(attention).__mro__
            for kind in kinds:
                if "_original_forward" in vars(kind):
                    kind.apply_qkv = kernels.original_apply_qkv_optional_v
                    kind.apply_o = kernels.original_apply_o


@_until("transformers that loads stacked experts in 4 bits")
def load_4bit_with(quantizer: Any) -> None:
    """Have a quantizer load what comes, or goes, in bitsandbytes' 4 bits."""
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = quantizer


@_until("bitsandbytes that mends its issue 2078 and dequantizes rows of any width on CPUs")
def take_any_width() -> None:
    """Two kernels for CPUs with AVX512 (0.50.2) go wrong at widths that pruning leaves.

    Dequantization takes each row to start a new block of scales: where rows are not whole blocks
    they come out up to 40 % wrong, without a word. And with AVX512-BF16, the first forward pass in
    eval mode packs a weight for a kernel that wants multiples of 32 outputs and whole blocks of
    inputs, and rounds its scales for good. Here all rows are dequantized as one, and nothing is
    packed. Idempotent; without effect until bitsandbytes is imported.
    """
    modules = sys.modules.get("bitsandbytes.nn.modules")
    if modules is not None:
        vars(modules)["has_avx512bf16"] = bool  # called without arguments: false
        _dequantize_flat()


@functools.cache
def _dequantize_flat() -> torch.library.Library:
    name = "dequantize_4bit"
    kernel = torch.library.get_kernel(f"bitsandbytes::{name}", "CPU")

    def flat(
        keys: Any,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        whole = shape[-1] % blocksize == 0
        sizes = list(shape) if whole else [math.prod(shape)]
        values = kernel.call_boxed(keys, packed, absmax, blocksize, quant_type, sizes, dtype)
        return values.reshape(list(shape))

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every override, also of one it is told of
        library.impl(name, flat, "CPU", with_keyset=True, allow_override=True)
    return library
