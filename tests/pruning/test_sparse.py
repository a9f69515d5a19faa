import json

import numpy as np
import pytest
import torch
from calibrated import inputs_by_hooks, load, saved, text_tokens
from conftest import byte_tokenizer, run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan, mask_digest
from axolotl_loram.config import PruningArgs, check_sparsity
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint, open_safetensors, write_safetensors
from axolotl_loram.pruning.prune import prune
from axolotl_loram.pruning.sparse import smallest_zeroed
from axolotl_loram.pruning.sparsegpt import DAMPINGS, sparsegpt, wanda
from axolotl_loram.text.calibration import Calibration

TOKENS = text_tokens(samples=8, length=48)
TEXT = Calibration(TOKENS, "a test", 0)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SPARSITIES = (0.55, "2:4", "4:8")


def sparse(base, out, **changes):
    given = PruningArgs(**changes)
    return prune(str(base), out, given, calibration=None if given.method == "magnitude" else TEXT)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparse_models_have_the_zeros_they_claim(method, sparsity, make_model, tmp_path):
    base, out = make_model(), tmp_path / "out"
    record = sparse(base, out, method=method, sparsity=sparsity)
    plan, before, after = (
        PruningPlan.load(out),
        *(load_file(folder / "model.safetensors") for folder in (base, out)),
    )
    check_pruned(out, plan)
    zeros = 0
    for name, weight in after.items():
        linear = ".layers." in name and weight.ndim == 2
        assert (name in plan.masks) == linear
        if not linear:
            assert torch.equal(weight, before[name])
            continue
        zeros += int((weight == 0).sum())
        if sparsity == 0.55:
            assert (weight == 0).float().mean().item() == pytest.approx(0.55, abs=0.02)
        else:
            kept, group = map(int, sparsity.split(":"))
            assert ((weight.reshape(-1, group) != 0).sum(1) == kept).all()
        if method != "sparsegpt":
            assert torch.equal(weight[weight != 0], before[name][weight != 0])
        assert plan.masks[name] == mask_digest(Checkpoint(out)[name].read())
    assert record["parameters"]["zeros"] == zeros
    assert record["parameters"]["parameter_reduction"] == 1.0
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_calibrated_criteria_beat_magnitude(sparsity, tmp_path):
    model, save = saved(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for layer in model.model.layers:  # inputs of very different sizes, as trained models have
        layer.input_layernorm.weight.data *= torch.logspace(-1, 1, 32)
        layer.post_attention_layernorm.weight.data *= torch.logspace(1, -1, 32)
    base, errors = save(), {}
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        wanted = load(base).model(input_ids=tokens).last_hidden_state
        for method in ("magnitude", "wanda", "sparsegpt"):
            sparse(base, tmp_path / method, method=method, sparsity=sparsity)
            found = load(tmp_path / method).model(input_ids=tokens).last_hidden_state
            errors[method] = (found - wanted).square().sum().item()
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layers_see_inputs_of_the_model_as_sparse_so_far(method, make_model, tmp_path):
    base = make_model()
    sparse(base, tmp_path / "out", method=method, sparsity=0.5, protect_first=1)
    model, original = load(base), load(base)
    stored = load_file(tmp_path / "out/model.safetensors")
    for index in range(1, 4):
        names = [f"model.layers.{index}.{module}" for module in LINEARS]
        inputs = inputs_by_hooks(model, names, TOKENS)
        for name in names:
            x = inputs[name].flatten(0, 1)
            weight = original.get_submodule(name).weight.detach()
            if method == "wanda":
                expected = wanda(weight, x.square().sum(0), 0.5)
                assert torch.equal(stored[f"{name}.weight"], expected)
            else:
                expected = sparsegpt(weight, x.T @ x, 0.5)
                close = torch.isclose(stored[f"{name}.weight"], expected, rtol=1e-2, atol=1e-3)
                assert close.float().mean() > 0.99  # ties between float sums may fall otherwise
        for name, weight in stored.items():
            if name.startswith(f"model.layers.{index}."):
                model.get_parameter(name).data = weight
    untouched = original.model.layers[0].state_dict()
    assert all(torch.equal(stored[f"model.layers.0.{n}"], w) for n, w in untouched.items())


def obs(weight, gram, sparsity, block):
    """SparseGPT by its equations: dense float64, one explicit inverse for each column.

    Pruning column j of what is not yet fixed, F = {j, …}: δ = −w_j / [H_F⁻¹]₀₀ · [H_F⁻¹]₀:, and
    the error that it costs, w_j² / [H_F⁻¹]₀₀, ranks the columns.
    """
    weight, n = weight.double().clone(), weight.shape[1]
    damping = DAMPINGS[0] * gram.diagonal().mean().double()
    hessian = gram.double() + damping * torch.eye(n, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(n)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    mask = torch.zeros_like(weight, dtype=torch.bool)
    group = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else block
    for j in range(n):
        if j % group == 0:
            scores = weight[:, j : j + group].square() / cost[j : j + group]
            if isinstance(sparsity, str):
                kept = int(sparsity.split(":")[0])
                chosen = scores.argsort(1)[:, : group - kept]
                mask[:, j : j + group].scatter_(1, chosen, True)
            else:
                chosen = scores.flatten().argsort()[: int(scores.numel() * sparsity)]
                flat = torch.zeros(scores.numel(), dtype=torch.bool)
                flat[chosen] = True
                mask[:, j : j + group] = flat.view(scores.shape)
        removed = torch.where(mask[:, j], weight[:, j], 0.0)
        weight[:, j:] -= torch.outer(removed / inverses[j][0, 0], inverses[j][0])
    return weight.masked_fill(mask, 0.0)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, "2:4", "4:8", "1:4"])
