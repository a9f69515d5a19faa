"""`axolotl train` on families other than Llama: prune, train and recover from one YAML."""

import pytest
from conftest import run_command, write_yaml
from families import TRAINED
from test_training import adapter_weights, check_output

pytestmark = pytest.mark.slow
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CHANGES = {"mixtral": {"lora_target_parameters": EXPERTS, "sample_packing": False}}
SIZES = {"mixtral": {"num_experts": 4}}
B_OF = {
    "phi3": ("self_attn.qkv_proj.lora_B.weight", 32, 64),
    "mixtral": ("mlp.experts.base_layer.lora_B.weight", 96, 96),
}


@pytest.mark.parametrize("family", TRAINED)
def test_axolotl_trains_every_kind_of_family(family, make_model, settings, tmp_path):
    base, output = make_model(family, **SIZES.get(family, {})), tmp_path / "out"
    # What a YAML does by default, calibrating, once; the others quicker.
    how = {"ratio": 0.5} if family == "qwen3" else {"ratio": 0.5, "method": "random"}
    section = {"pruning": how, "cache_dir": str(tmp_path / "cache")}
    changes = {"loram": section, "adapter": "loram", "max_steps": 2, "sample_packing": True}
    changes |= CHANGES.get(family, {})
    file = write_yaml(tmp_path / "loram.yml", settings(base, **changes))
    run_command("axolotl", "train", file, "--launcher", "python")
    check_output(output, base)
    if family in B_OF:
        name, narrow, wide = B_OF[family]
        full = f"base_model.model.model.layers.1.{name}"
        widths = [len(adapter_weights(folder)[full]) for folder in (output / "pruned", output)]
        assert widths == [narrow, wide]
