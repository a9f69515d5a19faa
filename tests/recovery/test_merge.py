"""Recovery of the masked update of a sparse model: plainly, or merged with its mask."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import run_command
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_masked import UP, adapted, make_sparse, masks_of, sparse, update_of  # noqa: F401  (sparse is a fixture)
from test_recover import PROJECTIONS
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.plan import Base
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models import masked
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.recover import recover


def saved(sparse, folder, **config):
    model, _ = adapted(sparse, **config)
    model.save_pretrained(folder)
    return model


def test_plain_recovery_is_the_adapter_as_it_is(sparse, make_model, tmp_path):
    saved(sparse, tmp_path / "adapter")
    record = recover(tmp_path / "adapter")
    before, after = (
        load_file(Path(folder) / "adapter_model.safetensors")
        for folder in (tmp_path / "adapter", record["output"])
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    original = AutoModelForCausalLM.from_pretrained(make_model())
    PeftModel.from_pretrained(original, record["output"])


@pytest.mark.parametrize("shards", [1, 3])
def test_masked_recovery_is_the_base_with_the_trained_update(shards, make_model, tmp_path):
    """With s as PEFT chooses it for each module; what pruning left whole gets all of its update."""
    base = make_model()
    if shards > 1:
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(make_model()).save_pretrained(
            base, max_shard_size="80KB"
        )
        assert len(Checkpoint(base).shards) >= shards
    sparse = make_sparse(make_model(), tmp_path / "sparse", whole=(UP,))
    config = {
        "target_modules": [*PROJECTIONS, "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.mlp.gate_proj": 3, "k_proj": 5},
    }
    model = saved(sparse, tmp_path / "adapter", **config)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    model.save_pretrained(tmp_path / "adapter")
    with patch.object(masked, "BLOCK_ELEMENTS", 100):
        record = merge_masked(tmp_path / "adapter", output=tmp_path / "out", base=Base(str(base)))
    assert record["masked"] and record["kind"] == "recovered-model"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(base)
    masks = masks_of(sparse)
    for name, weight in original.named_parameters():
        module = name.removesuffix(".weight")
        expected, found = weight.detach(), merged.get_parameter(name).detach()
        if module == "lm_head":
            expected = expected + 1
        elif module == "model.embed_tokens":
            layer = model.base_model.model.get_submodule(module)
            expected = expected + layer.get_delta_weight("default").detach()
            assert not torch.equal(expected, weight)
        elif module in masks or module == UP:
            mask = masks.get(module, torch.ones_like(weight))
            expected = expected + update_of(model, module) * mask
            assert torch.equal(found[mask == 0], weight.detach()[mask == 0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "loram.json"} <= names
    assert ("tokenizer.json" in names) == (shards == 1)
    assert ("model.safetensors.index.json" in names) == (shards > 1)


def test_masked_recovery_rounds_to_the_dtype_of_the_base(make_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_model(), base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    sparse = make_sparse(base, tmp_path / "sparse")
    model = saved(sparse, tmp_path / "adapter")
    merge_masked(tmp_path / "adapter", output=tmp_path / "out")
    merged, original = (load_file(f / "model.safetensors") for f in (tmp_path / "out", base))
    for module, mask in masks_of(sparse).items():
        weight = original[f"{module}.weight"].float() + update_of(model, module) * mask
        torch.testing.assert_close(merged[f"{module}.weight"], weight.bfloat16(), rtol=0, atol=2e-3)
        assert merged[f"{module}.weight"].dtype == torch.bfloat16


def test_masked_recovery_refuses_what_does_not_belong_together(sparse, make_model, tmp_path):
    saved(sparse, tmp_path / "adapter")
    with pytest.raises(LoRAMError, match="fine-tuned"):
        merge_masked(tmp_path / "adapter", base=Base(str(make_model(seed=1))))
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    with pytest.raises(LoRAMError, match="recover it plainly"):
        merge_masked(tmp_path / "adapter", str(tmp_path / "pruned"))
    weights = load_file(sparse / "model.safetensors")
    weights[f"{UP}.weight"].zero_()
    save_file(weights, sparse / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoRAMError, match="changed after pruning"):
        merge_masked(tmp_path / "adapter")
    assert not (tmp_path / "merged-adapter").exists()


def test_lora_on_tied_embeddings_is_recovered_plainly(make_model, tmp_path):
    sparse = make_sparse(make_model(tie_word_embeddings=True), tmp_path / "sparse")
    saved(sparse, tmp_path / "adapter", target_modules=["up_proj", "embed_tokens"])
    with pytest.raises(LoRAMError, match="recover this adapter plainly"):
        merge_masked(tmp_path / "adapter")
    recover(tmp_path / "adapter")


def test_masked_recovery_on_the_command_line(sparse, tmp_path):
    saved(sparse, tmp_path / "adapter")
    command = ("axolotl-loram", "recover", tmp_path / "adapter", "--masked", "--json")
    said = run_command(*command, "--output", tmp_path / "out")
    assert json.loads(said.stdout)["output"] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out/loram.json").read_text())["masked"]
    said = run_command(*command, "--output", tmp_path / "out", check=False)
    assert said.returncode == 1 and "--overwrite" in said.stderr