@pytest.mark.parametrize("block", [8, 16, 128])
def test_sparsegpt_equals_a_dense_reference_of_its_equations(sparsity, block, monkeypatch):
    monkeypatch.setattr("axolotl_loram.pruning.sparsegpt.BLOCK", block)
    torch.manual_seed(0)
    x = torch.randn(200, 48, dtype=torch.float64) @ torch.randn(48, 48, dtype=torch.float64)
    weight, gram = torch.randn(24, 48, dtype=torch.float64), x.T @ x
    found = sparsegpt(weight, gram, sparsity)
    expected = obs(weight, gram, sparsity, block)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_sparsegpt_leaves_out_inputs_that_are_always_zero():
    torch.manual_seed(0)
    x = torch.randn(100, 16)
    x[:, 3] = 0
    weight = torch.randn(8, 16)
    found = sparsegpt(weight, x.T @ x, 0.5)
    assert (found[:, 3] == 0).all() and torch.isfinite(found).all()


def test_a_gram_matrix_that_cannot_be_inverted_is_named():
    gram = torch.full((8, 8), float("nan"))
    with pytest.raises(LoRAMError, match="Gram matrix of the inputs of up_proj"):
        sparsegpt(torch.ones(4, 8), gram, 0.5, "up_proj")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["F32", "F16", "BF16"]), st.data())
def test_magnitude_zeroes_exactly_the_smallest(tmp_path_factory, seed, dtype, data):
    sparsity = data.draw(st.sampled_from([0.1, 0.5, 0.55, 0.9, "2:4", "1:8", "4:8"]))
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    values = np.random.default_rng(seed).integers(-9, 10, (5, 16)) / 4  # many ties, and zeros
    weight = torch.from_numpy(values).to(torch_dtype)
    bits = weight.view(torch.int16 if dtype != "F32" else torch.int32).numpy()
    file = tmp_path_factory.mktemp("tensor") / "t.safetensors"
    write_safetensors(file, [("w", dtype, bits.shape)], [bits])
    found = smallest_zeroed(open_safetensors(file)[0]["w"], sparsity).astype(bits.dtype)
    kept = torch.from_numpy(found).view(torch_dtype)
    removed = (kept == 0) & (weight != 0)
    if isinstance(sparsity, str):
        size = int(sparsity.split(":")[1])
        count = size - int(sparsity.split(":")[0])
    else:
        size, count = 80, round(80 * sparsity)
    rows = zip(*(t.reshape(-1, size) for t in (kept, weight, removed)), strict=True)
    for left, before, gone in rows:
        assert torch.equal(left[~gone], before[~gone])
        assert int((left == 0).sum()) == max(count, int((before == 0).sum()))
        if gone.any() and (left != 0).any():
            assert before[gone].abs().max() <= left[left != 0].abs().min()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.55, 0.55), ("0.55", 0.55), ("2:4", "2:4"), (124, "2:4"), (248, "4:8"), ("04:8", "4:8")],
)
def test_sparsities_as_people_write_them(given, expected):
    import yaml

    assert check_sparsity(given) == expected
    assert yaml.safe_load("2:4") == 124 and yaml.safe_load("4:8") == 248


@pytest.mark.parametrize("given", [0, 1, 1.5, -0.5, "4:2", "2:2", "0:4", "half", True, "nan", 60])
def test_sparsities_that_are_none(given):
    with pytest.raises(LoRAMError, match="between 0 and 1"):
        check_sparsity(given)


def test_zeros_go_by_magnitude_unless_told_otherwise(make_model, tmp_path):
    result = run_command(
        "axolotl-loram", "prune", make_model(), tmp_path / "out", "--sparsity", "2:4", "--json"
    )
    assert json.loads(result.stdout)["sparsity"] == 0.5
    shown = run_command("axolotl-loram", "inspect", tmp_path / "out", "--json")
    assert json.loads(shown.stdout)["sparsity"] == 0.5
    planned = run_command("axolotl-loram", "plan", make_model(), "--sparsity", "2:4", "--json")
    for name in ("zeros", "nonzero_parameters", "pruned_parameters", "sparse_weights"):
        assert json.loads(planned.stdout)[name] == json.loads(result.stdout)[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.5, "sparsity": 0.5}, "found ratio and sparsity"),
        ({"sparsity": 0.5, "method": "taylor"}, "magnitude, wanda, sparsegpt with sparsity"),
        ({"ratio": 0.5, "method": "wanda"}, "random, magnitude.* with ratio"),
        ({"sparsity": 0.5, "method": "wanda", "refit": True}, "refit and global allocation"),
        ({}, "expected a pruning ratio, found none"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(LoRAMError, match=message):
        PruningArgs.parse(**changes)


def test_a_pattern_that_does_not_divide_is_refused_before_anything_is_read(make_model, tmp_path):
    with pytest.raises(
        LoRAMError, match=r"32 inputs of model.layers.0.self_attn.o_proj.weight .* 5"
    ):
        sparse(
            make_model(intermediate_size=48, hidden_size=40),
            tmp_path / "out",
            method="magnitude",
            sparsity="2:5",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value, tmp_path):
    model, save = saved(tmp_path / "base")
    model.model.layers[2].mlp.gate_proj.weight.data[0, 0] = value
    with pytest.raises(LoRAMError, match=r"model.layers.2.mlp.gate_proj.weight"):
        sparse(save(), tmp_path / "out", method="magnitude", sparsity=0.5)
