"""Runs on sparse models: the mask in the plugin, and through Axolotl."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from axolotl.utils.dict import DictDefault
from conftest import run_command, write_yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_masked import GATE, UP, adapted, make_sparse, masks_of, sparse, update_of  # noqa: F401  (sparse is a fixture)
from test_recover import TOKENS
from transformers import AutoModelForCausalLM

from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMArgs, LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.plugin import LoRAMPlugin, confine_update
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.recover import recover
from axolotl_loram.training.run import begin_training


def section(folder, **changes):
    return {"pruned_model_path": str(folder), **changes}


def start(base, folder, output, **changes):
    kernels = {f"lora_{part}_kernel": True for part in ("mlp", "qkv", "o")}
    loram = section(folder, **changes)
    cfg = {"base_model": str(base), "output_dir": str(output), "loram": loram, **kernels}
    cfg = DictDefault(cfg)
    return begin_training(cfg), cfg


@pytest.mark.parametrize(("changes", "confines"), [({}, True), ({"masked": False}, False)])
def test_the_hook_confines_unless_told_not_to(
    changes, confines, sparse, make_model, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "axolotl_loram")
    monkeypatch.setattr(logging.getLogger("axolotl_loram"), "propagate", True)
    plugin = LoRAMPlugin()
    plugin.run, cfg = start(make_model(), sparse, tmp_path / "out", **changes)
    assert plugin.run.masked == confines
    assert cfg.lora_mlp_kernel == cfg.lora_qkv_kernel == cfg.lora_o_kernel == (not confines)
    assert (
        "switching lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel off" in caplog.text
    ) == confines
    model, _ = adapted(sparse)
    layer = model.base_model.model.get_submodule(UP)
    layer.lora_variant.clear()
    plugin.post_trainer_create(cfg, SimpleNamespace(model=model, train_dataset=None))
    assert ("default" in layer.lora_variant) == confines
    assert ("confined the update of 28 layers" in caplog.text) == confines
    plugin.run.write_record(tmp_path)
    assert json.loads((tmp_path / "loram.json").read_text())["masked"] == confines


def test_adapters_beside_are_confined_too(sparse, make_model, tmp_path):
    run, _ = start(make_model(), sparse, tmp_path / "out")
    model, _ = adapted(sparse)
    model.add_adapter("reference", LoraConfig(r=2, target_modules=["up_proj"]))
    confine_update(run, model)
    layers = {path: model.base_model.model.get_submodule(path).lora_variant for path in (UP, GATE)}
    assert set(layers[UP]) == {"default", "reference"} and set(layers[GATE]) == {"default"}


def test_lora_on_embeddings_alone_is_refused(sparse, make_model, tmp_path):
    run, _ = start(make_model(), sparse, tmp_path / "out")
    model, count = adapted(sparse, target_modules=["embed_tokens"])
    assert count == 0
    for unconfined in (model, model.get_base_model()):
        with pytest.raises(LoRAMError, match="lora_target_linear"):
            confine_update(run, unconfined)


@pytest.mark.parametrize("changes", [{"masked": True}, {"recovery": "masked"}])
def test_a_mask_wants_a_sparse_model(changes, make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    with pytest.raises(LoRAMError, match="lost whole units"):
        start(make_model(), tmp_path / "pruned", tmp_path / "out", **changes)
    with pytest.raises(ValueError, match="`sparsity` in pruning"):
        LoRAMArgs(loram={"pruning": {"ratio": 0.5}, **changes})
    LoRAMConfig(pruning={"method": "magnitude", "sparsity": 0.5}, **changes)


def test_masked_recovery_wants_masked_training(sparse, make_model, tmp_path):
    with pytest.raises(ValueError, match="expected `recovery: plain`"):
        LoRAMConfig(**section("somewhere", masked=False, recovery="masked"))
    run, _ = start(make_model(), sparse, tmp_path / "out", masked=False)
    model, _ = adapted(sparse)
    model.save_pretrained(tmp_path / "adapter")
    run.write_record(tmp_path / "adapter")
    with pytest.raises(LoRAMError, match="trained without"):
        merge_masked(tmp_path / "adapter")
    assert not recover(tmp_path / "adapter")["masked"]


def test_merge_lora_does_not_replace_the_masked_model():
    cfg = {"adapter": "lora", "merge_lora": True, "output_dir": "out"}
    cfg["loram"] = section("somewhere", recovery="masked")
    with pytest.raises(LoRAMError, match="merged model already"):
        LoRAMPlugin().register(DictDefault(cfg))


def test_a_full_size_adapter_is_a_warm_start_as_it_is(sparse, make_model, tmp_path):
    model, _ = adapted(make_model_as_sparse(make_model, tmp_path))
    model.save_pretrained(tmp_path / "full")
    cfg = DictDefault(
        {
            "base_model": str(make_model()),
            "output_dir": str(tmp_path / "out"),
            "loram": section(sparse),
            "lora_model_dir": str(tmp_path / "full"),
        }
    )
    begin_training(cfg)
    before, after = (
        load_file(Path(folder) / "adapter_model.safetensors")
        for folder in (tmp_path / "full", cfg.lora_model_dir)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def make_model_as_sparse(make_model, tmp_path):
    return make_sparse(make_model(), tmp_path / "other", seed=5)


@pytest.mark.slow
def test_training_on_a_sparse_model(sparse, make_model, settings, tmp_path):
    """Confined by default; the fused kernels, which would go around it, are switched off."""
    base, output = make_model(), tmp_path / "out"
    changes = {f"lora_{part}_kernel": True for part in ("mlp", "qkv", "o")}
    changes |= {"loram": section(sparse, recovery="masked"), "gradient_checkpointing": True}
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(base, **changes))
    log = run_command("axolotl", "train", yaml_file, "--launcher", "python")
    said = log.stdout + log.stderr
    assert "confined the update of 28 layers" in said and "_kernel off" in said
    for folder in (output, output / "pruned"):
        assert json.loads((folder / "loram.json").read_text())["masked"]
    trained, recovered = (
        load_file(folder / "adapter_model.safetensors") for folder in (output / "pruned", output)
    )
    assert len(trained) == 56 and trained.keys() == recovered.keys()
    assert all(torch.equal(recovered[name], trained[name]) for name in trained)
    original = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
    for module, mask in masks_of(sparse).items():
        before, after = (m.get_submodule(module).weight.detach() for m in (original, merged))
        update = update_of(plain, module)
        assert np.allclose((after - before)[mask], update[mask], atol=1e-6)
        assert torch.equal(after[~mask], before[~mask]) and update[~mask].any()
    with torch.no_grad():
        assert not torch.allclose(merged(TOKENS).logits, original(TOKENS).logits, atol=0.01)
        assert not torch.allclose(plain(TOKENS).logits, merged(TOKENS).logits, atol=1e-4)
