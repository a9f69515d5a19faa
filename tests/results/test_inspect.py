import hashlib
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import build_model, byte_tokenizer, pico_config
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from test_recover import linear_shapes, write_adapter

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results.inspect import failures, verify

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(make_model, tmp_path_factory):
    """A pruned model, and the adapters of it: as trained, and recovered."""
    folder = tmp_path_factory.mktemp("verify")
    prune(str(make_model()), folder / "pruned", PruningArgs(ratio=0.5))
    plan = PruningPlan.load(folder / "pruned")
    shapes = linear_shapes(plan.pruned_config)
    named = {"target_modules": sorted({module.split(".")[-1] for module in shapes})}
    write_adapter(folder / "trained", shapes, 2, torch.bfloat16, str(folder / "pruned"), **named)
    shutil.copy(folder / "pruned/tokenizer.json", folder / "trained")
    training = {"pruned_model": str(folder / "pruned")}
    record = {"kind": "trained-adapter", "base": vars(plan.base), "plan": plan.digest}
    (folder / "trained/loram.json").write_text(json.dumps(record | {"training": training}))
    recover(folder / "trained", output=folder / "recovered")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of one of them, to damage."""

    def copied(kind):
        shutil.copytree(made / kind, tmp_path / kind)
        return tmp_path / kind

    return copied


def edit(file, **changes):
    record = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = record
        for name in parents:
            part = part[name]
        part[last] = value
    file.write_text(json.dumps(record))


def flip(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def failed(folder, **options):
    return {check.name: check.detail for check in failures(verify(folder, **options))}


def outcomes(folder, **options):
    return {check.name: check.outcome for check in verify(folder, **options)}


def test_whole_folders_pass_every_check(made):
    names = {"files", "strays", "weights", "plan", "config", "counts", "base", "tokenizer"}
    assert outcomes(made / "pruned") == dict.fromkeys(names, "ok")
    names = {"strays", "tensors", "trained under", "shapes", "modules", "tokenizer"}
    assert outcomes(made / "trained") == dict.fromkeys(names, "ok")
    names |= {"files", "settings", "base"}
    assert outcomes(made / "recovered") == dict.fromkeys(names, "ok")


def other_plan(folder):
    plan = PruningPlan.load(folder)
    kept = {name: units[::-1].copy() for name, units in plan.kept.items()}
    for name, units in plan.kept.items():
        whole = np.arange(48 if "mlp" in name else 2, dtype=np.int32)
        kept[name] = np.setdiff1d(whole, units).astype(np.int32)
    PruningPlan(plan.config, kept, plan.base).save(folder)


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def outside(folder):
    edit(folder / "loram.json", files={"../secret": "0" * 64})


DAMAGES = {
    "a flipped bit": (lambda f: flip(f / WEIGHTS), {"files", "weights"}, "damaged"),
    "a cut file": (truncate, {"files", "weights", "counts"}, "truncated"),
    "a missing file": (
        lambda f: (f / "tokenizer.json").unlink(),
        {"files", "tokenizer"},
        "tokenizer.json is m",
    ),
    "a second shard": (
        lambda f: shutil.copy(f / WEIGHTS, f / "model-2.safetensors"),
        {"strays"},
        "model-2",
    ),
    "a pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), {"strays"}, "remove it"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), {"strays"}, "adapter_c"),
    "code": (lambda f: (f / "modeling.py").write_text("1"), {"strays"}, "modeling.py"),
    "another plan": (other_plan, {"files", "plan"}, "two prunings"),
    "another width": (
        lambda f: edit(f / "config.json", per_layer_config__1__intermediate_size=16),
        {"files", "config"},
        "layers.1.mlp",
    ),
    "another size": (lambda f: edit(f / "loram.json", weight_bytes=7), {"counts"}, "recorded is 7"),
    "another base": (
        lambda f: edit(f / "loram.json", base__fingerprint="sha256:1"),
        {"plan"},
        "fingerprint",
    ),
    "a file outside": (outside, {"files", "strays"}, "outside of the folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_fails_its_own_checks(damage, copy):
    folder = copy("pruned")
    harm, names, message = DAMAGES[damage]
    harm(folder)
    found = failed(folder)
    assert set(found) == names
    assert any(message in detail for detail in found.values())


def test_all_failures_are_named_and_the_command_fails(copy):
    folder = copy("pruned")
    flip(folder / WEIGHTS)
    (folder / "tokenizer.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    result = CliRunner().invoke(main, ["inspect", str(folder), "--verify", "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["kind"], told["failed"]) == ("pruned-model", 5)
    bad = [check for check in told["checks"] if check["outcome"] == "failed"]
    assert [check["name"] for check in bad] == ["files", "files", "strays", "weights", "tokenizer"]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    for part in ("5 failed", WEIGHTS, "tokenizer.json is missing", "pytorch_model.bin"):
        assert part in line
    shown = CliRunner().invoke(main, ["inspect", str(folder), "--verify"])
    assert shown.stdout.count("\nfailed ") == 5 and shown.exit_code == 1


def test_the_base_is_checked_where_it_is_on_this_machine(copy, make_model, tmp_path):
    folder = copy("pruned")
    assert "fine-tuned" in failed(folder, base=str(make_model(seed=1)))["base"]
    moved = {"id": str(tmp_path / "away"), "revision": None}
    fingerprint = PruningPlan.load(folder).base.fingerprint
    edit(folder / "loram.json", base=moved | {"fingerprint": fingerprint})
    assert outcomes(folder)["base"] == "not checked"
    assert outcomes(folder, base=str(make_model()))["base"] == "ok"


def test_moved_zeros_of_a_sparse_model_are_found(make_model, tmp_path):
    folder = tmp_path / "sparse"
    prune(str(make_model()), folder, PruningArgs(method="magnitude", sparsity=0.5))
    assert outcomes(folder)["masks"] == "ok"
    weights = load_file(folder / WEIGHTS)
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    weight[weight == 0] = 1e-3
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    record = json.loads((folder / "loram.json").read_text())
    edit(folder / "loram.json", files=record["files"] | {WEIGHTS: digest})
    assert set(failed(folder)) == {"masks", "weights"}


def change(folder, harm):
    weights = load_file(folder / ADAPTER)
    harm(weights)
    save_file(weights, folder / ADAPTER, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda w: w[f"{MODULE}.lora_B.weight"].zero_(), "all zero"),
        (lambda w: w[f"{MODULE}.lora_B.weight"].mul_(-0.0), "all zero"),
        (lambda w: w.pop(f"{MODULE}.lora_B.weight"), "without its partner"),
        (lambda w: w.update({f"{MODULE}.lora_A.weight": torch.empty(0)}), "empty"),
        (lambda w: w[f"{MODULE}.lora_A.weight"][0].fill_(torch.inf), "diverged"),
        (lambda w: w[f"{MODULE}.lora_A.weight"][1, 1:2].fill_(torch.nan), "diverged"),
        (lambda w: w.clear() or w.update({"base_model.model.x": torch.ones(1)}), "no LoRA"),
    ],
)
def test_unusable_adapters_are_found(harm, message, copy):
    folder = copy("trained")
    change(folder, harm)
    assert message in failed(folder)["tensors"]


def test_adapters_of_another_model_are_found(copy, make_model, tmp_path):
    wide = make_model(intermediate_size=56)
    assert "another base" in failed(copy("recovered"), base=str(wide))["shapes"]
    recovered = tmp_path / "recovered"
    edit(recovered / "adapter_config.json", base_model_name_or_path="some-org/other")
    assert set(failed(recovered)) == {"files", "settings"}
    edit(recovered / "loram.json", plan="sha256:1", base__id="some-org/other")
    assert set(failed(recovered)) == {"files", "trained under"}
    assert outcomes(recovered)["shapes"] == "not checked"
    (recovered / "config.json").write_text("{}")
    assert "config.json" in failed(recovered)["strays"]


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "other", "plan": "p", "base": {"id": "b"}},
        {"kind": "pruned-model", "plan": 1, "base": {"id": "b"}},
        {"kind": "pruned-model", "plan": "p", "base": "b"},
        {"kind": "pruned-model", "plan": "p", "base": {"id": "b"}, "files": ["a"]},
        {"kind": "pruned-model", "plan": "p", "base": {"id": "b"}, "files": {"a": 1}},
        {"kind": "pruned-model", "plan": "p", "base": {"id": "b"}, "refit": {"a": 1}},
        {"kind": "pruned-model", "plan": "p", "base": {"id": "b"}, "refit": {"a": {}}},
    ],
)
def test_a_record_without_its_parts_is_one_sentence(record, tmp_path):
    (tmp_path / "loram.json").write_text(json.dumps(record))
    with pytest.raises(LoRAMError, match="damaged"):
        verify(tmp_path)


def test_inspect_shows_alignments(copy):
    folder = copy("pruned")
    alignment = {
        "objective": "distillation",
        "data": [{"path": "some-org/text", "name": "small"}, {"path": "b.jsonl"}],
        "steps": 200,
        "tokens": 25_600,
        "heldout_loss": {"before": 3.25, "after": 2.5, "tokens": 1_000},
    }
    edit(folder / "loram.json", alignments=[alignment])
    shown = CliRunner().invoke(main, ["inspect", str(folder)]).stdout
    told = "distillation, 200 steps, 25,600 tokens, of some-org/text (small) + b.jsonl; "
    assert told + "held-out loss 3.2500 → 2.5000" in shown
    told = json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--json"]).stdout)
    assert told["alignments"] == [alignment]


# --- what LoRAM has not made: what it is, what pruning would leave, what to do next ---


def loram(*arguments: object):
    return CliRunner().invoke(main, list(map(str, arguments)))


def told(*arguments: object) -> dict:
    return json.loads(loram("inspect", *arguments, "--json").stdout)


def test_a_model_is_told_with_what_plan_would_say(make_model):
    base = make_model(num_hidden_layers=32)
    found = told(base)
    assert (found["kind"], found["model_type"], found["layers"]) == ("model", "llama", 32)
    assert found["units_of_a_layer"] == {"neurons": 48, "kv_groups": 2}
    assert found["layers_left_whole"] == [0, 1, 2, 3, 30, 31]
    assert (found["stored_as"], found["weight_bytes"]) == ("F32", 4 * found["parameters"])
    planned = json.loads(loram(*shlex.split(found["next"])[1:], "--json").stdout)
    first = found["pruned"][0]
    assert first["pruning_ratio"] == 0.5
    for name in ("pruned_parameters", "parameter_reduction", "kept_per_pruned_layer"):
        assert first[name] == planned[name]
    shown = loram("inspect", base).stdout
    assert "48 neurons, 2 kv groups" in shown and "pruned at 0.85" in shown
    assert "tied embeddings    no" in shown


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_told(make_model, family, tmp_path):
    """From the config alone, too: of a hub id, no weights are downloaded for it."""
    pico_config(family).save_pretrained(tmp_path)
    found = told(tmp_path)
    assert found["kind"] == "model" and found["units_of_a_layer"]
    assert found["pruned"][0]["pruned_parameters"] < found["parameters"]
    assert "weight_bytes" not in found


def test_weights_of_another_config_are_refused(make_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    weights = load_numpy(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = np.ones(31, np.float32)
    save_numpy(weights, tmp_path / "model.safetensors", {"format": "pt"})
    result = loram("inspect", tmp_path)
    assert result.exit_code == 1 and "model.norm.weight of shape [32]" in result.stderr


def test_what_cannot_be_pruned_says_why(make_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert "16 or 32 bits" in told(tmp_path)["cannot_be_pruned"]


def test_an_ordinary_adapter_is_told(make_model, tmp_path):
    model = build_model()
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = told(tmp_path)
    assert (found["kind"], found["rank"], found["target_modules"]) == ("adapter", 3, "q_proj")
    assert "lora_model_dir" in loram("inspect", tmp_path).stdout
