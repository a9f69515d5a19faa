"""Operations of a token, against PyTorch's own counter on models that run."""

import pretrained
import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import axolotl_loram.heterogeneous  # noqa: F401  (to load pruned models)
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.compute import forward_flops, training_flops
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.pruning.prune import prune

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""What the counter sees: it does not know grouped matrix products, nor attention on a CPU."""
LENGTH, BATCH, RANK = 64, 2, 4


def counted(model, run, ids):
    """Operations of a training step, by PyTorch's counter, and the model's layout."""
    layout = Layout.of(model.config.to_dict())
    names = sorted({t.module.rpartition(".")[2] for k in layout.layers for t in k.linears})
    model = get_peft_model(model, LoraConfig(r=run.lora_r, target_modules=names)).train()
    if run.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops(), layout


def settings(checkpointing, length=LENGTH, batch=BATCH):
    return TrainingArgs(
        lora_r=RANK,
        sequence_len=length,
        micro_batch_size=batch,
        gradient_checkpointing=checkpointing,
        attention="eager",
        precision="fp32",
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "phi3", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
)
def test_operations_are_those_that_pytorch_counts(family, checkpointing):
    """Of DeepSeek, PEFT adapts the stacked experts, whose A and B it multiplies out."""
    run, ids = settings(checkpointing), torch.randint(3, 200, (BATCH, LENGTH))
    found, layout = counted(build_model(family, **EAGER), run, ids)
    assert training_flops(run, layout).total * run.tokens == pytest.approx(found, rel=2e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_pruned_model(checkpointing, make_model, tmp_path):
    prune(str(make_model("llama")), tmp_path / "pruned", PruningArgs(ratio=0.5))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **EAGER)
    run, ids = settings(checkpointing), torch.randint(3, 200, (BATCH, LENGTH))
    found, layout = counted(model, run, ids)
    assert training_flops(run, layout).total * run.tokens == pytest.approx(found, rel=2e-4)


def test_an_anchor_adds_a_forward_pass_without_lora():
    model, run = build_model("llama", **EAGER), settings(True)
    layout, ids = Layout.of(model.config.to_dict()), torch.randint(3, 200, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    found = counter.get_total_flops()
    assert forward_flops(run, layout) * run.tokens == pytest.approx(found, rel=2e-4)
    more = training_flops(run, layout, anchored=True).total - training_flops(run, layout).total
    assert more == forward_flops(run, layout)


def test_flash_attention_looks_at_what_came_before_and_computes_once_more():
    layout = Layout.of(build_model("llama").config.to_dict())
    eager = settings(False)
    flash = eager.model_copy(update={"attention": "flash"})
    forward = {run.attention: forward_flops(run, layout) for run in (eager, flash)}
    scores = 4 * 2 * 2 * 32  # layers, products, operations, heads × head_dim
    assert forward["eager"] - forward["flash"] == scores * (LENGTH - (LENGTH + 1) / 2)
    back = {run.attention: training_flops(run, layout).layers_backward for run in (eager, flash)}
    seen = {"eager": 2 * LENGTH, "flash": 2.5 * (LENGTH + 1) / 2}
    assert back["eager"] - back["flash"] == scores * (seen["eager"] - seen["flash"])


@pytest.mark.real
@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_real_model(ratio, checkpointing, tmp_path):
    try:
        folder = pretrained.folder_of(pretrained.SMOLLM2)
    except LoRAMError as error:
        pytest.skip(str(error))
    if ratio:
        prune(str(folder), tmp_path / "pruned", PruningArgs(ratio=ratio))
        folder = tmp_path / "pruned"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER)
    run, ids = settings(checkpointing, 128, 1), torch.randint(3, 40_000, (1, 128))
    found, layout = counted(model, run, ids)
    assert training_flops(run, layout).total * run.tokens == pytest.approx(found, rel=0.02)
