"""Memory of mixtures in 4 bits, of real width, against the plan: QLoRA and QLoRAM beside.

One decoder layer of each, with random weights, experts and attention in NF4, LoRA on attention; the
vocabulary is 1,024, for the layer is what is looked at. One forward and backward pass of 256 tokens
under autocast; counted is what PyTorch allocates for it, on a CPU.

    python benchmarks/mixtures.py    # rows that mixtures.csv has already are not run again
"""

from __future__ import annotations

import csv
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from measure import ROOT, append_row, surroundings
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "tests/support"))
from live_bytes import LiveBytes

from axolotl_loram.architecture.config_json import with_defaults
from axolotl_loram.memory.activations import Activations
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import pruned_config, storage_of
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.trained import Trained
from axolotl_loram.memory.weights import weight_bytes
from axolotl_loram.models import small_head
from axolotl_loram.models.stream import replace_linear

ROWS = Path(__file__).with_suffix(".csv")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SMALL = {"num_hidden_layers": 1, "vocab_size": 1024, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "layer_types": ["full_attention"],
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
}
CASES = [
    {"model": model, "ratio": ratio, "gradient_checkpointing": checkpointing}
    for model in MODELS
    for ratio in (0.0, 0.5)
    for checkpointing in (True, False)
]


def packed(config: dict[str, Any], checkpointing: bool) -> nn.Module:
    """The model with random weights: its experts are never there in 16 bits."""
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    stacks = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    for module in stacks:
        for name in ("gate_up_proj", "down_proj"):
            shape = getattr(module, name).shape
            setattr(module, name, nn.Parameter(torch.empty(0, device="meta")))
            module.__dict__.setdefault("shapes", {})[name] = shape
    model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(settings)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            replace_linear(model.model, path, module.weight.data, torch.device("cpu"))
    for module in stacks:
        for name, shape in module.__dict__.pop("shapes").items():
            pack(module, name, shape)
    model.set_attn_implementation("eager" if config["model_type"] == "gpt_oss" else "sdpa")
    lora = LoraConfig(r=8, target_modules=list(TARGETS))
    adapted = get_peft_model(model, lora).train()
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": True})
    return adapted


def pack(module: nn.Module, name: str, shape: torch.Size) -> None:
    """Give a module a stack of random codes, with the scales of a small one over and over."""
    block, values = 64, shape.numel()
    scales = -(-values // block)
    small = torch.randn(block * scales // 64).mul_(0.02).bfloat16()  # whole scales of its own
    _, state = quantize_4bit(small, blocksize=block, compress_statistics=True, quant_type="nf4")
    parts = state.as_dict(packed=False)
    parts |= {
        "shape": tuple(shape),
        "absmax": torch.full((scales,), 128, dtype=torch.uint8),
        "nested_absmax": torch.full((-(-scales // 256),), 0.02),
    }
    codes = torch.randint(0, 256, (values // 2, 1), dtype=torch.uint8)
    setattr(module, name, nn.Parameter(codes, requires_grad=False))
    replace_parameter_4bit_prequantized(module, name, parts, torch.device("cpu"))


def measure(case: dict[str, Any]) -> dict[str, object]:
    """One row."""
    whole = with_defaults(MODELS[case["model"]] | SMALL)
    ratio, checkpointing = case["ratio"], case["gradient_checkpointing"]
    config = pruned_config(whole, ratio, (0, 0), ["experts"]) if ratio else dict(whole)
    eager = config["model_type"] == "gpt_oss"
    run = TrainingArgs.parse(
        lora_target_modules=",".join(TARGETS),
        sequence_len=256,
        gradient_checkpointing=checkpointing,
        attention="eager" if eager else "flash",
        quantize_experts=True,
        lm_head_format="native",
        embedding_format="native",
    )
    layout = Layout.of(config)
    storage = storage_of("qloram", run, tied=False)
    trained = Trained.of(run, layout)
    model = packed(config, checkpointing)
    lora = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    moments = Activations(run, storage, trained.rank).moments(layout, lora)
    ids = torch.arange(run.sequence_len)[None]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    step()  # gradients are there from now on
    with LiveBytes() as live:
        step()
    held = small_head.weight_bytes(model) - 4 * lora
    row = {
        **case,
        "method": "qloram" if ratio else "qlora",
        "tokens": run.sequence_len,
        "planned_weight_bytes": weight_bytes(layout, storage).on_device,
        "weight_bytes": held,
        "planned_step_bytes": max(map(sum, moments.values())),
        "step_bytes": live.peak,
    }
    return row


if __name__ == "__main__":
    there = list(csv.DictReader(ROWS.open())) if ROWS.exists() else []
    done = {tuple(row[name] for name in CASES[0]) for row in there}
    for case in CASES:
        if tuple(map(str, case.values())) not in done:
            gc.collect()
            row = measure(case) | surroundings("transformers", "peft", "bitsandbytes")
            append_row(ROWS, row)
            print(row)
