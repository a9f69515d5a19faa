"""Rounding to 4 bits on text: what bitsandbytes holds as it is, and nearer than the nearest."""

import json

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from calibrated import inputs_by_hooks, load, text_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import Record, rounding_summary
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning import rounding
from axolotl_loram.pruning.prune import prune
from axolotl_loram.pruning.refit import split
from axolotl_loram.pruning.rounding import nearest_nf4, round_to_nf4, scales
from axolotl_loram.text.calibration import Calibration

TOKENS = text_tokens(samples=16, length=48)
TEXT = Calibration(TOKENS, "a test", 0)


def held_by_bitsandbytes(weight, block, dtype):
    """What it makes of a weight, without rounding the scales; as one row, where it has no bug."""
    packed, state = quantize_4bit(
        weight.to(dtype).reshape(1, -1),
        blocksize=block,
        compress_statistics=False,
        quant_type="nf4",
    )
    return dequantize_4bit(packed, state).view_as(weight)


def correlated(inputs, generator, tokens=400, rank=None):
    """Inputs (tokens, inputs) in which a column says much about those to its right."""
    rank = rank or inputs // 8 + 1
    x = torch.randn(tokens, rank, generator=generator) @ torch.randn(
        rank, inputs, generator=generator
    )
    return x + 0.1 * torch.randn(tokens, inputs, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 150),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 2**31),
)
def test_bitsandbytes_holds_exactly_these_numbers(outputs, inputs, block, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    weight[generator.initial_seed() % outputs] = 0  # a block of zeros
    x = correlated(inputs, generator)
    found = round_to_nf4(weight, x.T @ x, block, dtype)
    assert torch.equal(held_by_bitsandbytes(found, block, dtype), found.to(dtype))
    nearest = nearest_nf4(weight.to(dtype).float(), block, dtype)
    assert torch.equal(held_by_bitsandbytes(weight, block, dtype), nearest.to(dtype))


def test_the_number_that_gives_a_block_its_scale_stays():
    """Though what the one before it lost would have it smaller, and the scale with it."""
    code, _ = rounding.code_of(torch.device("cpu"))
    weight = code.repeat(4)[None].clone()
    weight[weight.abs() == 1] = 0
    weight[0, :2] = torch.tensor([-0.84, 1.0])  # to -0.70: the next would make up for it by -0.14
    gram = torch.eye(64)
    gram[0, 1] = gram[1, 0] = 1 - 1e-3
    found = round_to_nf4(weight, gram)
    assert found[0, 1] == 1 and found[0, 0] == code[1]
    assert torch.equal(held_by_bitsandbytes(found, 64, torch.bfloat16), found.bfloat16())


def test_of_inputs_that_have_nothing_in_common_it_is_the_nearest_number():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    found = round_to_nf4(weight, torch.eye(128))
    scale, ends = scales(weight, 64, torch.bfloat16)
    code, _ = rounding.code_of(weight.device)
    nearest = code[(weight / scale)[..., None].sub(code).abs().argmin(-1)]
    assert torch.equal(found, torch.where(ends != 0, ends, nearest) * scale)
    assert (found - weight).norm() <= (nearest_nf4(weight, 64, torch.bfloat16) - weight).norm()


def test_what_is_lost_in_outputs_is_less_than_by_nearest_numbers():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 192, generator=generator), correlated(192, generator, 4000, 192)
    found = round_to_nf4(weight, x[:2000].T @ x[:2000])
    nearest = nearest_nf4(weight, 64, torch.bfloat16)
    errors = [((w - weight) @ x[2000:].T).square().sum() for w in (found, nearest)]
    assert errors[0] < 0.7 * errors[1]


def numbers_of(folder):
    """Module → the weight that a checkpoint in 4 bits runs with."""
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = {n: m for n, m in packed.named_modules() if isinstance(m, Linear4bit)}
    return {n: dequantize_4bit(m.weight.data, m.weight.quant_state) for n, m in linear.items()}


WAYS = {
    "llama": {"method": "random"},
    "qwen3": {"method": "activation"},  # with the refit
    "phi3": {"method": "random"},  # q, k and v in one
    "whole layers": {"units": "layers"},
    "blocks": {"method": "random", "quantize_block_size": 128},
}


@pytest.mark.parametrize("way", WAYS)
def test_errors_are_those_of_the_checkpoint(way, make_model, tmp_path):
    base = str(make_model(way if way in ("llama", "qwen3", "phi3") else "llama"))
    how = {"ratio": 0.5, "device": "cpu", **WAYS[way]}
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    text = None if way == "whole layers" else TEXT
    prune(base, plain, PruningArgs(**how), calibration=text)
    record = prune(base, packed, PruningArgs(**how, quantize="nf4-gptq"), calibration=TEXT)
    assert Record.load(packed).rounding == record["rounding"]
    plan, found = PruningPlan.load(packed), numbers_of(packed)
    assert plan.digest == PruningPlan.load(plain).digest
    left = {name for name in found if "layers." in name}
    assert {f"{name}.weight" for name in left} == set(record["rounding"])
    assert not any(f"layers.{index}." in name for name in left for index in plan.removed)

    model, original = load(plain), load(base)
    states = inputs_by_hooks(original, ["model.layers.2"], TOKENS)["model.layers.2"]
    for index in (2, 3) if plan.removed else range(4):
        modules = [name for name in found if f"layers.{index}." in name]
        x = inputs_of(model, modules, states if plan.removed else None)
        for name in modules:  # those of a layer all see its inputs before any is rounded
            told = record["rounding"][f"{name}.weight"]
            weight = model.get_submodule(name).weight.detach().double()
            held = x[name][split(len(TOKENS))[1]].flatten(0, 1).double()
            error = (held @ (found[name].double() - weight).T).square().sum()
            error = (error / (held @ weight.T).square().sum()).item()
            # the scales are rounded too, which is not counted
            assert error == pytest.approx(told["heldout_error_after"], rel=0.1)
            assert told["heldout_error_after"] <= told["heldout_error_before"]
        for name in modules:
            model.get_submodule(name).weight.data.copy_(found[name])
    about = rounding_summary(record["rounding"])
    assert about["roundings_accepted"] > 0.8 * about["roundings_tried"] == 0.8 * len(left)
    assert about["rounding_error_after"] < 0.8 * about["rounding_error_before"]


