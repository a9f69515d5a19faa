"""`axolotl train` on families other than Llama: prune, train and recover from one YAML."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import run_command, write_yaml
from families import TRAINED
from test_training import adapter_weights, check_output

pytestmark = pytest.mark.slow
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CHANGES = {"mixtral": {"lora_target_parameters": EXPERTS, "sample_packing": False}}
B_OF = {
    "phi3": ("self_attn.qkv_proj.lora_B.weight", 32, 64),
    "mixtral": ("mlp.experts.base_layer.lora_B.weight", 96, 96),
}


def test_axolotl_trains_every_kind_of_family(make_model, settings, tmp_path):
    """Two at a time, on one core each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def train(family):
        base = make_model(family, **({"num_experts": 4} if family == "mixtral" else {}))
        # What a YAML does by default, calibrating, once; the others quicker.
        how = {"ratio": 0.5} if family == "qwen3" else {"ratio": 0.5, "method": "random"}
        section = {"pruning": how, "cache_dir": str(tmp_path / "cache" / family)}
        changes = {"loram": section, "adapter": "loram", "output_dir": str(tmp_path / family)}
        changes |= {"max_steps": 2, "sample_packing": True, **CHANGES.get(family, {})}
        file = write_yaml(tmp_path / f"{family}.yml", settings(base, **changes))
        run_command("axolotl", "train", file, "--launcher", "python", env=environment)
        return base

    for family in TRAINED:  # models are made here: torch's seed is not shared between threads
        make_model(family, **({"num_experts": 4} if family == "mixtral" else {}))
    with ThreadPoolExecutor(2) as pool:
        bases = dict(zip(TRAINED, pool.map(train, TRAINED), strict=True))
    for family, base in bases.items():
        check_output(tmp_path / family, base)
    for family, (name, narrow, wide) in B_OF.items():
        full = f"base_model.model.model.layers.1.{name}"
        widths = [len(adapter_weights(tmp_path / family / part)[full]) for part in ("pruned", "")]
        assert widths == [narrow, wide], family
