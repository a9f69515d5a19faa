"""Models of real shapes with random weights: built on the device as Axolotl loads, and trained."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, utils

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.models.formats import Formats
from axolotl_loram.models.small_head import store_small
from axolotl_loram.models.stream import replace_linear


class LeftOut(Exception):
    """What is asked for needs something that is not installed; says what."""


def check_attention(name: str) -> None:
    """Refuse flash-attn where it is not installed: transformers would look for it on the hub.

    Raises:
        LeftOut: It is not.
    """
    version = name.removeprefix("flash_attention_")
    if version != name and not getattr(utils, f"is_flash_attn_{version}_available")():
        raise LeftOut(f"flash-attn {version} is not installed, or not for this device")


def build(
    config: dict[str, Any], method: str, attention: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """A model on its device, in the formats of its method, before LoRA.

    Linear weights go to NF4 one by one, so that no large model is ever there in 16 bits.

    Args:
        config: Of the model that is trained on, as config.json holds it.
        method: One of the planner's.
        attention: As transformers names it.
        device: Where it goes; of a pruned model in 4 bits the embedding stays in host memory.
        dtype: Of what is not quantized.
    """
    four_bit = method.startswith("q")
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention
        )
    fill(model, four_bit, device, dtype)
    model.is_loaded_in_4bit = four_bit  # PEFT asks
    model.to(device)  # rotary frequencies
    if method == "qloram":
        store_small(model, Formats("nf4", "cpu"), config["vocab_size"])
    settle_dtypes(model, four_bit, dtype)
    return model


def fill(model: Any, four_bit: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Give an empty model random weights on the device, its linear layers in NF4 or not."""
    for path, module in list(model.named_modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            values = torch.ones(empty.shape, device=device, dtype=dtype)
            values = values.normal_(std=0.02) if empty.ndim > 1 else values
            if four_bit and type(module) is nn.Linear and path != "lm_head":
                replace_linear(model, path, values, device)
            else:
                setattr(module, name, nn.Parameter(values, requires_grad=False))
            del values  # or two weights are there at once


def settle_dtypes(model: Any, four_bit: bool, dtype: torch.dtype) -> None:
    """As Axolotl's `ModelLoader._configure_embedding_dtypes`: to float32 and back."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    native = [module for module in both if type(module) in (nn.Embedding, nn.Linear)]
    for module in native:
        module.to(torch.float32)
    if four_bit:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for name, module in model.named_modules():
        if "norm" in name or module in native:
            module.to(dtype)


def with_lora(model: Any, checkpointing: bool) -> Any:
    """The model with adapters of rank 8 on all linear layers, ready to train."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def offloaded(model: Any) -> AbstractContextManager:
    """Put frozen layers into host memory, as Axolotl's `layer_offloading`; its context of a step.

    Raises:
        LeftOut: There is no axolotl.
    """
    try:
        from axolotl.core.trainers.mixins import layer_offloading as mixin
    except ImportError as error:
        raise LeftOut(f"layer_offloading is axolotl's, which does not import: {error}") from None
    manager = mixin.LayerOffloadManager(model, num_prefetch=1)
    manager.setup_hooks()
    return mixin._LayerOffloadContext(manager)


def step_seconds(
    model: Any, shape: tuple[int, int], accumulation: int, steps: int, context: Any
) -> list[float]:
    """Wall seconds of optimizer steps, after a first of one micro-batch that is not counted.

    Args:
        model: With adapters; its device decides on autocast.
        shape: Sequences in a micro-batch, tokens in a sequence.
        accumulation: Micro-batches in a step.
        steps: How many.
        context: Entered for each micro-batch.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    device = trained[0].device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, shape, device=device)
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # or an error: no slower kernel in its place
    seconds: list[float] = []
    with flash if model.config._attn_implementation == "sdpa" else nullcontext():
        for step in range(steps + 1):
            start = time.perf_counter()
            for _ in range(accumulation if step else 1):
                with context:
                    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                    (loss / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    if not torch.isfinite(loss):
        raise RuntimeError(f"expected a finite loss, found {loss.item()}")
    return seconds[1:]
