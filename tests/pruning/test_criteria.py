import subprocess
import sys

import numpy as np
import pytest
import torch
from calibrated import READERS, evidence_for, inputs_by_hooks, load, saved, text_tokens
from conftest import build_model, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import STRUCTURED, PruningArgs
from axolotl_loram.criteria import CRITERIA
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.stream import LayerStream, replace_linear
from axolotl_loram.pruning.importance import choose
from axolotl_loram.pruning.prune import prune

KINDS = {"kv_groups": "self_attn.o_proj", "neurons": "mlp.down_proj"}


NEW_CRITERION = """
import sys
from axolotl_loram.criteria import CRITERIA, Criterion

CRITERIA["last"] = Criterion("new:keep_the_last", about="the first go")
CRITERIA["none"] = Criterion(weights="new:zero_all")

if __name__ == "__main__":
    from axolotl_loram.cli import main
    main()

import numpy as np
from axolotl_loram.pruning.sparse import linear_weights, save_sparse

def keep_the_last(evidence):
    for layer in evidence.layers:
        shapes = evidence.shapes(layer)
        evidence.save(layer, {kind: np.arange(*shape) for kind, shape in shapes.items()})

def zero_all(evidence, sparsity):
    for layer in evidence.layers:
        stored = [evidence.checkpoint[n] for n in linear_weights(evidence, layer).values()]
        arrays = {one.name: (one.dtype, np.zeros_like(one.read())) for one in stored}
        save_sparse(evidence.work, layer, arrays)
"""


