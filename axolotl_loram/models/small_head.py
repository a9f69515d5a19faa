"""The lm_head of a loaded model, put into 4 bits, and its embedding, into the CPU's memory.

Other modules take the places of the model's, which are frozen: nothing of them is trained, and
nothing of them is saved with the adapter.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import nn

from axolotl_loram.architecture.config_json import Config
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.spaces import HEAD
from axolotl_loram.architecture.ties import config_of
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.nf4 import packed_weights
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.formats import Formats, check_trains_packed, choose_formats
from axolotl_loram.models.packed_experts import packed_stacks, states_of
from axolotl_loram.models.patches import once_sized
from axolotl_loram.models.stream import replace_linear

LOG = logging.getLogger(__name__)
HOOKS = [name for name in vars(nn.Module()) if name.startswith("_forward")]


class OffloadedEmbedding(nn.Module):
    """An embedding whose table stays in the CPU's memory; only looked-up rows reach the device.

    The table is no submodule: else ``model.to(device)`` would move it, and DistributedDataParallel
    refuse it.
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.__dict__["table"] = table.to("cpu").requires_grad_(False)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim

    @property
    def weight(self) -> torch.Tensor:
        """The whole table, on the CPU."""
        return self.__dict__["table"].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., ) token ids → (..., hidden) on the device of the ids."""
        return self.__dict__["table"](tokens.to("cpu")).to(tokens.device)


def decide_formats(section: LoRAMConfig, cfg: Any, pruned: Path | None) -> Formats:
    """The formats of a run, once the device is known to do them; `pruned` is None until it is made.

    Raises:
        LoRAMError: They cannot be had, or a model in 4 bits is not trained as one.
    """
    config = config_of(str(pruned or cfg.base_model), None if pruned else cfg.revision_of_model)
    if pruned:
        packed = packed_weights(Checkpoint(pruned).tensors)
        is_packed, packed_head = bool(packed), head_name(config) in packed
    else:
        is_packed = section.pruning is not None and section.pruning.quantize is not None
        packed_head = is_packed and head_name(config) is not None
    if is_packed:
        check_trains_packed(cfg)
    formats = choose_formats(section, cfg, config, packed_head)
    if formats.lm_head == "nf4":
        check_device(choose_device())
    return formats


def head_name(config: Config) -> str | None:
    """What checkpoints call the weight of the lm_head; None if it is the embedding's, or none."""
    return next((t.name for t in tensors(config) if t.role == HEAD and not t.bias), None)


def store_small_once_sized(model: Any, formats: Formats) -> None:
    """`store_small`, as soon as Axolotl has settled the vocabulary's size."""
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    if formats.small:
        once_sized(model, lambda: store_small(model, formats, vocabulary))


def store_small(model: Any, formats: Formats, vocabulary: int) -> None:
    """Put the lm_head and the embedding of a loaded model into their formats.

    To be called when the vocabulary has its size and the model is on its device, before PEFT wraps
    it. A format that is a default falls back to native where the model does not allow it.

    Args:
        model: A causal language model.
        formats: What to keep them in.
        vocabulary: Tokens that the model was loaded with.

    Raises:
        LoRAMError: A format is asked for that the model or the device does not allow.
    """
    if not formats.small:
        return
    for part in formats.small:
        why = _hindrance(model, part, vocabulary)
        formats = formats.without(part, why) if why else formats
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        formats = formats.both_or_none()
    getters = {"lm_head": model.get_output_embeddings, "embedding": model.get_input_embeddings}
    for part in formats.small:
        old = getters[part]()
        path = next(name for name, module in model.named_modules() if module is old)
        (_head_to_nf4 if part == "lm_head" else _embedding_to_cpu)(model, path, old)
        new = model.get_submodule(path)
        for hooks in HOOKS:  # such as the one that makes the embedding's output require gradients
            setattr(new, hooks, getattr(old, hooks))
            setattr(old, hooks, OrderedDict())
        new._save_to_state_dict = _save_nothing
    if formats.small:
        kept = ", ".join(f"{part} in {format}" for part, format in formats.small.items())
        LOG.info("%s: %.3f GiB of weights on the device", kept, weight_bytes(model) / 2**30)


