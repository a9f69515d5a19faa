"""A saved adapter is all that was trained, or nothing is recovered from it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.plugin import LoRAMPlugin
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.recovery.whole import check_complete, trained_shapes
from axolotl_loram.training.checkpoints import choose_checkpoint, whole_checkpoints
from axolotl_loram.training.sharding import check_adapter_saves

LORA = "base_model.model.model.layers.1.mlp.up_proj"
HEAD = "base_model.model.lm_head.weight"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pruned(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete") / "pruned"
    prune(str(make_model()), folder, PruningArgs(ratio=0.5))
    return folder


@pytest.fixture
def adapter(pruned, tmp_path):
    """A whole adapter, and what was trained."""
    settings = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * weight.requires_grad
    model.save_pretrained(tmp_path / "out/pruned")
    return tmp_path / "out/pruned", trained_shapes(model)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
        ("mixtral", {"target_parameters": ["gate_up_proj", "down_proj"]}),
    ],
)
def test_names_and_shapes_are_those_that_peft_saves(family, settings, make_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(family))
    model = get_peft_model(model, LoraConfig(r=2, **settings))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert trained_shapes(model) == {name: tuple(weight.shape) for name, weight in saved.items()}


def empty(weights):
    weights.update({name: torch.empty(0) for name in weights})


def only_shares(weights):
    weights.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, r"found shape \[0\] \(\d+ of \d+ tensors are not whole\)"),
        (lambda w: w.pop(f"{LORA}.lora_B.weight"), r"up_proj.lora_B.*found none \(1 of"),
        (lambda w: w.pop(HEAD), r"lm_head.weight of shape \[\d+, 32\].*found none"),
        (lambda w: w.update({HEAD: torch.empty(0)}), r"lm_head.*found shape \[0\]"),
        (
            lambda w: w.update({f"{LORA}.lora_A.weight": w[f"{LORA}.lora_A.weight"][:1].clone()}),
            r"lora_A.weight of shape \[2, 32\].*found shape \[1, 32\]",
        ),
        (lambda w: w[HEAD].fill_(float("nan")), "expected finite weights.*diverged"),
        (only_shares, "not saved whole.*neither"),
    ],
)
def test_what_is_not_whole_is_not_recovered(damage, message, adapter, tmp_path):
    """By the plugin, when training ends: as each kind of sharding would leave it."""
    folder, trained = adapter
    check_complete(folder, trained)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file)
    if not weights:  # a sharded save: each rank's part, and no adapter
        file.rename(folder / "__0_0.distcp")
    plugin = LoRAMPlugin()
    plugin.run = SimpleNamespace(trained=folder, trained_shapes=trained, output=folder.parent)
    with pytest.raises(LoRAMError, match=message):
        plugin.post_train_unload(DictDefault({}))
    assert {path.name for path in folder.parent.iterdir()} == {"pruned"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "to be whole, found shape"),
        (lambda w: w.update({HEAD: torch.empty(0, 16)}), "lm_head.weight to be whole"),
        (lambda w: w.pop(f"{LORA}.lora_B.weight"), "lora_A.weight without its partner"),
    ],
)
def test_nor_by_hand(damage, message, adapter, pruned, tmp_path):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    damage(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAMError, match=message):
        recover(folder, str(pruned), tmp_path / "recovered")
    assert not (tmp_path / "recovered").exists()


def zero3(**changes):
    return {"deepspeed": {"zero_optimization": {"stage": 3, **changes}}}


def fsdp2(state):
    return {"fsdp_config": {"fsdp_version": 2, "state_dict_type": state}}


GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("cfg", "ranks", "message"),
    [
        (zero3(**GATHERS), 1, None),
        (zero3(**GATHERS), 2, "stage3_allgather_sequential true.*ranks on CPUs, found None"),
        (zero3(**GATHERS, stage3_allgather_sequential=True), 2, None),
        (zero3(stage3_gather_16bit_weights_on_model_save=False), 1, "model_save true.*found False"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, 2, None),
        ({"fsdp_version": 2, "lora_modules_to_save": ["lm_head"]}, 2, "FSDP2, found lm_head"),
        ({**zero3(**GATHERS), "lora_modules_to_save": ["lm_head"]}, 1, "ZeRO-3, found lm_head"),
        ({"fsdp_version": 2, "lora_modules_to_save": []}, 2, None),
        (fsdp2("SHARDED_STATE_DICT"), 2, None),
        ({"fsdp_version": 2, "fsdp_config": {"activation_checkpointing": True}}, 2, "names that"),
        ({**fsdp2("FULL_STATE_DICT"), "save_strategy": "no"}, 2, None),
        (fsdp2("FULL_STATE_DICT"), 2, "SHARDED_STATE_DICT, found FULL_STATE_DICT.*half"),
    ],
)
def test_what_would_not_be_saved_is_refused_at_the_start(cfg, ranks, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    if message is None:
        check_adapter_saves(DictDefault(cfg))
        return
    with pytest.raises(LoRAMError, match=message):
        check_adapter_saves(DictDefault(cfg))


def checkpoint(folder, step, state=True, **record):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (path / "loram.json").write_text(json.dumps(record))
    return path


def test_half_a_checkpoint_is_not_gone_on_from(tmp_path):
    folder = tmp_path / "out/pruned"
    whole = [checkpoint(folder, 2), checkpoint(folder, 10)]
    checkpoint(folder, 12, state=False)
    (checkpoint(folder, 14) / "trainer_state.json").write_text('{"global_s')
    (checkpoint(folder, 16) / "trainer_state.json").write_text("")
    (checkpoint(folder, 18) / "adapter_model.safetensors").write_bytes(b"\x10half")
    checkpoint(folder, 20).rename(folder / "checkpoint-22")
    checkpoint(folder, 24).rename(folder / "checkpoint-24-old")
    assert sorted(whole_checkpoints(folder)) == sorted(whole)
    cfg = DictDefault({"auto_resume_from_checkpoints": True})
    choose_checkpoint(cfg, folder, "plan", "sha256:1")
    assert cfg.resume_from_checkpoint == str(folder / "checkpoint-10")
    assert cfg.auto_resume_from_checkpoints is False  # Axolotl would take checkpoint-22


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (12, "found .*checkpoint-12 without trainer_state.json"),
        (14, "with half of trainer_state.json"),
        (16, "checkpoint-16 of another"),
    ],
)
def test_a_checkpoint_that_is_named_is_looked_at(step, message, tmp_path):
    checkpoint(tmp_path, 12, state=False)
    (checkpoint(tmp_path, 14) / "trainer_state.json").write_text("{")
    checkpoint(tmp_path, 16, plan="sha256:2")
    cfg = DictDefault({"resume_from_checkpoint": str(tmp_path / f"checkpoint-{step}")})
    with pytest.raises(LoRAMError, match=message):
        choose_checkpoint(cfg, tmp_path, "plan", "sha256:1")
