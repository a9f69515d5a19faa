"""The update of a sparse model, confined in training."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_recover import PROJECTIONS, TOKENS, randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.plan import Base, PruningPlan, mask_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models import masked
from axolotl_loram.models.masked import MaskedLora, MaskedUpdate, confine, pack

UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"


def make_sparse(base: Path, folder: Path, whole: tuple[str, ...] = (), seed: int = 0) -> Path:
    """The base with about half of the weights of its decoder's linear layers set to zero."""
    shutil.copytree(base, folder)
    config = load_config(str(base))
    weights = load_file(folder / "model.safetensors")
    generator, masks = torch.Generator().manual_seed(seed), {}
    for tensor in tensors(config):
        if tensor.layer is not None and len(tensor.dims) == 2 and tensor.module not in whole:
            weight = weights[tensor.name]
            weight *= torch.rand(weight.shape, generator=generator) < 0.5  # leaves negative zeros
            masks[tensor.name] = mask_digest(weight.float().numpy())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plan = PruningPlan(config, {}, Base(str(base), None, Checkpoint(base).fingerprint()), masks)
    plan.save(folder)
    record = {"schema_version": 1, "kind": "pruned-model", "base": asdict(plan.base)}
    (folder / "loram.json").write_text(json.dumps({**record, "plan": plan.digest, "files": {}}))
    return folder


@pytest.fixture
def sparse(make_model, tmp_path):
    return make_sparse(make_model(), tmp_path / "sparse")


def masks_of(folder):
    """Module → where its weight is not zero."""
    weights = load_file(folder / "model.safetensors")
    names = PruningPlan.load(folder).masks
    return {name.removesuffix(".weight"): weights[name] != 0 for name in names}


def adapted(folder, model_options=None, **config):
    """A PEFT model on a sparse one, confined, with an update that makes a difference."""
    model = AutoModelForCausalLM.from_pretrained(folder, **model_options or {})
    options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **config}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    randomize(model)
    return model.eval(), confine(model, PruningPlan.load(folder), folder)


def update_of(model, module):
    """The update s B A of one layer, whole."""
    layer = model.base_model.model.get_submodule(module)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (B @ A).detach().float() * layer.scaling["default"]


def single_layer(columns, rows, support, packed, rank=3, dtype=torch.float32, **config):
    """One confined LoRA layer on a weight with the zeros of `support`."""
    net = nn.Sequential(nn.Linear(columns, rows).to(dtype))
    net[0].weight.data *= support
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["0"], **config}
    layer = get_peft_model(net, LoraConfig(**options), autocast_adapter_dtype=False)
    layer = layer.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    layer.lora_variant["default"] = MaskedLora(pack(support.numpy()) if packed else None)
    return layer


# The update itself, against dense autograd.


def dense(x, A, B, support):
    return x @ ((B @ A) * support).T


def make_inputs(tokens, columns, rows, rank, dtype=torch.float64):
    torch.manual_seed(0)
    made = [torch.randn(shape) for shape in ((tokens, columns), (rank, columns), (rows, rank))]
    leaves = [tensor.to(dtype).requires_grad_() for tensor in made]
    support = torch.rand(rows, columns) < 0.5
    return (*leaves, support)


SIZES = st.tuples(st.integers(0, 9), st.integers(1, 21), st.integers(1, 20), st.integers(1, 4))


