"""Models as deep as real ones: 32 layers, in a story 80, narrow as the other tests' are.

From ten layers on, transformers numbers the layers otherwise than we do when it saves a config.
Whatever went through its hands must mean the same to us.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from calibrated import text_tokens
from click.testing import CliRunner
from conftest import ATTENTION_KERNELS, run_command, write_yaml
from families import at_depth, pico_config
from safetensors.torch import load_file
from test_families import loaded, outputs, train_everything
from test_nf4 import load_in_4bit, logits_of
from test_recover import train_on
from test_training import adapter_weights, assert_same, check_output, train
from test_training import logits_of as logits_with

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import load_config, own_fields
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.pairing import check_pruned, shapes_of
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.spaces import EXPERTS, LINEAR
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.models.per_layer import check_widths
from axolotl_loram.propose.propose import propose
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results.inspect import failures, verify
from axolotl_loram.text.calibration import Calibration

ROOT = Path(__file__).resolve().parents[2]
RANDOM = PruningArgs(ratio=0.5, method="random")
TEXT = Calibration(text_tokens(samples=4, length=32), "a test", 0)


def saved_again(pruned: Path, folder: Path, family: str = "llama") -> Path:
    """A pruned model with its plan, as transformers saves it."""
    loaded(pruned, family).save_pretrained(folder)
    for file in ("loram.json", "loram_plan.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if (pruned / file).exists():
            shutil.copy(pruned / file, folder)
    return folder


def numbers_in(folder: Path, section: str | None = None) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    return list((config[section] if section else config)["per_layer_config"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_deep_as_it_is_used(family, tmp_path):
    row = FAMILIES[family]
    torch.manual_seed(0)
    auto = getattr(transformers, row.auto_class)
    auto.from_config(pico_config(family, **at_depth(family, 32))).save_pretrained(tmp_path / "base")
    settings = PruningArgs(ratio=0.5, method="random", units=",".join(row.kinds))
    prune(str(tmp_path / "base"), tmp_path / "pruned", settings)
    saved_again(tmp_path / "pruned", tmp_path / "again", family)
    assert numbers_in(tmp_path / "pruned", row.section)[0] == "4"
    assert numbers_in(tmp_path / "again", row.section)[0] == "04"

    plan, models = PruningPlan.load(tmp_path / "pruned"), {}
    for name in ("pruned", "again"):
        config, models[name] = load_config(str(tmp_path / name)), loaded(tmp_path / name, family)
        assert list(own_fields(config)) == list(range(4, 30))
        assert shapes_of(config) == shapes_of(plan.pruned_config)
        assert list(parameters(models[name].config.to_dict())) == list(parameters(config))
        check_widths(models[name])
        check_pruned(tmp_path / name, plan)
    before, after = (outputs(model, family) for model in models.values())
    assert before.std() > 0 and torch.equal(before, after)

    train_everything(models["again"], plan).save_pretrained(tmp_path / "adapter")
    recover(tmp_path / "adapter", str(tmp_path / "again"), tmp_path / "recovered")
    trained, recovered = map(adapter_weights, (tmp_path / "adapter", tmp_path / "recovered"))
    expected = {
        name: values
        for tensor in parameters(plan.config)
        if tensor.layer is not None and tensor.role in (LINEAR, EXPERTS) and not tensor.bias
        for name, values in scattered_by_hand(trained, tensor, plan)
    }
    assert expected.keys() == recovered.keys() == trained.keys()
    assert all(torch.equal(recovered[name], values) for name, values in expected.items())


def scattered_by_hand(trained, tensor, plan):
    """A and B of a weight of the base: what was trained at the kept features, zero elsewhere."""
    module = f"base_model.model.{tensor.module}"
    if tensor.name.endswith("gate_up_proj") and tensor.role == EXPERTS:
        module += ".base_layer"  # PEFT wraps one stack in the other
    if f"{module}.lora_A.weight" not in trained:
        return  # PEFT passes over the dense layers of Qwen3-MoE
    a, b = (trained[f"{module}.lora_{part}.weight"] for part in "AB")
    axes = (1, 2) if tensor.transposed else (len(tensor.shape) - 1, len(tensor.shape) - 2)
    columns, rows = (tensor.shape[axis] for axis in axes)

    def of(a, b, slot=None):
        features = plan.features(tensor.dims, tensor.layer, slot)
        return put(a, columns, features[axes[0]], 1), put(b, rows, features[axes[1]], 0)

    if tensor.role == EXPERTS:  # A expert by expert, B rank by rank
        kept = plan.kept_experts(tensor.layer)
        rank = len(a) // len(kept)
        parts = (
            torch.zeros(tensor.shape[0], rank, columns),
            torch.zeros(rows, rank, tensor.shape[0]),
        )
        for slot, expert in enumerate(kept):
            own = a.view(len(kept), rank, -1)[slot], b.view(-1, rank, len(kept))[:, :, slot]
            parts[0][expert], parts[1][:, :, expert] = of(*own, slot)
        full = parts[0].flatten(0, 1), parts[1].flatten(1)
    else:
        full = of(a, b)
    yield from zip((f"{module}.lora_A.weight", f"{module}.lora_B.weight"), full, strict=True)


def put(values, size, kept, axis):
    kept = torch.arange(size) if kept is None else torch.from_numpy(kept)
    shape = [size if at == axis else length for at, length in enumerate(values.shape)]
    return torch.zeros(shape).index_copy(axis, kept, values)


@pytest.fixture(scope="module")
def deep(make_model, tmp_path_factory):
    """A base of 32 layers, its pruned model, and that as transformers saves it, in a folder."""
    folder = tmp_path_factory.mktemp("32-layers")
    (folder / "base").symlink_to(make_model(num_hidden_layers=32))
    prune(str(folder / "base"), folder / "pruned", RANDOM)
    saved_again(folder / "pruned", folder / "again")
    return folder


def command(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_commands_take_what_transformers_saved(deep, text_file, tmp_path):
    """All but those that hold config.json against the digest that was recorded."""
    folder, zero = deep, ROOT / "deepspeed_configs/zero3.json"
    stage = ("--stage", "align", "--deepspeed", zero)
    text = ("--calibration", text_file, "--calibration-samples", 2, "--calibration-length", 16)
    train_on(folder / "again", tmp_path / "adapter")
    told = []
    for name in ("pruned", "again"):
        model, outcome = folder / name, tmp_path / name
        adapter = ("recover", tmp_path / "adapter", "--pruned-model", model)
        command(*adapter, "--output", outcome / "zeros")
        command(*adapter, "--output", outcome / "fitted", "--fill", "fitted", *text)
        assert failures(verify(outcome / "zeros")) == []
        planned = json.dumps(command("plan", model, *stage)).replace(str(model), "")
        told.append((command("inspect", model)["pruned_layers"], planned))
    assert told[0] == told[1] and told[0][0] == 26
    assert [check.name for check in failures(verify(folder / "again"))] == ["files"]
    for name in ("zeros", "fitted"):
        file = f"{name}/adapter_model.safetensors"
        one, other = (load_file(tmp_path / kind / file) for kind in ("pruned", "again"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "settings",
    [
        PruningArgs(ratio=0.5, method="magnitude"),
        PruningArgs(ratio=0.5, method="taylor"),
        PruningArgs(ratio=0.5, method="fluctuation", allocation="global"),
        PruningArgs(sparsity="2:4", method="wanda"),
    ],
    ids=lambda settings: settings.method,
)
def test_every_way_to_prune(settings, deep, tmp_path):
    record = prune(
        str(deep / "base"),
        tmp_path / "pruned",
        settings,
        calibration=TEXT if settings.resolve().needs_calibration else None,
    )
    assert failures(verify(tmp_path / "pruned")) == []
    plan, model = PruningPlan.load(tmp_path / "pruned"), loaded(tmp_path / "pruned", "llama")
    assert record["plan"] == plan.digest
    if settings.sparsity is None:
        assert sorted(plan.counts) == list(range(4, 30))
        check_pruned(saved_again(tmp_path / "pruned", tmp_path / "again"), plan)
        assert torch.equal(
            outputs(model, "llama"), outputs(loaded(tmp_path / "again", "llama"), "llama")
        )


def test_checkpoints_in_4_bits(deep, tmp_path):
    settings = RANDOM.model_copy(update={"quantize": "nf4"})
    prune(str(deep / "base"), tmp_path / "packed", settings)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32
    )
    expected = load_in_4bit(deep / "again", ["none"])
    torch.testing.assert_close(logits_of(packed), logits_of(expected), rtol=1e-5, atol=1e-5)
    assert failures(verify(tmp_path / "packed")) == []


def test_rows_are_proposed_of_deep_models(deep):
    raw = json.loads((deep / "base/config.json").read_text())
    proposal = propose(raw)
    assert [check.outcome for check in proposal.checks] == ["passed"] * 4
    assert proposal.family.layers == "model.layers"


def of_run(**changes):
    """What the stories change in the settings: as quick as a run can be."""
    return {"max_steps": 4, "gradient_checkpointing": False, **changes}


@pytest.mark.slow
def test_story_of_32_layers(make_model, settings, tmp_path):
    """Prune and train by one YAML, cut off, resume, recover a checkpoint, merge, evaluate."""
    base, output = make_model(num_hidden_layers=32), tmp_path / "out"
    section = {
        "pruning": {"method": "random", "ratio": 0.5},
        "cache_dir": str(tmp_path / "cache"),
        "fill": "fitted",
    }
    saves = {"save_strategy": "steps", "save_steps": 2, "auto_resume_from_checkpoints": True}
    saves |= ATTENTION_KERNELS
    yaml_file = write_yaml(tmp_path / "loram.yml", settings(base, **of_run(loram=section, **saves)))
    train(yaml_file)
    check_output(output, base)
    assert numbers_in(output / "pruned")[0] == "04"  # the trainer's own
    record = recover(output / "pruned/checkpoint-2", output=tmp_path / "half")
    assert record["trained"]["steps"] == {"done": 2, "planned": 4}
    assert failures(verify(tmp_path / "half")) == []

    shutil.rmtree(output / "pruned/checkpoint-4")  # as if it had been cut off before
    for file in output.iterdir():
        file.unlink() if file.is_file() else None
    said = train(yaml_file)
    assert f"resuming from {output / 'pruned/checkpoint-2'}" in said.stdout + said.stderr
    check_output(output, base)
    run_command("axolotl", "merge-lora", yaml_file)
    assert_same(logits_with(output / "merged"), logits_with(base, output))
    (cached,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert sorted(PruningPlan.load(cached).counts) == list(range(4, 30))
    told = run_command("axolotl-loram", "evaluate", yaml_file, "--limit", "4", "--json")
    [text] = json.loads(told.stdout)["perplexity"].values()
    assert set(text["models"]) == {"base", "pruned", "pruned+adapter", "base+recovered"}


@pytest.mark.slow
def test_story_of_80_layers(make_model, settings, tmp_path):
    """QLoRA, on what transformers saved of a pruned model; publish it and the adapter."""
    base, output = make_model(num_hidden_layers=80), tmp_path / "out"
    pruned, again = tmp_path / "pruned-model", tmp_path / "again"
    options = ("--method", "random", "--pruning-ratio", "0.5", "--protect-last", "3")
    run_command("axolotl-loram", "prune", base, pruned, *options)
    saved_again(pruned, again)
    section = {"pruned_model_path": str(again)}
    changes = of_run(loram=section, adapter="qloram", load_in_4bit=True, max_steps=2)
    train(write_yaml(tmp_path / "loram.yml", settings(base, **changes)))
    check_output(output, base)
    assert sorted(PruningPlan.load(again).counts) == list(range(4, 77))
    run_command("axolotl-loram", "recover", output / "pruned", "--output", tmp_path / "recovered")
    trained, recovered = adapter_weights(output), adapter_weights(tmp_path / "recovered")
    assert trained.keys() == recovered.keys()
    assert all(torch.equal(trained[name], values) for name, values in recovered.items())
    for folder in (pruned, output, tmp_path / "recovered"):
        found = run_command("axolotl-loram", "inspect", folder, "--verify", "--json").stdout
        assert {check["outcome"] for check in json.loads(found)["checks"]} == {"ok"}
        card = tmp_path / f"{folder.name}-card"
        options = ("--dry-run", "--base", "some-org/pico", "--output", card)
        run_command("axolotl-loram", "publish", folder, "some-org/pico-loram", *options)
        assert (card / "upload.json").exists()


@pytest.mark.slow
def test_story_of_an_alignment_of_32_layers(deep, settings, tmp_path):
    """Aligned by `axolotl train`, what comes out is a pruned model like the one that went in."""
    pruned, output = deep / "again", tmp_path / "out"
    section = {"stage": "align"}
    changes = of_run(loram=section, adapter=None, base_model=str(pruned), val_set_size=0)
    changes |= {f"lora_{part}": None for part in ("r", "alpha", "target_linear")}
    made = {k: v for k, v in settings(pruned, **changes).items() if v is not None}
    train(write_yaml(tmp_path / "align.yml", made))
    check_pruned(output, PruningPlan.load(pruned))
    assert failures(verify(output)) == []
    before, after = loaded(pruned, "llama"), loaded(output, "llama")
    assert not torch.allclose(outputs(before, "llama"), outputs(after, "llama"), atol=1e-3)
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
