import numpy as np
import pytest
import torch
from calibrated import READERS, inputs_by_hooks, load, saved, text_tokens
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.pruning.refit import RIDGES, solve, split
from axolotl_loram.text.calibration import Calibration

TOKENS = text_tokens(samples=16, length=48)
TEXT = Calibration(TOKENS, "a test", 0)


def refitted(base, out, **changes):
    settings = PruningArgs(**{"ratio": 0.5, "method": "random", "refit": True, **changes})
    return prune(str(base), out, settings, calibration=TEXT)


def scattered(base, pruned):
    """The base with the pruned model's o_proj and down_proj, zero where inputs are removed."""
    model, plan = load(base), PruningPlan.load(pruned)
    weights = load_file(pruned / "model.safetensors")
    for entry, units in plan.kept.items():
        reader = "o_proj" if entry.endswith("attn") else "down_proj"
        whole = model.get_submodule(f"{entry}.{reader}").weight.data
        block = whole.shape[1] // (
            48 if reader == "down_proj" else model.config.num_key_value_heads
        )
        columns = (torch.from_numpy(units).long()[:, None] * block + torch.arange(block)).flatten()
        whole.zero_()
        whole[:, columns] = weights[f"{entry}.{reader}.weight"]
    return model, weights


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_refit_is_least_squares_on_the_inputs_of_the_pruned_model(family, make_model, tmp_path):
    base = make_model(family, num_hidden_layers=8)
    errors = refitted(base, tmp_path / "out")["refit"]
    model, weights = scattered(base, tmp_path / "out")
    inputs = inputs_by_hooks(model, [name.removesuffix(".weight") for name in errors], TOKENS)
    original, (fitted, held_out) = load(base), split(len(TOKENS))
    assert set(errors) == {f"model.layers.{i}.{r}.weight" for i in (2, 3, 4, 5) for r in READERS}
    for name, found in errors.items():
        module = name.removesuffix(".weight")
        whole = original.get_submodule(module).weight.detach().double()
        columns = model.get_submodule(module).weight.abs().sum(0) > 0
        x = inputs[module].double()
        fit, hold = x[fitted].flatten(0, 1), x[held_out].flatten(0, 1)
        penalty = (found["ridge"] or 0) * fit[:, columns].square().mean() * len(fit)
        ridge = torch.sqrt(penalty) * torch.eye(int(columns.sum()), dtype=torch.float64)
        left = torch.cat([fit[:, columns], ridge])
        right = torch.cat([fit @ whole.T, ridge @ whole[:, columns].T])
        direct = torch.linalg.lstsq(left, right).solution.T
        stored = weights[name].double()
        if found["accepted"]:
            torch.testing.assert_close(stored, direct, rtol=1e-3, atol=1e-3 * direct.abs().max())
        else:
            torch.testing.assert_close(stored, whole[:, columns])
        energy = (hold @ whole.T).square().sum()
        for weight, when in ((whole[:, columns], "before"), (stored, "after")):
            error = (hold @ whole.T - hold[:, columns] @ weight.T).square().sum() / energy
            assert found[f"heldout_error_{when}"] == pytest.approx(error.item(), rel=1e-3)
    assert sum(found["accepted"] for found in errors.values()) >= 6


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_refit_lowers_the_heldout_error_and_the_models(ratio, make_model, tmp_path):
    base = make_model(num_key_value_heads=4, num_hidden_layers=8)
    errors = refitted(base, tmp_path / "refit", ratio=ratio)["refit"].values()
    assert all(e["heldout_error_after"] <= e["heldout_error_before"] for e in errors)
    before = sum(e["heldout_error_before"] for e in errors)
    assert sum(e["heldout_error_after"] for e in errors) < 0.9 * before
    prune(str(base), tmp_path / "plain", PruningArgs(ratio=ratio))
    tokens, original = torch.from_numpy(text_tokens(20, 48)[16:]), load(base)
    with torch.no_grad():
        wanted = original.model(input_ids=tokens).last_hidden_state
        error = {
            name: (load(tmp_path / name).model(input_ids=tokens).last_hidden_state - wanted)
            .square()
            .sum()
            for name in ("plain", "refit")
        }
    assert error["refit"] < error["plain"]


