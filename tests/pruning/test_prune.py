import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import build_model, byte_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.pairing import check_base, check_pair, check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.prune import prune
from axolotl_loram.results.inspect import describe_ordinary

HALF = PruningArgs(ratio=0.5)
TOKENS = torch.arange(3, 40)[None]


def zero_pruned_units(model, plan):
    """Cut what the removed neurons and heads write into the hidden state."""
    for tensor_name in ("mlp.down_proj", "self_attn.o_proj"):
        for index, layer in enumerate(model.model.layers):
            kept = plan.kept.get(f"model.layers.{index}.{tensor_name.split('.')[0]}")
            if kept is None:
                continue
            weight = layer.get_submodule(tensor_name).weight.data
            units = torch.zeros(48 if "mlp" in tensor_name else model.config.num_key_value_heads)
            units[torch.from_numpy(kept).long()] = 1
            weight *= units.repeat_interleave(weight.shape[1] // len(units))


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_pruned_model_computes_what_the_base_does_without_those_units(
    method, kv_heads, make_model, tmp_path
):
    base = make_model(num_key_value_heads=kv_heads)
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5, method=method))
    plan = PruningPlan.load(tmp_path / "pruned")
    masked = AutoModelForCausalLM.from_pretrained(base)
    zero_pruned_units(masked, plan)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(pruned(TOKENS).logits, masked(TOKENS).logits, rtol=0, atol=1e-4)
    assert pruned.num_parameters() < masked.num_parameters()
    check_pruned(tmp_path / "pruned", plan)


