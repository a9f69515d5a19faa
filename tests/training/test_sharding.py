"""What sharding and offloading make of a run: settled or refused before it, and a stand-in GPU."""

import contextlib
import inspect
from types import ModuleType, SimpleNamespace

import axolotl.core.trainers.mixins.layer_offloading as axolotls
import pytest
import torch
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.training.sharding import (
    check_offloading,
    check_offloads,
    settle_checkpointing,
)

ZERO3 = {"deepspeed": {"zero_optimization": {"stage": 3}}, "gradient_checkpointing": True}
ZERO2 = {**ZERO3, "deepspeed": {"zero_optimization": {"stage": 2}}}
NOT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (ZERO3, {"use_reentrant": True}),
        ({**ZERO3, "rl": "dpo"}, {"use_reentrant": True}),
        ({**ZERO3, "activation_offloading": "hidden_states"}, {"use_reentrant": True}),
        ({**ZERO3, "gradient_checkpointing": False, **NOT}, {"use_reentrant": False}),
        ({**ZERO3, "activation_offloading": True, **NOT}, {"use_reentrant": False}),
        ({**ZERO2, **NOT}, {"use_reentrant": False}),
        (ZERO2, None),
        ({"gradient_checkpointing": True, **NOT}, {"use_reentrant": False}),
        ({**ZERO3, **NOT}, LoRAMError("use_reentrant: true with ZeRO-3, found false")),
        ({**ZERO3, "selective_checkpointing": True}, LoRAMError("no `selective_checkpointing`")),
    ],
)
def test_layers_are_recomputed_reentrantly_under_zero3(cfg, expected):
    cfg = DictDefault(cfg)
    if isinstance(expected, LoRAMError):
        with pytest.raises(LoRAMError, match=str(expected)):
            settle_checkpointing(cfg)
        return
    settle_checkpointing(cfg)
    assert cfg.gradient_checkpointing_kwargs == expected


@pytest.mark.parametrize(
    ("cfg", "ranks", "found"),
    [
        ({}, 1, None),
        ({}, 2, "2 processes"),
        ({"deepspeed": "zero2.json"}, 1, "deepspeed"),
        ({"fsdp_config": {"offload_params": True}}, 1, "fsdp_config"),
    ],
)
def test_layers_are_offloaded_on_one_gpu_alone(cfg, ranks, found, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    check_offloading(DictDefault(cfg))  # without the setting, anything goes
    cfg = DictDefault({**cfg, "layer_offloading": True})
    if found is None:
        check_offloading(cfg)
        return
    with pytest.raises(LoRAMError, match=f"one GPU with `layer_offloading`, found {found}"):
        check_offloading(cfg)


STAND_IN = {
    '.device.type == "cuda"': ".dtype == torch.float32",
    '.device.type != "cuda"': ".dtype != torch.float32",
    'device="cpu", pin_memory=True': "dtype=torch.float64",
    ".to(self._device": ".to(torch.float32",
    "self._device = p.device": "self._device = p.dtype",
    "torch.cuda.": "cuda.",
}
"""Axolotl's offloading asks for CUDA. Here "on the GPU" is float32 and "in host memory" float64:
what is computed with a weight that is in the wrong place fails."""


@pytest.fixture(scope="module")
def manager():
    """Axolotl's own LayerOffloadManager on that stand-in."""
    source = inspect.getsource(axolotls)
    for there, here in STAND_IN.items():
        assert there in source
        source = source.replace(there, here)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    module = ModuleType("stand_in")
    module.cuda = SimpleNamespace(
        Stream=lambda device: stream,
        default_stream=lambda device: stream,
        stream=lambda stream: contextlib.nullcontext(),
        memory_allocated=lambda device: 0,
        empty_cache=lambda: None,
    )
    exec(source, module.__dict__)
    return module


def adapted(folder, how, modules):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if how is not None:
        model.gradient_checkpointing_enable({"use_reentrant": how})
        model.enable_input_require_grads()
    lora = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    return get_peft_model(model, lora).train()


def gradients(model, step):
    tokens = torch.arange(3, 60)[None]
    for _ in range(2):
        model.zero_grad()
        with step:
            model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
def test_a_pruned_model_whose_layers_are_offloaded_has_the_same_gradients(
    how, manager, make_model, tmp_path
):
    """Also where layers differ in width; between steps no layer but the next is on the GPU."""
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    modules = ["q_proj", "up_proj", "down_proj"]
    expected = gradients(adapted(tmp_path / "pruned", how, modules), contextlib.nullcontext())
    model = adapted(tmp_path / "pruned", how, modules)
    offloads = manager.LayerOffloadManager(model)
    check_offloads(SimpleNamespace(_layer_offload_manager=offloads))
    offloads.setup_hooks()
    found = gradients(model, manager._LayerOffloadContext(offloads))
    assert found.keys() == expected.keys() and any(grad.any() for grad in found.values())
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    there = {layer for layer, _ in _frozen(model) if _.dtype == torch.float32}
    assert there <= {"0"} and len({layer for layer, _ in _frozen(model)}) == 4


def _frozen(model):
    """Number of the layer and weight, of all that is frozen in layers."""
    for name, weight in model.named_parameters():
        if ".layers." in name and not weight.requires_grad:
            yield name.partition(".layers.")[2].split(".")[0], weight


def test_layers_that_would_not_be_offloaded_are_refused(manager, make_model):
    """GPT-NeoX's are no DecoderLayers; Axolotl itself only warns."""
    model = adapted(make_model("gpt_neox"), None, ["query_key_value"])
    trainer = SimpleNamespace(_layer_offload_manager=manager.LayerOffloadManager(model))
    for offloads_nothing in (trainer, SimpleNamespace()):
        with pytest.raises(LoRAMError, match="that offloads nothing"):
            check_offloads(offloads_nothing)
