"""Anchored training on two ranks, under each kind of sharding, gives the adapter of one."""

import pytest
import torch
from safetensors.torch import load_file
from test_saves import Runs, lora_settings, sharding  # noqa: F401  (a fixture)

pytestmark = pytest.mark.matrix


KINDS = [(kind, "units") for kind in ("ddp", "zero2", "zero3", "fsdp2")]
KINDS += [(kind, "layers") for kind in ("ddp", "zero2", "fsdp2")]


@pytest.mark.parametrize(("kind", "removed"), KINDS)
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


def test_under_zero3_no_layers_are_removed(lora_settings, tmp_path):
    loram = {"pruning": {"units": "layers", "ratio": 0.5}, "anchor": "base"}
    loram["cache_dir"] = str(tmp_path / "cache")
    runs = Runs(tmp_path / "run", {**lora_settings, "loram": loram, **sharding("zero3", tmp_path)})
    with pytest.raises(AssertionError, match="expected ZeRO-2, FSDP2 or DDP with a model whose"):
        runs.finish("torchrun", "--", "--nproc_per_node", "2", output_dir=str(tmp_path / "out"))
