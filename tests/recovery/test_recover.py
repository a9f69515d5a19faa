import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from families import PICO
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import sizes_of
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.plan import Base, PruningPlan, entries_of
from axolotl_loram.architecture.spaces import kept_features
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import gather_adapter, recover

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(3, 40)[None]


@st.composite
def plans(draw):
    """A plan over a random small architecture, with random kept units in random layers."""
    family = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3")))
    kv_heads = draw(st.integers(1, 3))
    config = {
        **PICO,
        "model_type": family,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "hidden_size": draw(st.integers(1, 12)),
        "intermediate_size": draw(st.integers(1, 12)),
        "head_dim": draw(st.integers(1, 4)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    kept = {}
    for entry, layer, group in entries_of(config):
        units = sizes_of(config, layer)[group.kind]
        chosen = draw(st.lists(st.integers(0, units - 1), min_size=1, unique=True))
        if draw(st.booleans()):
            kept[entry] = np.array(sorted(chosen), dtype=np.int32)
    return PruningPlan(config, kept, Base("some-org/base", "abc123"))


def linear_shapes(config):
    """Module → (output, input) of every linear layer inside the decoder layers."""
    return {t.module: t.shape for t in tensors(config) if t.linear}


def write_adapter(folder: Path, shapes: dict, rank: int, dtype: torch.dtype, base: str, **config):
    """A LoRA adapter with random A and B, as PEFT stores one."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for module, (rows, columns) in shapes.items():
        prefix = f"base_model.model.{module}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns).to(dtype)
        weights[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank).to(dtype)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return weights


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_recovered_update_is_the_trained_one_where_kept_and_zero_elsewhere(plan, rank, dtype):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan.save(folder)
        pruned = {**plan.config, **plan.changes}
        trained = write_adapter(folder / "a", linear_shapes(pruned), rank, dtype, scratch)
        recover(folder / "a", output=folder / "b")
        recovered = load_file(folder / "b/adapter_model.safetensors")
        for tensor in tensors(plan.config):
            if tensor.layer is None or len(tensor.dims) != 2:
                continue
            prefix = f"base_model.model.{tensor.module}"
            small, full = (
                weights[f"{prefix}.lora_B.weight"].double()
                @ weights[f"{prefix}.lora_A.weight"].double()
                for weights in (trained, recovered)
            )
            rows, columns = (
                np.arange(n) if kept is None else kept
                for n, kept in zip(
                    tensor.shape, plan.features(tensor.dims, tensor.layer), strict=True
                )
            )
            assert full.shape == tensor.shape
            assert recovered[f"{prefix}.lora_A.weight"].dtype == dtype
            base = torch.randn(full.shape, dtype=torch.float64)
            merged = (base + full)[rows][:, columns]
            expected = base[rows][:, columns] + small  # sums of another shape may round otherwise
            torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)
            full[np.ix_(rows, columns)] = 0
            assert not full.any()


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(1, 3))
def test_gathering_what_was_recovered_gives_the_trained_adapter_back(plan, rank):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan.save(folder)
        pruned = {**plan.config, **plan.changes}
        trained = write_adapter(folder / "a", linear_shapes(pruned), rank, torch.float32, scratch)
        recover(folder / "a", output=folder / "b")
        gather_adapter(folder / "b", plan, scratch, folder / "c")
        again = load_file(folder / "c/adapter_model.safetensors")
        assert again.keys() == trained.keys()
        assert all(torch.equal(again[name], trained[name]) for name in trained)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_gathering_an_original_adapter_is_its_update_at_kept_features(plan):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        full = write_adapter(folder / "a", linear_shapes(plan.config), 2, torch.float32, "base")
        gather_adapter(folder / "a", plan, scratch, folder / "b")
        small = load_file(folder / "b/adapter_model.safetensors")
        for module in linear_shapes(plan.config):
            tensor = next(t for t in tensors(plan.config) if t.module == module)
            kept = plan.kept_in(tensor.layer)
            for part, axis in (("lora_A.weight", 1), ("lora_B.weight", 0)):
                name = f"base_model.model.{module}.{part}"
                index = kept_features(tensor.dims[axis], tensor.sizes, kept)
                expected = (
                    full[name]
                    if index is None
                    else full[name].index_select(axis, torch.from_numpy(index))
                )
                assert torch.equal(small[name], expected)


def randomize(model):
    """Give LoRA's B, zero at first, values that make a difference."""
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            weight.data.normal_(std=0.1)


def train_on(pruned_folder, output, **config):
    """An adapter on the pruned model, saved by PEFT itself."""
    model = AutoModelForCausalLM.from_pretrained(pruned_folder)
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **config}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    randomize(model)
    model.save_pretrained(output)
    return model.eval()


@pytest.fixture
def pruned(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    return tmp_path / "pruned"


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 2}}])
def test_plain_peft_loads_the_result_and_merging_changes_nothing(config, make_model, tmp_path):
    base = make_model()
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5))
    trained = train_on(tmp_path / "pruned", tmp_path / "adapter", **config)
    record = recover(tmp_path / "adapter")
    original = AutoModelForCausalLM.from_pretrained(base)
    before = original(TOKENS).logits
    loaded = PeftModel.from_pretrained(original, record["output"]).eval()
    logits = loaded(TOKENS).logits
    assert not torch.allclose(logits, before, atol=0.1)
    torch.testing.assert_close(
        loaded.merge_and_unload()(TOKENS).logits,
        logits,
        rtol=1e-5,
        atol=1e-5 * float(before.detach().abs().max()),
    )
    # With the removed units silenced, original + recovered computes what pruned + trained does.
    plan = PruningPlan.load(tmp_path / "pruned")
    kept = {f"model.layers.{i}": plan.kept_in(i) for i in range(4)}
    silenced = AutoModelForCausalLM.from_pretrained(base)
    masked = PeftModel.from_pretrained(silenced, record["output"]).merge_and_unload()
    for name, units in kept.items():
        for path, kind, count in (
            ("mlp.down_proj", "neurons", 48),
            ("self_attn.o_proj", "kv_groups", 2),
        ):
            weight = masked.get_submodule(f"{name}.{path}").weight.data
            mask = torch.ones(count)
            if kind in units:
                mask[:] = 0
                mask[torch.from_numpy(units[kind]).long()] = 1
            weight *= mask.repeat_interleave(weight.shape[1] // count)
    torch.testing.assert_close(
        masked(TOKENS).logits,
        trained(TOKENS).logits,
        rtol=1e-4,
        atol=1e-4 * float(before.detach().abs().max()),
    )


def test_modules_saved_whole_and_embedding_lora_go_through(pruned, make_model, tmp_path):
    config = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = train_on(pruned, tmp_path / "adapter", **config)
    record = recover(tmp_path / "adapter")
    original = AutoModelForCausalLM.from_pretrained(make_model())
    loaded = PeftModel.from_pretrained(original, record["output"])
    assert torch.equal(
        loaded.base_model.model.lm_head.modules_to_save["default"].weight,
        model.base_model.model.lm_head.modules_to_save["default"].weight,
    )
    embedding = model.base_model.model.model.embed_tokens
    assert torch.equal(
        loaded.base_model.model.model.embed_tokens.lora_embedding_A["default"],
        embedding.lora_embedding_A["default"],
    )


def test_result_names_the_original_and_holds_no_pruned_config(pruned, make_model, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    recover(tmp_path / "adapter", output=tmp_path / "out", base=Base("some-org/base", "v2"))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some-org/base", "v2")
    card = (tmp_path / "out/README.md").read_text()
    assert 'base_model: "some-org/base"' in card and "`v2`" in card
    assert not (tmp_path / "out/config.json").exists()
    record = recover(tmp_path / "adapter")
    assert record["base"]["id"] == str(make_model())
    assert Path(record["output"]) == tmp_path / "recovered-adapter"


def edit_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"bias": "all"}, "'all'"),
        ({"base_model_name_or_path": "/nowhere/pruned"}, "no such model"),
    ],
)
def test_adapters_that_cannot_be_recovered_are_refused(changes, message, pruned, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **changes)
    with pytest.raises(LoRAMError, match=message):
        recover(tmp_path / "adapter")
    assert not (tmp_path / "recovered-adapter").exists()


