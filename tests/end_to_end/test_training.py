"""The stories, each through Axolotl's own commands as a user types them."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import RANKS, run_command, start_command, write_yaml, zero_on_cpus
from peft import PeftModel
from safetensors.torch import load_file
from test_recover import train_on
from test_supply import SECRET, SECRETS, assert_no_secret
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results.artefacts import read
from axolotl_loram.results.report import build

pytestmark = pytest.mark.slow
TOKENS = torch.arange(3, 60)[None]


def train(yaml_file, *arguments, **options):
    return run_command("axolotl", "train", yaml_file, "--launcher", "python", *arguments, **options)


def adapter_weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def logits_of(base, adapter=None):
    """In float64: what float32 rounds off differs by CPU, and grows with depth."""
    how = {"dtype": torch.float64, "experts_implementation": "eager"}  # grouped_mm has no float64
    model = AutoModelForCausalLM.from_pretrained(base, **how)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_same(first, second):
    """Equal to 1e-5 of the largest value, in float32."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5 * float(second.abs().max()))


@pytest.fixture
def pruned(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned-model", PruningArgs(ratio=0.5))
    return tmp_path / "pruned-model"


def check_output(output, base):
    """output_dir is an ordinary adapter for the base, with nothing of the pruned model beside."""
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert str(base) in (output / "README.md").read_text()
    assert not (output / "config.json").exists()
    record = json.loads((output / "loram.json").read_text())
    assert record["kind"] == "recovered-adapter"
    memory = record["trained"]["memory"]
    assert memory["predicted"]["peak_bytes"] > memory["predicted"]["weights_device_bytes"] > 0
    assert memory["measured"]["device"] and len(memory["measured"]) > 1
    check_report(output, record)
    for name, weight in adapter_weights(output / "pruned").items():
        full = adapter_weights(output)[name]
        if "fill" in record:  # a fit adds rows of B to what was trained
            assert torch.isin(weight[weight != 0], full).all()
        else:
            assert torch.equal(full[full != 0].sort()[0], weight[weight != 0].sort()[0])
    assert not torch.allclose(logits_of(base), logits_of(base, output), atol=0.01)


def check_report(output, record):
    """The record has what `report` draws: the curve, all four methods' memory, the kept widths."""
    losses = [entry["loss"] for entry in record["trained"]["history"] if "loss" in entry]
    [loram] = read([output])
    assert loram.kind == "loram" and [loss for _, loss in loram.curve("loss")] == losses != []
    shown = {chart.name: chart for chart in build([output]).charts}
    assert [bar.label for bar in shown[f"memory-{output.name}"].bars] == [
        "LoRA",
        "QLoRA",
        "LoRAM",
        "QLoRAM",
    ]
    plan = PruningPlan.load(Path(record["trained"]["pruned_model"]))
    kinds = {kind for counts in plan.counts.values() for kind in counts}
    assert len(shown[f"widths-{output.name}"].strips) == len(kinds) > 0


def check_inference_and_evaluate(yaml_file, output):
    """Both load the original base with the recovered adapter."""
    launch = ("--launcher", "python")
    said = run_command("axolotl", "inference", yaml_file, *launch, input="def loads(s):\n")
    assert f"using the recovered adapter in {output}" in said.stdout + said.stderr
    assert "def loads(s):" in said.stdout
    said = run_command("axolotl", "evaluate", yaml_file, *launch)
    assert f"using the recovered adapter in {output}" in said.stdout + said.stderr
    assert "validation" in (output / "eval_summary.csv").read_text()


def test_lora_from_preprocess_to_merge(pruned, make_model, settings, tmp_path):
    """preprocess, train, merge-lora by both methods, inference, evaluate: one YAML."""
    base, output = make_model(), tmp_path / "out"
    options = {
        "loram": {"pruned_model_path": str(pruned)},
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "gradient_checkpointing": True,
        "peft_use_rslora": True,
        "lora_modules_to_save": ["lm_head"],
    }
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(base, **options))
    run_command("axolotl", "preprocess", yaml_file)
    prepared = sorted((tmp_path / "prepared").iterdir())
    log = train(yaml_file)
    assert sorted((tmp_path / "prepared").iterdir()) == prepared  # the same data set was used
    assert "training on the pruned model" in log.stdout + log.stderr
    narrow = adapter_weights(output / "pruned")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    assert narrow[name].shape == (24, 4) and adapter_weights(output)[name].shape == (48, 4)
    assert "base_model.model.lm_head.weight" in narrow
    check_output(output, base)

    expected = logits_of(base, output)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), output
    )
    assert_same(loaded.merge_and_unload().eval()(TOKENS).logits.detach(), expected)
    for method in ("memory_efficient", "legacy"):
        run_command("axolotl", "merge-lora", yaml_file, "--merge-method", method)
        assert_same(logits_of(output / "merged"), expected)

    yaml_file = write_yaml(yaml_file, settings(base, loram=options["loram"], sample_packing=False))
    check_inference_and_evaluate(yaml_file, output)