def inputs_of(model, modules, states):
    """Inputs of modules; with `states`, those are what the layer before them hands on."""
    if states is None:
        return inputs_by_hooks(model, modules, TOKENS)
    handle = model.model.layers[1].register_forward_hook(lambda *_: states)
    found = inputs_by_hooks(model, modules, TOKENS)
    handle.remove()
    return found


LANGUAGE = [
    name
    for name, family in FAMILIES.items()
    if not family.section and family.auto_class == "AutoModelForCausalLM"
]


@pytest.mark.parametrize("family", LANGUAGE)
def test_of_every_family_outputs_come_nearer(family, make_model, tmp_path):
    how = PruningArgs(ratio=0.5, method="random", refit=False, quantize="nf4-gptq", device="cpu")
    record = prune(str(make_model(family)), tmp_path / "out", how, calibration=TEXT)
    about = rounding_summary(record["rounding"])
    assert about["roundings_accepted"] >= 0.8 * about["roundings_tried"] > 10
    assert about["rounding_error_after"] < 0.85 * about["rounding_error_before"]


def test_the_model_comes_nearer_to_the_pruned_one_in_16_bits(make_model, tmp_path):
    base, tokens = str(make_model()), torch.from_numpy(text_tokens(24, 48)[16:])
    how = {"ratio": 0.5, "method": "random", "refit": False}
    for name, quantize in (("plain", None), ("nearest", "nf4"), ("fitted", "nf4-gptq")):
        text = TEXT if name == "fitted" else None
        prune(base, tmp_path / name, PruningArgs(**how, quantize=quantize), calibration=text)
    with torch.no_grad():
        states = {
            name: AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            .model(input_ids=tokens)
            .last_hidden_state
            for name in ("plain", "nearest", "fitted")
        }
    errors = {n: (s - states["plain"]).square().sum().item() for n, s in states.items()}
    assert errors["fitted"] < 0.8 * errors["nearest"]


def test_where_it_does_not_help_the_nearest_numbers_stay(make_model, tmp_path, monkeypatch):
    base, how = str(make_model()), {"ratio": 0.5, "method": "random", "refit": False}
    prune(base, tmp_path / "nearest", PruningArgs(**how, quantize="nf4"))
    monkeypatch.setattr(rounding, "round_to_nf4", lambda weight, *rest: weight * -1)
    found = prune(base, tmp_path / "bad", PruningArgs(**how, quantize="nf4-gptq"), calibration=TEXT)
    assert not any(about["accepted"] for about in found["rounding"].values())
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("nearest", "bad"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_inputs_that_are_always_zero_are_rounded_like_others():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(64)
    gram[5] = gram[:, 5] = 0
    found = round_to_nf4(weight, gram)
    assert torch.isfinite(found).all() and (found - weight)[:, 5].abs().max() < 0.4


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"ratio": 0.5, "quantize": "nf4-gptq"}, "calibration text for quantize nf4-gptq"),
        ({"sparsity": 0.5, "quantize": "nf4-gptq"}, "quantize with a pruning ratio"),
        ({"units": "layers", "ratio": 0.5, "calibration_path": "x"}, "text is for `quantize"),
        ({"ratio": 0.5, "quantize": "gptq"}, "'nf4' or 'nf4-gptq'"),
    ],
)
def test_what_is_asked_for_in_vain_is_refused(how, sentence, make_model, tmp_path):
    with pytest.raises((LoRAMError, ValueError), match=sentence):
        prune(str(make_model()), tmp_path / "out", PruningArgs(**how))


def test_a_damaged_record_is_refused(make_model, tmp_path):
    how = PruningArgs(ratio=0.5, method="random", quantize="nf4-gptq")
    prune(str(make_model()), tmp_path / "out", how, calibration=TEXT)
    file = tmp_path / "out/loram.json"
    record = json.loads(file.read_text())
    next(iter(record["rounding"].values()))["accepted"] = "yes"
    file.write_text(json.dumps(record))
    with pytest.raises(LoRAMError, match="expected accepted in the rounding of model"):
        Record.load(tmp_path / "out")


def test_it_is_the_same_however_many_columns_are_dealt_with_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(24, 200, generator=generator), correlated(200, generator)
    whole = round_to_nf4(weight, x.T @ x)
    monkeypatch.setattr(rounding, "BLOCK", 16)
    again = round_to_nf4(weight, x.T @ x)
    assert np.mean((whole == again).numpy()) > 0.99  # float32 may round a tie otherwise