@settings(max_examples=80, deadline=None)
@given(SIZES, st.integers(1, 100), st.booleans(), st.booleans())
def test_update_and_gradients_are_those_of_dense_autograd(sizes, block, packed, wants_x):
    *inputs, support = make_inputs(*sizes)
    inputs[0].requires_grad_(wants_x)
    mask = pack(support.numpy()) if packed else torch.randn(support.shape) * support
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    with patch.object(masked, "BLOCK_ELEMENTS", block):
        update = MaskedUpdate.apply(*inputs, mask)
        weights = torch.randn_like(update)
        found = torch.autograd.grad((update * weights).sum(), wanted)
    expected = dense(*inputs, support)
    reference = torch.autograd.grad((expected * weights).sum(), wanted)
    for ours, theirs in zip((update, *found), (expected, *reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_derivatives(monkeypatch):
    monkeypatch.setattr(masked, "BLOCK_ELEMENTS", 20)
    *inputs, support = make_inputs(4, 6, 7, 2)
    assert torch.autograd.gradcheck(lambda *t: MaskedUpdate.apply(*t, support.double()), inputs)


@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_adds_the_confined_update_to_any_batch(batch, packed):
    support = torch.rand(12, 10) < 0.5
    layer, x = (
        single_layer(10, 12, support, packed, lora_dropout=0.5).eval(),
        torch.randn(*batch, 10),
    )
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + 2 * dense(x, A, B, support)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.train()
    torch.manual_seed(1)
    dropped = layer(x)
    torch.manual_seed(1)
    expected = layer.base_layer(x) + 2 * dense(layer.lora_dropout["default"](x), A, B, support)
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
def test_low_precision_is_close_to_float32(kind, monkeypatch):
    """Also with several blocks; autocast leaves the gradients in the parameters' dtype."""
    monkeypatch.setattr(masked, "BLOCK_ELEMENTS", 200)
    support = torch.rand(48, 40) < 0.5
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    low = single_layer(40, 48, support, False, dtype=dtype, lora_dropout=0.0)
    x = torch.randn(6, 40).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        result = low(x)
    assert result.dtype == (torch.bfloat16 if kind == "autocast" else dtype)
    result.float().square().sum().backward()
    A, B = (getattr(low, part)["default"].weight for part in ("lora_A", "lora_B"))
    wide = [tensor.detach().float().requires_grad_() for tensor in (A, B)]
    base = x.float() @ low.base_layer.weight.float().T + low.base_layer.bias.float()
    expected = base + 2 * dense(x.float(), *wide, support)
    expected.square().sum().backward()
    assert A.grad.dtype == A.dtype == dtype
    for ours, theirs in ((result, expected), (A.grad, wide[0].grad), (B.grad, wide[1].grad)):
        assert float((ours.float() - theirs).detach().norm() / theirs.detach().norm()) < 0.02


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that operations make (not of views on weights)."""

    def __init__(self, *weights):
        super().__init__()
        self.known = {weight.untyped_storage().data_ptr() for weight in weights}
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_of_the_weights_size_is_made_or_kept(packed, monkeypatch):
    rows, columns, tokens, block = 64, 48, 5, 4 * 48
    monkeypatch.setattr(masked, "BLOCK_ELEMENTS", block)
    layer = single_layer(columns, rows, torch.rand(rows, columns) < 0.5, packed)
    x, kept = torch.randn(tokens, columns, requires_grad=True), []
    weight = layer.base_layer.weight
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, LargestTensor(weight) as made:
        layer(x).sum().backward()
    assert block <= made.elements <= max(block, tokens * rows)
    own = weight.untyped_storage().data_ptr()
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() != own) < 1000


# In PEFT.


def test_training_moves_nothing_outside_the_mask(sparse):
    model, count = adapted(sparse, lora_dropout=0.1)
    assert count == 28
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.eval()
    logits, base = model(TOKENS).logits, load_file(sparse / "model.safetensors")
    expected = {
        module: base[f"{module}.weight"] + update_of(model, module) * mask
        for module, mask in masks_of(sparse).items()
    }
    merged = model.merge_and_unload()
    for module, mask in masks_of(sparse).items():
        weight = merged.get_submodule(module).weight.detach()
        torch.testing.assert_close(weight, expected[module], rtol=1e-5, atol=1e-6)
        assert not weight[~mask].any() and weight[mask].all()
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_merged_can_be_unmerged(safe, packed):
    """Even where the merged weight is zero although the mask is not."""
    support = torch.rand(6, 5) < 0.5
    support[0, 0] = True
    layer = single_layer(5, 6, support, packed, rank=1, lora_alpha=1)
    before, x = layer.base_layer.weight.detach().clone(), torch.randn(3, 5)
    layer.lora_A["default"].weight.data[0, 0] = -before[0, 0]
    layer.lora_B["default"].weight.data[0, 0] = 1
    expected = layer(x)
    layer.merge(safe_merge=safe)
    assert layer.base_layer.weight[0, 0] == 0
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight.detach(), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_saved_adapter_is_an_ordinary_one(sparse, tmp_path):
    model, _ = adapted(sparse, {"dtype": torch.float16})
    variants = [m.lora_variant for m in model.modules() if hasattr(m, "lora_variant")]
    assert all(isinstance(variant["default"], MaskedLora) for variant in variants)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(names) == 56
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert not [name for name in model.state_dict() if "mask" in name or "bits" in name]
    before = model(TOKENS).logits
    model.load_adapter(tmp_path / "adapter", "default")  # what a resuming Trainer does
    assert torch.equal(model(TOKENS).logits, before)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(sparse), tmp_path / "adapter"
    )
    assert not torch.allclose(plain(TOKENS).logits, before.float(), atol=0.1)


def test_quantized_layers_take_the_mask_from_the_checkpoint(sparse):
    """NF4 rounds small weights to zero, which does not take them out of the update."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model, count = adapted(sparse, {"quantization_config": quantization})
    assert count == 28
    import bitsandbytes as bnb

    x, differing = torch.randn(2, 7, 32), 0
    for module, support in masks_of(sparse).items():
        layer = model.base_model.model.get_submodule(module)
        assert type(layer.base_layer) is bnb.nn.Linear4bit
        stored = layer.base_layer.weight
        weight = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
        differing += int(((weight != 0) != support).sum())
        if weight.shape[1] == 32:
            update = update_of(model, module) * support
            torch.testing.assert_close(layer(x), x @ (weight + update).T, rtol=1e-4, atol=1e-4)
            layer.merge()
            merged = bnb.functional.dequantize_4bit(
                layer.base_layer.weight.data, layer.base_layer.weight.quant_state
            )
            assert float((merged - weight - update).abs().mean()) < 0.05
            assert not merged[~support].any()
    assert differing > 100


def test_weights_that_underflow_stay_in_the_mask(make_model, tmp_path):
    """A layer's zeros stand for the mask only where they are the checkpoint's."""
    folder = make_sparse(make_model(), tmp_path / "sparse", whole=(UP,))
    weights = load_file(folder / "model.safetensors")
    weights[f"{UP}.weight"][0, 0] = 1e-12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plan = PruningPlan.load(folder)
    masks = {**plan.masks, f"{UP}.weight": mask_digest(weights[f"{UP}.weight"].numpy())}
    PruningPlan(plan.config, {}, plan.base, masks).save(folder)
    model, _ = adapted(folder, {"dtype": torch.float16})
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_variant")}
    packed = [name for name, m in layers.items() if m.lora_variant["default"].bits is not None]
    assert packed == [f"base_model.model.{UP}"]
    layer = layers[packed[0]]
    layer.merge()
    update = update_of(model, UP)[0, 0]
    assert layer.base_layer.weight[0, 0] == update.half() != 0


def test_weights_that_are_sharded_later_are_not_asked(sparse, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model, _ = adapted(sparse)
    layer = model.base_model.model.get_submodule(UP)
    assert layer.lora_variant["default"].bits.shape == (48, 4)


def test_a_changed_zero_is_refused(sparse):
    weights = load_file(sparse / "model.safetensors")
    weight = weights[f"{UP}.weight"]
    weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 0.1
    save_file(weights, sparse / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoRAMError, match=rf"{UP}.weight.*changed after pruning"):
        adapted(sparse)


def test_only_sparse_weights_are_confined(make_model, tmp_path):
    sparse = make_sparse(make_model(), tmp_path / "sparse", whole=(UP,))
    targets = ["up_proj", "embed_tokens", "lm_head"]
    model, count = adapted(sparse, target_modules=targets)
    assert count == 3
    for module in (UP, "model.embed_tokens", "lm_head"):
        assert not model.base_model.model.get_submodule(module).lora_variant