def test_pruned_folder_explains_itself(make_model, tmp_path):
    base = make_model()
    record = prune(str(base), tmp_path / "pruned", HALF)
    with safe_open(tmp_path / "pruned/loram_plan.safetensors", "np") as plan:
        assert sorted(plan.keys()) == [
            f"model.layers.{i}.{part}" for i in (1, 2) for part in ("mlp", "self_attn")
        ]
        kept = plan.get_tensor("model.layers.1.mlp")
    assert kept.dtype == "int32" and len(kept) == 24 and sorted(set(kept)) == kept.tolist()
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert config["intermediate_size"] == 48
    assert config["per_layer_config"]["1"] == {
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    assert record == json.loads((tmp_path / "pruned/loram.json").read_text())
    assert record["base"]["fingerprint"] == Checkpoint(base).fingerprint()
    names = {file.name for file in (tmp_path / "pruned").iterdir()} - {"loram.json"}
    assert set(record["files"]) == names
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("abc")["input_ids"]


def test_random_depends_on_the_seed_alone(make_model, tmp_path):
    digests = []
    for number, seed in enumerate((7, 7, 8)):
        settings = PruningArgs(ratio=0.5, seed=seed)
        digests.append(prune(str(make_model()), tmp_path / str(number), settings)["plan"])
    assert digests[0] == digests[1] != digests[2]


def test_magnitude_removes_planted_dead_units(tmp_path):
    model = build_model()
    layer = model.model.layers[1]
    dead = torch.arange(0, 48, 2)
    for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
        weight.data[dead] *= 1e-3
    layer.mlp.down_proj.weight.data[:, dead] *= 1e-3
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, name).weight.data
        weight[: len(weight) // 2] *= 1e-3
    layer.self_attn.o_proj.weight.data[:, :16] *= 1e-3
    model.save_pretrained(tmp_path / "base")
    prune(str(tmp_path / "base"), tmp_path / "pruned", PruningArgs(ratio=0.5, method="magnitude"))
    kept = PruningPlan.load(tmp_path / "pruned").kept
    assert kept["model.layers.1.mlp"].tolist() == list(range(1, 48, 2))
    assert kept["model.layers.1.self_attn"].tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_dtypes_and_derived_tensors_go_through(dtype, tmp_path):
    model = build_model(tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shard = next((tmp_path / "base").glob("model-00001*"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(shard), **extra}, shard, metadata={"format": "pt"})
    prune(str(tmp_path / "base"), tmp_path / "pruned", PruningArgs(ratio=0.5, method="magnitude"))
    assert len(list((tmp_path / "pruned").glob("model-*.safetensors"))) > 1
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert pruned.dtype == dtype
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def test_uniform_pruning_loads_in_plain_transformers(make_model, tmp_path):
    settings = PruningArgs(ratio=0.5, protect_first=0, protect_last=0)
    prune(str(make_model()), tmp_path / "pruned", settings)
    assert "per_layer_config" not in json.loads((tmp_path / "pruned/config.json").read_text())


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_index_files_of_the_reference_code_are_a_plan(kv_heads, make_model, tmp_path):
    base = make_model(num_key_value_heads=kv_heads)
    folder = tmp_path / "indices"
    (folder / "mlp").mkdir(parents=True)
    (folder / "attn").mkdir()
    neurons, head = torch.arange(10, 34), kv_heads - 1
    rows = torch.arange(head * 8, head * 8 + 8)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}"
        torch.save({"pruned_idx": neurons}, folder / f"mlp/{prefix}.mlp.gate_proj.pt")
        torch.save({"pruned_idx": rows}, folder / f"attn/{prefix}.self_attn.k_proj.pt")
    prune(str(base), tmp_path / "pruned", PruningArgs(indices_path=str(folder)))
    kept = PruningPlan.load(tmp_path / "pruned").kept
    assert kept["model.layers.1.mlp"].tolist() == [*range(10), *range(34, 48)]
    assert kept["model.layers.2.self_attn"].tolist() == list(range(kv_heads - 1))


class Payload:
    def __reduce__(self):
        return (print, ("code from an index file was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Payload(), "expected a dict of tensors"),
        ({"pruned_idx": torch.tensor([48])}, "positions in 0…47"),
        ({"pruned_idx": torch.tensor([0.5])}, "tensor of integers"),
        ({"kept": torch.tensor([1])}, "tensor of integers"),
    ],
)
def test_index_files_are_not_trusted(content, message, make_model, tmp_path, capfd):
    torch.save(content, tmp_path / "model.layers.1.mlp.gate_proj.pt")
    with pytest.raises(LoRAMError, match=message):
        prune(str(make_model()), tmp_path / "out", PruningArgs(indices_path=str(tmp_path)))
    assert "code from" not in capfd.readouterr().out


def test_no_index_files_is_an_error(make_model, tmp_path):
    with pytest.raises(LoRAMError, match="found none"):
        prune(str(make_model()), tmp_path / "out", PruningArgs(indices_path=str(tmp_path)))


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def add_tensor(folder):
    file = folder / "model.safetensors"
    extra = {"model.layers.0.mlp.gate_proj.absmax": torch.ones(2)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})


def plant_nan(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def plant_nan_in_the_head(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][-1, -1] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})


def with_another_head(weights):
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])


def with_the_head_alone(weights):
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("change", [with_another_head, with_the_head_alone])
def test_of_tied_embeddings_what_is_stored_decides_as_in_transformers(
    change, family, make_model, text_file, tmp_path
):
    tied = change is with_the_head_alone
    base = copied(make_model(family, tie_word_embeddings=True), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    text = {"calibration_path": str(text_file), "calibration_length": 32}
    settings = PruningArgs(ratio=0.5, method="taylor", calibration_samples=8, **text)
    prune(str(base), tmp_path / "out", settings)
    plan = PruningPlan.load(tmp_path / "out")
    check_pair(tmp_path / "out", plan, str(base))
    assert describe_ordinary(base, str(base))["tied_embeddings"] == tied
    theirs, ours = (AutoModelForCausalLM.from_pretrained(f) for f in (base, tmp_path / "out"))
    for part in ("lm_head", "model.embed_tokens"):
        assert torch.equal(ours.get_submodule(part).weight, theirs.get_submodule(part).weight)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert ours.config.tie_word_embeddings == tied


def widen_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


def escape(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "whole safetensors file"),
        (add_tensor, "plain llama model"),
        (plant_nan, "NaN or infinity in model.layers.1.mlp.up_proj.weight"),
        (widen_config, r"shape \[64, 32\]"),
        (escape, "plain file names"),
        (remove_weights, "found neither"),
    ],
)
def test_bad_bases_are_refused_and_leave_nothing(damage, message, make_model, tmp_path):
    base = copied(make_model(), tmp_path / "base")
    damage(base)
    with pytest.raises(LoRAMError, match=message):
        prune(str(base), tmp_path / "out", PruningArgs(ratio=0.5, method="magnitude"))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_what_is_only_copied_is_looked_at_too(method, make_model, tmp_path):
    base = copied(make_model(), tmp_path / "base")
    plant_nan_in_the_head(base)
    with pytest.raises(LoRAMError, match="NaN or infinity in lm_head"):
        prune(str(base), tmp_path / "out", PruningArgs(ratio=0.5, method=method))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_every_chat_template_goes_along(make_model, tmp_path):
    base, templates = copied(make_model(), tmp_path / "base"), {"default": "A", "tool_use": "B"}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(base)
    record = prune(str(base), tmp_path / "out", HALF)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    assert "additional_chat_templates/tool_use.jinja" in record["files"]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--verify"])
    assert shown.exit_code == 0, shown.output


