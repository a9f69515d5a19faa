"""What plain PEFT makes of `target_modules="all-linear"` on a pruned mixture, recovered."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.plan import PruningPlan, scatter
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")


def all_linear(pruned, folder):
    """Every tensor at random, on all that PEFT takes for linear; returns the merged model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.mark.parametrize("family", MIXTURES)
def test_it_is_recovered_exactly(family, make_model, tmp_path):
    """The update of the base is the pruned model's, scattered, and nothing elsewhere."""
    base, pruned = make_model(family), tmp_path / "pruned"
    prune(str(base), pruned, PruningArgs(ratio=0.5, method="random", refit=False))
    before = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    after = all_linear(pruned, tmp_path / "adapter")
    recover(tmp_path / "adapter", str(pruned), tmp_path / "recovered")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {name: value.detach().clone() for name, value in whole.named_parameters()}
    merged = PeftModel.from_pretrained(whole, tmp_path / "recovered").merge_and_unload()
    plan, changed = PruningPlan.load(pruned), set()
    for tensor in parameters(plan.config):
        if tensor.name not in weights:  # a buffer, which no LoRA is on
            continue
        narrow = (after.get_parameter(tensor.name) - before.get_parameter(tensor.name)).detach()
        features = plan.features(tensor.dims, tensor.layer)
        expected = scatter(narrow.numpy(), features, tensor.shape)
        found = (merged.get_parameter(tensor.name) - weights[tensor.name]).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=2e-5)
        changed |= {tensor.module.rpartition(".")[2]} if np.abs(found).max() > 0.01 else set()
    of_peft = {"experts", "gate"} if family in ("mixtral", "qwen3_moe") else set()
    assert {"o_proj"} | of_peft <= changed


def test_lora_on_what_no_config_names_is_still_refused(make_model, tmp_path):
    import json

    base, pruned = make_model("mixtral"), tmp_path / "pruned"
    prune(str(base), pruned, PruningArgs(ratio=0.5, method="random", refit=False))
    all_linear(pruned, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_parameters"].remove("gate.weight")
    file.write_text(json.dumps(settings))
    with pytest.raises(LoRAMError, match=r"found it on model\.layers\.0\.mlp\.gate too"):
        recover(tmp_path / "adapter", str(pruned), tmp_path / "recovered")