def test_a_criterion_is_one_row_and_its_function(make_model, tmp_path):
    (tmp_path / "new.py").write_text(NEW_CRITERION)

    def loram(*arguments):
        command = [sys.executable, str(tmp_path / "new.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    shown = " ".join(loram("prune", "--help").split())
    assert "last (the first go)" in shown and "magnitude, wanda, sparsegpt, none." in shown
    units, weights = tmp_path / "units", tmp_path / "weights"
    loram("prune", make_model(), units, "--pruning-ratio", "0.5", "--method", "last")
    assert PruningPlan.load(units).kept["model.layers.1.mlp"].tolist() == list(range(24, 48))
    loram("prune", make_model(), weights, "--sparsity", "0.5", "--method", "none")
    assert not load(weights).model.layers[1].mlp.up_proj.weight.any()


def gradients_of_masks(model, tokens):
    """(layer, kind) → Σ over sequences of |∂ loss / ∂ unit mask|, by whole-model autograd."""
    totals = {}
    for row in torch.from_numpy(tokens)[:, None]:
        masks = {}

        def mask(module, args, masks=masks):
            masks[module] = torch.ones(args[0].shape[-1], requires_grad=True)
            return (args[0] * masks[module],)

        modules = {
            (i, kind): layer.get_submodule(name)
            for i, layer in enumerate(model.model.layers)
            for kind, name in KINDS.items()
        }
        handles = [module.register_forward_pre_hook(mask) for module in modules.values()]
        model(input_ids=row, labels=row).loss.backward()
        for handle in handles:
            handle.remove()
        for (i, kind), module in modules.items():
            gradient = masks[module].grad.double()
            units = 48 if kind == "neurons" else model.config.num_key_value_heads
            by_unit = gradient.reshape(units, -1).sum(1).abs().numpy()
            totals[i, kind] = totals.get((i, kind), 0) + by_unit
    return totals


def assert_scores(evidence, expected, rtol):
    for layer in evidence.layers:
        found = evidence.load(layer)
        for kind in KINDS:
            np.testing.assert_allclose(
                found[kind],
                expected[layer, kind],
                rtol=rtol,
                atol=rtol * expected[layer, kind].max(),
            )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_taylor_equals_whole_model_autograd(family, tied, make_model, tmp_path):
    base = make_model(family, tie_word_embeddings=tied)
    evidence = evidence_for(base, tmp_path / "work", range(4))
    CRITERIA["taylor"].score(evidence)
    assert_scores(evidence, gradients_of_masks(load(base), evidence.tokens), rtol=1e-5)


def test_4_bits_are_an_option_of_pruning(make_model, text_file, tmp_path, monkeypatch):
    replaced = []
    monkeypatch.setattr(
        "axolotl_loram.models.stream.replace_linear",
        lambda layer, path, *rest: (replaced.append(path), replace_linear(layer, path, *rest)),
    )
    settings = calibrated("taylor", text_file)
    prune(str(make_model()), tmp_path / "16", settings)
    assert not replaced
    settings = calibrated("taylor", text_file, load_in_4bit=True)
    prune(str(make_model()), tmp_path / "4", settings)
    assert set(replaced) >= {"mlp.up_proj", "self_attn.q_proj"}


def test_streamed_taylor_works_over_4_bit_weights(make_model, tmp_path):
    base = make_model(hidden_size=64, intermediate_size=48)
    evidence = evidence_for(base, tmp_path / "work", range(4), four_bit=True)
    CRITERIA["taylor"].score(evidence)
    model = load(base).requires_grad_(False)
    expected_16 = gradients_of_masks(model, evidence.tokens)
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                replace_linear(layer, name, module.weight.data, torch.device("cpu"))
    expected = gradients_of_masks(model, evidence.tokens)
    assert_scores(evidence, expected, rtol=1e-5)
    assert not np.allclose(expected[1, "neurons"], expected_16[1, "neurons"], rtol=1e-2)


@pytest.mark.parametrize("method", ["activation", "fluctuation"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_streamed_moments_equal_those_of_hooks(method, family, make_model, tmp_path):
    base = make_model(family)
    evidence = evidence_for(base, tmp_path / "work", (1, 2))
    CRITERIA[method].score(evidence)
    model, expected = load(base), {}
    names = [f"model.layers.{i}.{reader}" for i in (1, 2) for reader in READERS]
    inputs = inputs_by_hooks(model, names, evidence.tokens)
    for layer in (1, 2):
        for kind, reader in KINDS.items():
            name = f"model.layers.{layer}.{reader}"
            x = inputs[name].flatten(0, 1).double().numpy()
            norms = (model.get_submodule(name).weight.detach().double().numpy() ** 2).sum(0)
            of_input = x.var(0) if method == "fluctuation" else (x**2).sum(0)
            units = 48 if kind == "neurons" else 2
            expected[layer, kind] = np.sqrt((norms * of_input).reshape(units, -1).sum(1))
    assert_scores(evidence, expected, rtol=1e-5)


def with_redundancy(folder):
    """In layers 1 and 2, half of the neurons and one KV group do next to nothing."""
    model, save = saved(folder)
    for layer in model.model.layers[1:3]:
        weak = torch.arange(0, 48, 2)
        layer.mlp.up_proj.weight.data[weak] *= 0.05
        layer.mlp.gate_proj.weight.data[weak] *= 0.3
        layer.mlp.down_proj.weight.data[:, weak] *= 0.05
        layer.self_attn.v_proj.weight.data[8:] *= 0.05
        layer.self_attn.o_proj.weight.data[:, 16:] *= 0.05
    byte_tokenizer().save_pretrained(folder)
    return save()


def calibrated(method, text, **changes):
    settings = {"ratio": 0.5, "method": method, "refit": False, **changes}
    if method not in ("random", "magnitude") or settings["refit"]:
        settings |= {
            "calibration_path": str(text),
            "calibration_samples": 16,
            "calibration_length": 48,
        }
    return PruningArgs(**settings)


def output_error(base, pruned):
    tokens = torch.from_numpy(text_tokens())
    with torch.no_grad():
        ours = load(pruned).model(input_ids=tokens).last_hidden_state
        theirs = load(base).model(input_ids=tokens).last_hidden_state
    return ((ours - theirs).square().sum() / theirs.square().sum()).item()


def test_every_criterion_beats_random_where_there_is_redundancy(text_file, tmp_path):
    base, errors = with_redundancy(tmp_path / "base"), {}
    for method in STRUCTURED:
        prune(str(base), tmp_path / method, calibrated(method, text_file))
        errors[method] = output_error(base, tmp_path / method)
    assert max(error for method, error in errors.items() if method != "random") < (
        errors["random"] / 5
    ), errors


@pytest.mark.parametrize("method", [method for method in STRUCTURED if method != "random"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_dead_units_are_exactly_what_is_lost(method, allocation, text_file, tmp_path):
    model, save = saved(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    dead = {1: np.arange(0, 48, 2), 2: np.arange(24)}
    for index, neurons in dead.items():
        layer = model.model.layers[index]
        layer.mlp.up_proj.weight.data[neurons] = 0
        layer.mlp.gate_proj.weight.data[neurons] = 0
        layer.mlp.down_proj.weight.data[:, neurons] = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = layer.self_attn.get_submodule(name).weight.data
            weight[: len(weight) // 2] = 0
        layer.self_attn.o_proj.weight.data[:, :16] = 0
    base = save()
    prune(str(base), tmp_path / "out", calibrated(method, text_file, allocation=allocation))
    kept = PruningPlan.load(tmp_path / "out").kept
    for index, neurons in dead.items():
        lost = set(range(48)) - set(kept[f"model.layers.{index}.mlp"].tolist())
        assert lost == set(neurons.tolist())
        assert kept[f"model.layers.{index}.self_attn"].tolist() == [1]
    assert output_error(base, tmp_path / "out") < 1e-9


def test_global_allocation_moves_units_between_layers_at_the_same_budget(text_file, tmp_path):
    model, save = saved(tmp_path / "base", num_hidden_layers=8)
    byte_tokenizer().save_pretrained(tmp_path / "base")
    weak = model.model.layers[3].mlp
    weak.down_proj.weight.data *= 0.1
    base, counted, widths = save(), {}, {}
    for allocation in ("uniform", "global"):
        out = tmp_path / allocation
        record = prune(str(base), out, calibrated("taylor", text_file, allocation=allocation))
        counted[allocation] = record["parameters"]["pruned_parameters"]
        assert load(out).num_parameters() == counted[allocation]
        widths[allocation] = {i: c["neurons"] for i, c in PruningPlan.load(out).counts.items()}
    assert counted["uniform"] == counted["global"]
    assert set(widths["uniform"].values()) == {24}
    assert widths["global"][3] < 24 < max(widths["global"].values())


@given(st.data())
def test_competition_keeps_the_best_within_the_budget(data):
    layers = data.draw(st.integers(1, 5))
    widths = [data.draw(st.integers(1, 12)) for _ in range(layers)]
    counts = {i: data.draw(st.integers(1, width)) for i, width in enumerate(widths)}
    floats = st.floats(-1e6, 1e6)
    scores = {
        i: np.array(data.draw(st.lists(floats, min_size=width, max_size=width)))
        for i, width in enumerate(widths)
    }
    chosen = choose(scores, counts, compete=True, comparable=True)
    assert sum(map(len, chosen.values())) == sum(counts.values())
    for layer, units in chosen.items():
        assert units.tolist() == sorted(set(units.tolist())) and len(units) >= 1
        assert scores[layer][units].max() == scores[layer].max()
    kept = [s for i, units in chosen.items() for s in scores[i][units]]
    best = [scores[i].max() for i in scores]
    lost = [s for i in scores for u, s in enumerate(scores[i]) if u not in chosen[i]]
    spared = [s for s in kept if s not in best]
    assert not lost or not spared or max(lost) <= min(spared)
    uniform = choose(scores, counts, compete=False, comparable=True)
    assert {i: len(units) for i, units in uniform.items()} == counts


def test_standardized_scores_compete_by_their_place_in_their_layer():
    scores = {0: np.array([1.0, 2, 3, 4]), 1: np.array([100.0, 200, 300, 400])}
    fair = choose(scores, {0: 2, 1: 2}, compete=True, comparable=False)
    assert [units.tolist() for units in fair.values()] == [[2, 3], [2, 3]]
    unfair = choose(scores, {0: 2, 1: 2}, compete=True, comparable=True)
    assert [units.tolist() for units in unfair.values()] == [[3], [1, 2, 3]]


def test_one_layer_is_held_at_a_time(make_model, text_file, tmp_path, monkeypatch):
    loaded, most = [], []
    original = LayerStream.layer

    def layer(stream, index):
        held = sum(p.numel() for made in loaded for p in made.parameters())
        loaded.append(original(stream, index))
        size = sum(p.numel() for p in loaded[-1].parameters())
        most.append((held + size) / size)
        return loaded[-1]

    monkeypatch.setattr(LayerStream, "layer", layer)
    base = make_model(num_hidden_layers=8)
    prune(str(base), tmp_path / "out", calibrated("activation", text_file, refit=True))
    assert len(most) > 8 and max(most) == 1


def plant(layer, path, value):
    layer.get_submodule(path).weight.data[0, 0] = value


@pytest.mark.parametrize("method", ["activation", "fluctuation", "taylor"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "NaN or infinity in model.layers.1.mlp.up_proj.weight"),
        (float("inf"), "NaN or infinity in model.layers.1.mlp.up_proj.weight"),
        (3e38, "NaN or infinity in the output of model.layers.1"),
    ],
)
def test_numbers_that_are_none_are_named(method, value, message, text_file, tmp_path):
    model, save = saved(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model.model.layers[1].mlp.up_proj.weight.data[:, :] *= 1 if value != 3e38 else 0
    model.model.layers[1].mlp.up_proj.weight.data[:1] = value
    with pytest.raises(LoRAMError, match=message):
        prune(str(save()), tmp_path / "out", calibrated(method, text_file))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_calibration_is_asked_for(make_model, tmp_path):
    with pytest.raises(LoRAMError, match="expected calibration text for method taylor"):
        prune(str(make_model()), tmp_path / "out", PruningArgs(ratio=0.5, method="taylor"))
    with pytest.raises(LoRAMError, match="expected calibration text for refit"):
        prune(str(make_model()), tmp_path / "out", PruningArgs(ratio=0.5, refit=True))


def test_bf16_weights_are_calibrated_and_stay_bf16(text_file, tmp_path):
    build_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = calibrated("taylor", text_file, refit=True)
    prune(str(tmp_path / "base"), tmp_path / "out", settings)
    from axolotl_loram.files.tensors import Checkpoint

    assert {tensor.dtype for tensor in Checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}