def test_an_existing_output_is_replaced_only_on_request(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "out", HALF)
    before = (tmp_path / "out/loram_plan.safetensors").read_bytes()
    with pytest.raises(LoRAMError, match="--overwrite"):
        prune(str(make_model()), tmp_path / "out", PruningArgs(ratio=0.25))
    assert (tmp_path / "out/loram_plan.safetensors").read_bytes() == before
    prune(str(make_model()), tmp_path / "out", PruningArgs(ratio=0.25), overwrite=True)
    assert (tmp_path / "out/loram_plan.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plan_and_checkpoint_that_disagree_are_refused(make_model, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        prune(str(make_model()), tmp_path / name, PruningArgs(ratio=0.5, seed=seed))
    prune(str(make_model()), tmp_path / "c", PruningArgs(ratio=0.25))
    shutil.copy(tmp_path / "b/loram_plan.safetensors", tmp_path / "a")
    with pytest.raises(LoRAMError, match="two prunings"):
        check_pruned(tmp_path / "a", PruningPlan.load(tmp_path / "a"))
    (tmp_path / "a/loram.json").unlink()
    shutil.copy(tmp_path / "c/loram_plan.safetensors", tmp_path / "a")
    with pytest.raises(LoRAMError, match="do not belong"):
        check_pruned(tmp_path / "a", PruningPlan.load(tmp_path / "a"))


def test_another_base_is_refused(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", HALF)
    plan = PruningPlan.load(tmp_path / "pruned")
    check_base(plan, str(make_model()))
    with pytest.raises(LoRAMError, match="fine-tuned"):
        check_base(plan, str(make_model(seed=1)))
    with pytest.raises(LoRAMError, match=r"\(32, 64\), not \(32, 48\)"):
        check_base(plan, str(make_model(intermediate_size=64)))


def test_a_base_whose_weights_are_elsewhere_is_compared_by_config(make_model, tmp_path, caplog):
    prune(str(make_model()), tmp_path / "pruned", HALF)
    base = tmp_path / "config-only"
    base.mkdir()
    shutil.copy(make_model() / "config.json", base)
    byte_tokenizer().save_pretrained(base)
    check_base(PruningPlan.load(tmp_path / "pruned"), str(base))
    assert "only its config was compared" in caplog.text


@pytest.mark.parametrize("units", [[], [1, 1], [2, 1], [-1, 3], [40, 48]])
def test_plans_with_impossible_units_are_refused(units, make_model):
    from axolotl_loram.architecture.config_json import load_config

    config = load_config(str(make_model()))
    import numpy as np

    with pytest.raises(LoRAMError, match="1 to 48 units"):
        PruningPlan(config, {"model.layers.1.mlp": np.array(units, dtype=np.int32)})
    with pytest.raises(LoRAMError, match="another model"):
        PruningPlan(config, {"model.layers.9.mlp": np.array([1], dtype=np.int32)})