def test_qlora_prunes_into_the_cache_and_merges_unquantized_weights(
    make_model, settings, tmp_path, monkeypatch
):
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    base, output = make_model(), tmp_path / "out"
    section = {
        "pruning": {
            "method": "taylor",
            "ratio": 0.5,
            "calibration_samples": 16,
            "calibration_length": 32,
        },
        "cache_dir": str(tmp_path / "cache"),
        "fill": "fitted",
    }
    # `axolotl inference` casts the model to its dtype; in float32 that would break 4-bit weights
    # which are stored as bfloat16, Axolotl's default.
    storage = {"bnb_4bit_quant_storage": "uint8"}
    changes = {"loram": section, "adapter": "qloram", "load_in_4bit": True}
    changes["bnb_config_kwargs"] = storage
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(base, **changes))
    log = train(yaml_file)
    assert "pruning" in log.stderr
    (cached,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    record = json.loads((cached / "loram.json").read_text())
    assert record["calibration"]["source"] == "the run's datasets"
    assert record["calibration"]["tokens"] == 16 * 32 and len(record["refit"]) == 4
    assert PruningPlan.load(cached).counts == {
        layer: {"neurons": 24, "kv_groups": 1} for layer in (1, 2)
    }
    check_output(output, base)
    assert_no_secret(tmp_path)
    assert SECRET not in log.stdout + log.stderr
    filled = json.loads((output / "loram.json").read_text())["fill"]
    assert filled["method"] == "fitted" and filled["calibration"]["source"] == "the run's datasets"
    assert set(filled["layers"]) == {"model.layers.1", "model.layers.2"}
    run_command("axolotl", "merge-lora", yaml_file)
    assert_same(logits_of(output / "merged"), logits_of(base, output))
    check_inference_and_evaluate(yaml_file, output)


def test_qloram_from_a_checkpoint_in_4_bits(make_model, settings, tmp_path):
    """What a user downloads; with LoRA on the packed lm_head, and the embedding on the CPU."""
    base, output = make_model(), tmp_path / "out"
    prune(str(base), tmp_path / "packed", PruningArgs(ratio=0.5, quantize="nf4"))
    changes = {
        "loram": {"pruned_model_path": str(tmp_path / "packed")},
        "adapter": "qloram",
        "load_in_4bit": True,
        "lora_target_modules": ["lm_head"],
        "gradient_checkpointing": True,
    }
    log = train(write_yaml(tmp_path / "loram.yml", settings(base, **changes)))
    assert "lm_head in nf4, embedding in cpu: 0.000 GiB" in log.stdout + log.stderr
    assert "base_model.model.lm_head.lora_A.weight" in adapter_weights(output)
    assert all("lora_" in name for name in adapter_weights(output / "pruned"))
    check_output(output, base)


def test_a_killed_run_is_recovered_from_a_checkpoint_and_resumes(
    pruned, make_model, settings, tmp_path
):
    base = make_model()
    train_on(base, tmp_path / "start")  # Axolotl does not seed LoRA's A, so both runs get one
    changes = {
        "loram": {"pruned_model_path": str(pruned)},
        "lora_model_dir": str(tmp_path / "start"),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "auto_resume_from_checkpoints": True,
    }
    whole = {**settings(base, **changes), "output_dir": str(tmp_path / "whole")}
    train(write_yaml(tmp_path / "whole.yml", whole))

    yaml_file = write_yaml(tmp_path / "loram.yml", settings(base, **changes))
    command = ("axolotl", "train", yaml_file, "--launcher", "python")
    process = start_command(*command, log=tmp_path / "log")
    checkpoint = tmp_path / "out/pruned/checkpoint-4"
    deadline = time.monotonic() + 300
    while not (checkpoint / "loram.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)  # as a machine that is taken away does; it gives no time
    process.wait(timeout=30)
    assert not (tmp_path / "out/adapter_config.json").exists()

    record = recover(checkpoint)
    assert record["plan"] == PruningPlan.load(pruned).digest
    assert record["trained"]["steps"] == {"done": 4, "planned": 6}
    assert not torch.allclose(logits_of(base), logits_of(base, record["output"]), atol=0.01)

    (tmp_path / "out/pruned/checkpoint-6").exists() and pytest.skip("the kill came too late")
    half = tmp_path / "out/pruned/checkpoint-5"  # one that was not whole when the kill came
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    log = train(yaml_file)
    assert f"resuming from {checkpoint}" in log.stdout + log.stderr
    resumed, uninterrupted = adapter_weights(tmp_path / "out"), adapter_weights(tmp_path / "whole")
    for name, weight in uninterrupted.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_leaves_an_adapter_to_recover(pruned, make_model, settings, tmp_path):
    changes = {
        "loram": {"pruned_model_path": str(pruned)},
        "max_steps": 100_000,
        "num_epochs": 9999,
    }
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(make_model(), **changes))
    log = tmp_path / "log"
    log.touch()
    process = start_command("axolotl", "train", yaml_file, "--launcher", "python", log=log)
    deadline = time.monotonic() + 300
    while "'loss'" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 0
    assert not (tmp_path / "out/adapter_config.json").exists()
    record = recover(tmp_path / "out/pruned")
    steps = record["trained"]["steps"]
    assert 0 < steps["done"] < steps["planned"] == changes["max_steps"]
    said = (Path(record["output"]) / "README.md").read_text()
    assert f"Saved after {steps['done']} of the {steps['planned']} steps" in said
    assert not torch.allclose(
        logits_of(make_model()), logits_of(make_model(), record["output"]), atol=0.001
    )


def test_a_full_size_adapter_is_a_warm_start(pruned, make_model, settings, tmp_path):
    """Training goes on from where the adapter was, and the other commands use the result."""
    base = make_model()
    plain = {**settings(base), "plugins": [], "output_dir": str(tmp_path / "start")}
    train(write_yaml(tmp_path / "plain.yml", plain))
    changes = {
        "loram": {"pruned_model_path": str(pruned)},
        "lora_model_dir": str(tmp_path / "start"),
        "learning_rate": 1e-9,
    }
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(base, **changes))
    train(yaml_file)
    start, end = adapter_weights(tmp_path / "start"), adapter_weights(tmp_path / "out")
    for name, weight in end.items():
        kept = weight != 0
        torch.testing.assert_close(weight[kept], start[name][kept], rtol=0, atol=1e-6)
        assert kept.float().mean() > 0.3
    log = run_command("axolotl", "merge-lora", yaml_file)
    assert f"using the recovered adapter in {tmp_path / 'out'}" in log.stdout + log.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relora": True}, "expected no `relora`"),
        ({"loram": {"prunned_model_path": "x"}}, "unknown key 'prunned_model_path'"),
        ({"base_model": "other"}, "another model, such as a fine-tuned one"),
    ],
)
def test_refusals_reach_the_user_before_training(
    changes, message, pruned, make_model, settings, tmp_path
):
    if "base_model" in changes:
        changes = {"base_model": str(make_model(seed=1))}
    yaml_file = write_yaml(
        tmp_path / "loram.yml",
        {**settings(make_model(), loram={"pruned_model_path": str(pruned)}), **changes},
    )
    result = train(yaml_file, check=False)
    assert result.returncode and message in result.stdout + result.stderr
    assert not (tmp_path / "out/pruned").exists()


def test_two_ranks_under_zero_3_leave_one_complete_adapter(pruned, make_model, settings, tmp_path):
    changes = {
        "loram": {"pruned_model_path": str(pruned)},
        "deepspeed": str(zero_on_cpus(tmp_path)),
    }
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(make_model(), **changes))
    ranks = ("--launcher", "torchrun", "--", "--nproc_per_node", "2")
    log = run_command("axolotl", "train", yaml_file, *ranks, variables=RANKS)
    assert "world_size" in log.stdout + log.stderr
    check_output(tmp_path / "out", make_model())