def test_removed_inputs_that_are_copies_of_kept_ones_cost_nothing(tmp_path):
    model, save = saved(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    mlp = model.model.layers[1].mlp
    for weight in (mlp.gate_proj.weight.data, mlp.up_proj.weight.data):
        weight[24:] = weight[:24]
    mlp.down_proj.weight.data *= torch.where(torch.arange(48) < 24, 3.0, 0.5)
    record = refitted(save(), tmp_path / "out", method="magnitude")
    assert PruningPlan.load(tmp_path / "out").kept["model.layers.1.mlp"].tolist() == list(range(24))
    error = record["refit"]["model.layers.1.mlp.down_proj.weight"]
    assert error["heldout_error_before"] > 0.01 > 1e-4 > error["heldout_error_after"]


def test_a_refit_that_does_not_help_is_not_kept(make_model, tmp_path, monkeypatch):
    from axolotl_loram.pruning import refit as compensate

    monkeypatch.setattr(
        compensate, "solve", lambda whole, gram, kept, name: {0.1: whole[:, kept] * -1}
    )
    errors = refitted(make_model(), tmp_path / "bad")["refit"].values()
    assert not any(error["accepted"] for error in errors)
    prune(str(make_model()), tmp_path / "plain", PruningArgs(ratio=0.5))
    bad, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("bad", "plain"))
    assert all(torch.equal(bad[name], plain[name]) for name in plain)


def test_inputs_that_are_always_zero_leave_the_projection_alone(tmp_path, caplog):
    model, save = saved(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    errors = refitted(save(), tmp_path / "out")["refit"]
    assert not errors["model.layers.1.mlp.down_proj.weight"]["accepted"]
    assert "model.layers.1.mlp.down_proj.weight is not refitted" in caplog.text
    assert errors["model.layers.2.mlp.down_proj.weight"]["accepted"]


def test_scarce_text_is_said_to_be(make_model, tmp_path, caplog):
    scarce = Calibration(TOKENS[:2, :16], "a test", 0)
    settings = PruningArgs(ratio=0.5, refit=True)
    prune(str(make_model()), tmp_path / "out", settings, calibration=scarce)
    assert "singular: 16 calibration tokens for 24 kept inputs" in caplog.text


def test_a_gram_matrix_that_overflows_is_refused():
    gram = torch.full((2, 3), float("inf"))
    with pytest.raises(LoRAMError, match="finite Gram matrix of the inputs of o_proj"):
        solve(torch.ones(4, 3), gram, torch.tensor([0, 1]), "o_proj")


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
def test_solutions_minimise_what_they_say(seed, inputs, outputs):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((40, inputs)))
    whole = torch.from_numpy(rng.standard_normal((outputs, inputs)))
    kept = torch.from_numpy(np.sort(rng.permutation(inputs)[: rng.integers(1, inputs)]))
    gram = x.T @ x / len(x)

    def objective(weight, penalty):
        error = (x @ whole.T - x[:, kept] @ weight.T).square().sum() / len(x)
        return error + penalty * (weight - whole[:, kept]).square().sum()

    for ridge, weight in solve(whole, gram[kept], kept, "w").items():
        penalty = ridge * gram[kept][:, kept].diagonal().mean()
        best = objective(weight, penalty)
        nudge = torch.from_numpy(rng.standard_normal(tuple(weight.shape))) * 1e-3
        assert objective(weight + nudge, penalty) > best - 1e-12
    assert set(solve(whole, gram[kept], kept, "w")) == set(RIDGES)


def test_some_text_is_always_held_out():
    for samples in range(2, 40):
        fitted, held_out = split(samples)
        assert sorted(fitted + held_out) == list(range(samples)) and fitted and held_out
