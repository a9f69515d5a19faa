"""What the tests of calibrated pruning share: tokens, streams, and models that see through."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import build_model
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.files.resumable import Work
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.pruning.evidence import Evidence

READERS = ("self_attn.o_proj", "mlp.down_proj")


def text_tokens(samples: int = 6, length: int = 40) -> np.ndarray:
    """Real text as the byte tokenizer of the tests would see it, (samples, length)."""
    source = Path(json.__file__).read_bytes()[: samples * length]
    return (np.frombuffer(source, np.uint8).reshape(samples, length) % 250 + 3).astype(np.int64)


def evidence_for(
    folder, work, layers, tokens=None, four_bit=False, kinds=frozenset({"neurons", "kv_groups"})
) -> Evidence:
    checkpoint, config = Checkpoint(folder), load_config(str(folder))
    work.mkdir(exist_ok=True)
    return Evidence(
        checkpoint,
        config,
        list(layers),
        Work(work),
        0,
        text_tokens() if tokens is None else tokens,
        lambda: LayerStream(checkpoint, config, "cpu", four_bit),
        kinds=kinds,
    )


def inputs_by_hooks(model, modules, tokens) -> dict[str, torch.Tensor]:
    """Module name → its inputs (samples, tokens, features) in one pass of the whole model."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name in modules
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    return seen


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


def saved(folder, **sizes):
    """A pico model whose weights a test has changed, in a folder; returns model and save."""
    model = build_model(**sizes)
    return model, lambda: (model.save_pretrained(folder), folder)[1]
