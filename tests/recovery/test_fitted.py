import json

import pytest
import torch
from calibrated import load, text_tokens
from click.testing import CliRunner
from conftest import build_model, byte_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from test_recover import randomize
from test_resume import Interruption

import axolotl_loram.recovery.fitted
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import FillArgs, PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.pruning.refit import split
from axolotl_loram.recovery.fitted import recover_fitted
from axolotl_loram.recovery.recover import recover
from axolotl_loram.text.calibration import Calibration

TOKENS = text_tokens(samples=16, length=32)
TEXT = Calibration(TOKENS, "a test", 0)
FITTED = FillArgs(fill="fitted", calibration_path="a test", device="cpu")
PREFIX = "base_model.model.model.layers"


PRUNING = PruningArgs(ratio=0.5, method="random", refit=True)


def build(folder):
    """A pico Llama, pruned at half, in which each removed unit is the twin of a kept one.

    The refit then lets the kept ones stand in for their twins, and there is something to fit.
    """
    model = build_model()
    model.save_pretrained(folder / "base")
    prune(str(folder / "base"), folder / "pruned", PRUNING, calibration=TEXT)  # the seed decides
    for entry, kept in PruningPlan.load(folder / "pruned").kept.items():
        kept, part = torch.from_numpy(kept).long(), model.get_submodule(entry)
        units = 48 if entry.endswith("mlp") else 2
        twins = torch.arange(units)
        twins[[unit for unit in range(units) if unit not in kept.tolist()]] = kept
        for name, module in part.named_children():
            axis = 1 if name in ("o_proj", "down_proj") else 0
            if isinstance(module, torch.nn.Linear):
                weight = module.weight.data.unflatten(axis, (units, -1))
                module.weight.data = weight.index_select(axis, twins).flatten(axis, axis + 1)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    prune(str(folder / "base"), folder / "pruned", PRUNING, overwrite=True, calibration=TEXT)