def _hindrance(model: Any, part: str, vocabulary: int) -> str | None:
    """What of the loaded model needs a part in its native format, if anything."""
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return "the model is spread over several devices"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.num_embeddings != vocabulary:
        return "the vocabulary was resized, and its new rows are saved with the adapter"
    if part == "lm_head" and type(head) not in (nn.Linear, bitsandbytes.nn.Linear4bit):
        return f"it is a {type(head).__name__}, which does more than a plain one"
    return None


def _embedding_to_cpu(model: nn.Module, path: str, embedding: Any) -> None:
    model.set_submodule(path, OffloadedEmbedding(embedding))


def _head_to_nf4(model: nn.Module, path: str, head: Any) -> None:
    if not isinstance(head, bitsandbytes.nn.Linear4bit):  # it came in 4 bits
        replace_linear(model, path, head.weight.data, head.weight.device)


def _save_nothing(*_: Any) -> None:
    """In the place of a frozen module's own: PEFT would put an adapted lm_head beside its LoRA."""


def check_device(device: str) -> None:
    """Refuse a device on which bitsandbytes does not do NF4, by trying a small layer."""
    try:
        layer = nn.Sequential(nn.Linear(64, 64, bias=False, device=device))
        _head_to_nf4(layer, "0", layer[0])
        inputs = torch.ones(1, 64, device=device, requires_grad=True)
        layer(inputs).sum().backward()
    except Exception as error:  # whatever a backend that lacks it says
        raise LoRAMError(
            f"expected a device on which bitsandbytes does nf4, found {device} ({error}): "
            "choose another"
        ) from error


def prepare_packed(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Let a model that came in 4 bits compute in the run's dtype, and keep its vocabulary.

    The base's own, such as float16, would be a second one beside the activations'.

    Args:
        model: As loaded; one that did not come in 4 bits stays as it is.
        folder: What it was loaded from, whose config.json may name another dtype.
        dtype: The run's.
    """
    if not packed_weights(Checkpoint(folder).tensors):
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight: Any = module.weight
            module.compute_dtype = weight.quant_state.dtype = dtype
    for stack in packed_stacks(model):
        for state in states_of(stack):
            state.dtype = dtype
        model._moe_experts_quantized = True  # what Axolotl goes by: nothing becomes float32
    if isinstance(model.get_output_embeddings(), bitsandbytes.nn.Linear4bit):
        model.resize_token_embeddings = _refuse_to_resize


def _refuse_to_resize(size: int | None = None, *_: Any, **__: Any) -> None:
    raise LoRAMError(
        f"expected the tokenizer's vocabulary to fit the pruned model's, found {size} tokens: an "
        "lm_head in 4 bits cannot grow, so prune without quantize"
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers and quantization states on their device.

    An `OffloadedEmbedding` has none there.
    """
    parts: dict[int, torch.Tensor] = {}
    for stack in packed_stacks(model):
        for state in states_of(stack):
            parts |= {found.data_ptr(): found for found in _tensors_of(state)}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            state = getattr(tensor, "quant_state", None)
            scales = [
                getattr(tensor, "SCB", None),
                getattr(getattr(module, "state", None), "SCB", None),
            ]
            for found in (tensor, *scales, *_tensors_of(state)):
                if found is not None:
                    parts[found.data_ptr()] = found
    return sum(part.nbytes for part in parts.values())


def _tensors_of(state: Any) -> list[torch.Tensor]:
    """What a bitsandbytes QuantState holds, with its second level."""
    if state is None:
        return []
    own = [state.absmax, state.code, state.offset]
    return [t for t in own if isinstance(t, torch.Tensor)] + _tensors_of(state.state2)