def test_adapter_of_another_plan_is_refused(pruned, make_model, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    prune(str(make_model()), tmp_path / "quarter", PruningArgs(ratio=0.25))
    with pytest.raises(LoRAMError, match="another plan"):
        recover(tmp_path / "adapter", str(tmp_path / "quarter"))
    # Same ratio, other units: the shapes agree, so only the record can tell.
    prune(str(make_model()), tmp_path / "other", PruningArgs(ratio=0.5, seed=1))
    digest = PruningPlan.load(pruned).digest
    record = {"schema_version": 1, "kind": "trained-adapter", "plan": digest}
    (tmp_path / "adapter/loram.json").write_text(json.dumps(record))
    with pytest.raises(LoRAMError, match="trained under plan"):
        recover(tmp_path / "adapter", str(tmp_path / "other"))
    recover(tmp_path / "adapter", str(pruned))


def test_pruned_modules_saved_whole_are_refused(pruned, tmp_path):
    train_on(pruned, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(LoRAMError, match="put no up_proj into lora_modules_to_save"):
        recover(tmp_path / "adapter")


def test_truncated_adapter_is_refused(pruned, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LoRAMError, match="truncated or damaged"):
        recover(tmp_path / "adapter")


def test_newer_artefacts_are_refused(pruned, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    (tmp_path / "adapter/loram.json").write_text('{"schema_version": 2}')
    with pytest.raises(LoRAMError, match="upgrade"):
        recover(tmp_path / "adapter")


def test_update_keeps_what_else_the_folder_holds(pruned, tmp_path):
    train_on(pruned, tmp_path / "run/pruned")
    (tmp_path / "run/debug.log").write_text("kept")
    for _ in range(2):
        recover(tmp_path / "run/pruned", output=tmp_path / "run", update=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"debug.log", "pruned", "adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_recovery_needs_no_weights_of_the_pruned_model(pruned, tmp_path):
    train_on(pruned, tmp_path / "adapter")
    (tmp_path / "plan").mkdir()
    shutil.copy(pruned / "loram_plan.safetensors", tmp_path / "plan")
    recover(tmp_path / "adapter", str(tmp_path / "plan"))