def train(folder, targets="all-linear"):
    """An adapter for the pruned model, as if it were trained."""
    torch.manual_seed(0)
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load(folder / "pruned"), wanted)
    randomize(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on a pruned Llama, beside its base and its recoveries: zeros, fitted."""
    folder = tmp_path_factory.mktemp("fill")
    build(folder)
    found = train(folder)
    recover(found, output=folder / "zeros")
    recover_fitted(found, FITTED, output=folder / "fitted", calibration=TEXT)
    return found


def recorded(adapter):
    return json.loads((adapter.parent / "fitted/loram.json").read_text())["fill"]


def filled(adapter, settings, name, **options):
    record = recover_fitted(adapter, settings, output=adapter.parent / name, **options)
    return load_file(adapter.parent / name / "adapter_model.safetensors"), record["fill"]


def pruned_rows(adapter, module):
    """Which outputs of one of layer 1's or 2's projections pruning took, by the plan's units."""
    plan = PruningPlan.load(adapter.parent / "pruned")
    units = plan.kept[f"model.layers.{module.rpartition('.')[0]}"]
    block = {"gate_proj": 1, "up_proj": 1, "q_proj": 16}.get(module.rpartition(".")[2], 8)
    size = 48 if block == 1 else 2 * block
    taken = torch.ones(size // block, block, dtype=torch.bool)
    taken[torch.from_numpy(units).long()] = False
    return taken.flatten()


def test_a_fit_frees_the_pruned_rows_of_b_and_nothing_else(adapter):
    zeros, fitted = (
        load_file(adapter.parent / name / "adapter_model.safetensors")
        for name in ("zeros", "fitted")
    )
    changed = {name for name in zeros if not torch.equal(fitted[name], zeros[name])}
    writers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    free = {f"{layer}.{module}" for layer in (1, 2) for module in (*writers, "mlp.up_proj")}
    assert changed == {f"{PREFIX}.{module}.lora_B.weight" for module in free}
    for module in free:
        name, taken = f"{PREFIX}.{module}.lora_B.weight", pruned_rows(adapter, module)
        assert torch.equal(fitted[name][~taken], zeros[name][~taken])
        assert fitted[name][taken].abs().max() > 0 and not zeros[name][taken].any()
    assert recorded(adapter)["calibration"] == TEXT.record()


@pytest.mark.parametrize("at", [2, 3, 4])
def test_an_interrupted_fit_goes_on_where_it_was(adapter, monkeypatch, at):
    """Stopped before the first fit, after it, and after the second; none is done twice."""
    fits = []
    run = axolotl_loram.recovery.fitted.LayerFit.run
    monkeypatch.setattr(
        axolotl_loram.recovery.fitted.LayerFit,
        "run",
        lambda self: fits.append(self.index) or run(self),
    )
    folder, name = adapter.parent, f"again-{at}"
    with pytest.raises(KeyboardInterrupt):
        filled(adapter, FITTED, name, calibration=TEXT, progress=Interruption(at))
    assert not (folder / name).exists() and list(folder.glob(".fitting-*"))
    again, record = filled(adapter, FITTED, name, calibration=TEXT)
    whole = load_file(folder / "fitted/adapter_model.safetensors")
    assert fits == [1, 2] and record == recorded(adapter)
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert not list(folder.glob(".fitting-*"))


def layer_inputs(model, layers, tokens):
    """What goes into each decoder layer of a whole model: (args, kwargs)."""
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def dense_errors(adapter, name, samples):
    """Layer → the error that `fit` is to lower, by whole models, on samples of the text."""
    folder, tokens = adapter.parent, torch.from_numpy(TOKENS)[samples]
    base = PeftModel.from_pretrained(load(folder / "base"), folder / name)
    pruned = PeftModel.from_pretrained(load(folder / "pruned"), adapter)
    ours, theirs = base.base_model.model.model.layers, pruned.base_model.model.model.layers
    errors = {}
    with torch.no_grad():
        for index, (args, kwargs) in enumerate(layer_inputs(base, ours, tokens)):
            with_, wanted = (layer[index](*args, **kwargs) for layer in (ours, theirs))
            with base.disable_adapter(), pruned.disable_adapter():
                without, unwanted = (layer[index](*args, **kwargs) for layer in (ours, theirs))
            errors[f"model.layers.{index}"] = (
                ((with_ - without) - (wanted - unwanted)).square().sum() / len(samples),
                (wanted - unwanted).square().sum() / len(samples),
            )
    return errors


def test_streaming_fits_what_whole_models_show(adapter):
    record = recorded(adapter)
    _, held_out = split(len(TOKENS))
    errors = dense_errors(adapter, "fitted", held_out)
    scale = {n: e[1].item() for n, e in dense_errors(adapter, "fitted", range(len(TOKENS))).items()}
    zeros = dense_errors(adapter, "zeros", held_out)["model.layers.1"][0].item()
    assert set(record["layers"]) == {"model.layers.1", "model.layers.2"}
    for name, found in record["layers"].items():
        assert found["accepted"]
        assert found["heldout_error_after"] < 0.7 * found["heldout_error_before"]
        dense = errors[name][0].item() / scale[name]
        assert found["heldout_error_after"] == pytest.approx(dense, rel=1e-3)
    first = record["layers"]["model.layers.1"]["heldout_error_before"]
    assert first == pytest.approx(zeros / scale["model.layers.1"], rel=1e-3)


def test_a_fit_of_one_linear_projection_is_ridge_regression(adapter, tmp_path, monkeypatch):
    """With LoRA on up_proj alone the layer is linear in B: least squares has the answer."""
    monkeypatch.setattr(axolotl_loram.recovery.fitted, "ITERATIONS", 300)
    for name in ("base", "pruned"):
        (tmp_path / name).symlink_to(adapter.parent / name)
    adapter = train(tmp_path, ["up_proj"])
    fitted, _ = filled(adapter, FITTED, "fitted", calibration=TEXT)
    recover(adapter, output=tmp_path / "zeros")
    samples, _ = split(len(TOKENS))
    base = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "zeros")
    pruned = PeftModel.from_pretrained(load(tmp_path / "pruned"), adapter)
    seen = {}
    layers = base.base_model.model.model.layers
    mlp, theirs = layers[1].mlp, pruned.base_model.model.model.layers[1]
    mlp.register_forward_pre_hook(lambda _, args: seen.setdefault("h", args[0]))
    tokens = torch.from_numpy(TOKENS)
    (args, kwargs) = layer_inputs(base, layers, tokens)[1]
    with torch.no_grad():
        change = theirs(*args, **kwargs)
        with pruned.disable_adapter():
            change = (change - theirs(*args, **kwargs)).double()
        h = seen["h"].double()
        left = change - (mlp(seen["h"]).double() - base_without(base, mlp, seen["h"]))
    taken = pruned_rows(adapter, "1.mlp.up_proj")
    a = mlp.up_proj.lora_A["default"].weight.double()
    gate = torch.nn.functional.silu(h @ mlp.gate_proj.weight.double().T)[..., taken]
    down = mlp.down_proj.weight.double()[:, taken]
    low = h @ a.T
    columns = torch.einsum("...n,on,...r->...onr", 2 * gate, down, low)[samples]
    matrix, target = columns.flatten(3).flatten(0, 2), left[samples].flatten()
    moment = (
        torch.einsum("...r,...q->rq", low[samples], low[samples]) / low[samples][..., 0].numel()
    )
    moment = moment + 1e-4 * moment.diagonal().mean() * torch.eye(4)
    weight = axolotl_loram.recovery.fitted.RIDGE * len(TOKENS[0]) * len(samples) * 4
    ridge = torch.kron(torch.eye(int(taken.sum())), moment) * weight
    solved = torch.linalg.solve(matrix.T @ matrix + ridge, matrix.T @ target).reshape(-1, 4)
    found = fitted[f"{PREFIX}.1.mlp.up_proj.lora_B.weight"][taken].double()
    torch.testing.assert_close(found, solved, rtol=2e-2, atol=2e-2 * solved.abs().max().item())


def base_without(model, mlp, h):
    with model.disable_adapter():
        return mlp(h).double()


def test_the_result_is_an_ordinary_adapter(adapter):
    zeros = PeftModel.from_pretrained(load(adapter.parent / "base"), adapter.parent / "zeros")
    tokens = torch.from_numpy(TOKENS[:2])
    plain = zeros(input_ids=tokens).logits
    model = PeftModel.from_pretrained(load(adapter.parent / "base"), adapter.parent / "fitted")
    assert (model(input_ids=tokens).logits - plain).abs().max() > 1e-3
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("fill", ["normal", "corrected"])
def test_fills_that_are_gone_are_refused_by_name(fill, adapter):
    gone = f"expected a fill out of zeros and fitted, found {fill}, which is gone"
    done = CliRunner().invoke(main, ["recover", str(adapter), "--fill", fill])
    assert done.exit_code == 2 and gone in done.output
    with pytest.raises(ValidationError, match=gone):
        LoRAMConfig(pruned_model_path="pruned", fill=fill)


def test_what_cannot_be_filled_is_refused_in_one_sentence(adapter, tmp_path):
    with pytest.raises(LoRAMError, match="expected --calibration with --fill fitted"):
        FillArgs.parse(fill="fitted")
    with pytest.raises(LoRAMError, match="found text with zeros"):
        FillArgs.parse(calibration_path="text.jsonl")
    for name in ("base", "pruned"):
        (tmp_path / name).symlink_to(adapter.parent / name)
    readers = train(tmp_path, ["down_proj", "o_proj"])
    with pytest.raises(LoRAMError, match="expected LoRA on a projection that lost outputs"):
        recover_fitted(readers, FITTED, output=tmp_path / "none", calibration=TEXT)
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob("*.fitting*"))
    sparse = PruningArgs(method="magnitude", sparsity=0.5)
    prune(str(tmp_path / "base"), tmp_path / "sparse", sparse)
    with pytest.raises(LoRAMError, match="that lost whole units to fill from"):
        recover_fitted(adapter, FITTED, str(tmp_path / "sparse"))


def test_the_command_fits_on_text(adapter, text_file):
    command = ["recover", str(adapter), "--fill", "fitted", "--json"]
    wrong = CliRunner().invoke(main, command)
    assert wrong.exit_code == 2 and "expected --calibration" in wrong.output
    text = ["--calibration", str(text_file), "--calibration-length", "32"]
    done = CliRunner().invoke(main, [*command, *text, "--calibration-samples", "8"])
    assert done.exit_code == 0, done.output
    masked = CliRunner().invoke(main, [*command, *text, "--masked"])
    assert masked.exit_code == 2 and "expected fill zeros with masked" in masked.output
    record = json.loads((adapter.parent / "recovered-adapter/loram.json").read_text())
    assert record["fill"]["calibration"]["samples"] == 8
