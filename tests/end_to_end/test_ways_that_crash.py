"""Gradient checkpointing on two ranks under each kind of sharding, reentrant and not.

Without the mends in `training/sharding`, ZeRO-3 ends in a CheckpointError where it is not
reentrant, and FSDP2's own checkpointing in an adapter that PEFT cannot load.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_saves import (  # noqa: F401  (fixtures)
    FSDP2,
    STEPS,
    Runs,
    check_adapter,
    lora_settings,
    sharding,
    tensors,
    undisturbed,
)
from test_training_faults import PREFERENCES

pytestmark = pytest.mark.matrix
TWO = ("torchrun", "--", "--nproc_per_node", "2")
NO_SAVES = {"save_strategy": "no", "save_steps": None, "auto_resume_from_checkpoints": False}
WAYS = {
    "by default": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "not reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "by FSDP": {"fsdp_config": {**FSDP2["fsdp_config"], "activation_checkpointing": True}},
}


@pytest.fixture
def two_ranks(lora_settings, tmp_path):
    """Starts a run of two ranks under one kind of sharding, to its end."""

    def run(kind, way, **changes):
        common = {**lora_settings, "micro_batch_size": 2, **NO_SAVES, **sharding(kind, tmp_path)}
        runs = Runs(tmp_path / "run", {**common, **WAYS[way], **changes})
        code = runs.start(*TWO, output_dir=str(tmp_path / "out")).wait(timeout=800)
        return code, runs.log, tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(
            (kind, way)
            for kind in ("ddp", "zero2", "fsdp2")
            for way in ("reentrant", "not reentrant")
        ),
        *(("zero3", way) for way in ("by default", "reentrant")),
    ],
)
def test_two_ranks_that_recompute_train_as_one_that_does_not(
    kind,
    way,
    two_ranks,
    undisturbed,
    tmp_path,
):
    code, log, output = two_ranks(kind, way)
    assert code == 0, log[-6000:]
    check_adapter(output, undisturbed(False), False, tmp_path / "again")


@pytest.mark.parametrize(
    ("kind", "way", "said"),
    [
        ("zero3", "not reentrant", "expected gradient_checkpointing_kwargs: use_reentrant: true"),
        ("fsdp2", "by FSDP", "expected no activation_checkpointing in fsdp_config, found it"),
    ],
)
def test_ways_that_fail_are_refused_before_the_first_step(kind, way, said, two_ranks):
    """In the first backward pass, or, an hour later, when the adapter is saved."""
    code, log, output = two_ranks(kind, way)
    assert code and said in log, log[-6000:]
    assert "'loss'" not in log and not (output / "pruned/adapter_config.json").exists()


@pytest.mark.parametrize("rl", ["simpo", "dpo"])
def test_preferences_are_recomputed_reentrantly_too(rl, two_ranks, tmp_path):
    """Where the YAML says nothing, Axolotl takes the way that fails; for DPO, TRL mends that."""
    said = {"prompt": "def f():", "chosen": "    return 1", "rejected": "    return 2"}
    (tmp_path / "dpo.jsonl").write_text(f"{json.dumps(said)}\n" * 40)
    data = {**PREFERENCES["datasets"][0], "path": str(tmp_path / "dpo.jsonl")}
    prepared = {"dataset_prepared_path": str(tmp_path / "prepared")}
    own = {"rl_beta": 2.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5} if rl == "simpo" else {}
    changes = {"rl": rl, "datasets": [data], "max_steps": 2, **prepared, **own}
    code, log, output = two_ranks("zero3", "by default", **changes)
    assert code == 0, log[-6000:]
    assert any(w.any() for name, w in tensors(output).items() if "lora_B" in name)


def test_alignment_may_be_either(lora_settings, tmp_path):
    """All weights of the layers are trained, and those are saved detached."""
    ours = {name: value for name, value in lora_settings.items() if not name.startswith("lora_")}
    ours |= {"base_model": ours["loram"]["pruned_model_path"], "loram": {"stage": "align"}}
    ours |= {"learning_rate": 0.001, "adapter": None, **NO_SAVES}
    found = {}
    for name, launcher, own in (
        ("one", ("python",), {"micro_batch_size": 4}),
        ("two", TWO, {"micro_batch_size": 2, **sharding("zero3", tmp_path)}),
    ):
        own |= WAYS["not reentrant"] if name == "two" else {}
        output = tmp_path / name
        Runs(tmp_path / f"run-{name}", {**ours, **own}).finish(*launcher, output_dir=str(output))
        assert json.loads((output / "loram.json").read_text())["alignments"][0]["steps"] == STEPS
        found[name] = load_file(output / "model.safetensors")
    for name, weight in found["one"].items():
        torch.testing.assert_close(found["two"][name], weight, rtol=1e-4, atol=1e-4)
