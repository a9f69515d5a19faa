"""Anchored training on two ranks, under each kind of sharding, gives the adapter of one."""

import pytest
import torch
from safetensors.torch import load_file
from test_saves import Runs, lora_settings, sharding  # noqa: F401  (a fixture)

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("removed", ["units", "layers"])
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_ranks_train_as_one(kind, removed, lora_settings, tmp_path):
    layers = {"pruning": {"units": "layers", "ratio": 0.5}}
    loram = layers if removed == "layers" else lora_settings["loram"]
    loram = {**loram, "anchor": "base", "cache_dir": str(tmp_path / "cache")}
    common = {**lora_settings, "loram": loram}
    adapters = []
    for name, launcher, own in (
        ("one", ("python",), {"micro_batch_size": 4}),
        ("two", ("torchrun", "--", "--nproc_per_node", "2"), {"micro_batch_size": 2}),
    ):
        sharded = sharding(kind, tmp_path) if name == "two" else {}
        output = tmp_path / name
        runs = Runs(tmp_path / f"run-{name}", {**common, **own, **sharded})
        runs.finish(*launcher, output_dir=str(output))
        adapters.append(load_file(output / "adapter_model.safetensors"))
    one, two = adapters
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-4, rtol=2e-3)
    assert any(weight.abs().max() > 1e-3 for name, weight in one.items() if "lora_B" in name)
