"""Mixtures in 4 bits: what is written, what is loaded, what is planned, and what is trained."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from click.testing import CliRunner
from conftest import run_command, write_yaml
from peft import LoraConfig, PeftModel, get_peft_model
from test_experts import MIXTRAL_8X7B
from test_nf4 import load_in_4bit
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.config_json import with_defaults
from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.nf4 import STATE, nf4_sizes
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import pruned_config, storage_of
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.weights import weight_bytes
from axolotl_loram.models import packing, small_head
from axolotl_loram.models.load import load_pruned
from axolotl_loram.models.packed_experts import STACKS, packed_stacks
from axolotl_loram.pruning.gather import needed_bytes
from axolotl_loram.pruning.prune import prune

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")
NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(3, 60)[None]
PLAIN = {"ratio": 0.5, "method": "random", "refit": False, "protect_first": 1, "protect_last": 1}
PACKED = PLAIN | {"quantize": "nf4", "device": "cpu"}


def in_4_bits(folder: Path, tied: bool = False):
    """The plain pruned model as QLoRA loads it, its experts as `quantize_moe_experts` has them."""
    model = load_in_4bit(folder, None if tied else ["none"])
    for module in model.modules():
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(getattr(module, name, None), torch.nn.Parameter):
                replace_parameter_4bit(module, name, compress_statistics=True)
    return model


def logits_of(model):
    with torch.no_grad():
        return model.train()(TOKENS).logits


@pytest.mark.parametrize(
    ("family", "units"),
    [(family, None) for family in MIXTURES] + [("mixtral", "experts,expert_neurons")],
)
def test_experts_are_what_bitsandbytes_makes_of_them(
    family, units, make_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "PIECE", 1024)  # so that stacks come in several
    base = str(make_model(family))
    prune(base, tmp_path / "plain", PruningArgs(**PLAIN, units=units))
    record = prune(base, tmp_path / "packed", PruningArgs(**PACKED, units=units))
    check_pruned(tmp_path / "packed", PruningPlan.load(tmp_path / "packed"))
    packed = load_pruned(str(tmp_path / "packed"), embedding_format="native", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    stacks = {
        name: module for name, module in packed.named_modules() if module in packed_stacks(packed)
    }
    layers = sum("experts" in kept for kept in PruningPlan.load(tmp_path / "plain").counts.values())
    assert len(stacks) >= layers > 0
    for name, module in stacks.items():
        assert list(module.parametrizations) == ["gate_up_proj", "down_proj"]
        for parameter in module.parametrizations:
            values, state = quantize_4bit(
                getattr(plain.get_submodule(name), parameter).data,
                blocksize=64,
                compress_statistics=True,
                quant_type="nf4",
            )
            assert torch.equal(module.parametrizations[parameter].original, values)
            assert torch.equal(getattr(module, parameter), dequantize_4bit(values, state))
    assert torch.equal(logits_of(packed), logits_of(in_4_bits(tmp_path / "plain")))
    stored = Checkpoint(tmp_path / "packed").tensors
    assert sum(tensor.nbytes for tensor in stored.values()) == record["weight_bytes"]
    assert sum(STATE in name and ".experts." in name for name in stored) == 2 * len(stacks)

    config = json.loads((tmp_path / "packed/config.json").read_text())
    plan = PruningPlan.load(tmp_path / "packed")
    with_head = packing.plan_packing(config, Checkpoint(Path(base)).tensors, 64, "cpu")
    assert needed_bytes(Checkpoint(Path(base)), plan, with_head) == record["weight_bytes"]
    run = TrainingArgs.parse(precision="fp32", prequantized=True, embedding_format="native")
    planned = weight_bytes(Layout.of(plan.pruned_config), storage_of("qloram", run, tied=False))
    rotary = sum(b.nbytes for n, b in packed.named_buffers() if n.endswith("inv_freq"))
    assert planned.on_device == small_head.weight_bytes(packed) - rotary


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_peft_leaves_frozen_experts_packed(family, make_model, tmp_path):
    prune(str(make_model(family)), tmp_path / "packed", PruningArgs(**PACKED))
    model = load_pruned(str(tmp_path / "packed"), dtype=torch.float32)
    before = small_head.weight_bytes(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    adapted.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    originals = [p for n, p in adapted.named_parameters() if n.endswith("original")]
    assert originals and {p.dtype for p in originals} == {torch.uint8}
    trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert small_head.weight_bytes(adapted) == before + trained
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("mixtral", {"target_parameters": NAMES}),
        ("qwen3_moe", {"target_modules": LINEAR}),  # which PEFT takes for stacks, too
        ("qwen2_moe", {"target_modules": LINEAR}),  # of shared experts alone
    ],
)
def test_peft_adapts_packed_experts_as_plain_ones(family, targets, make_model, tmp_path):
    """The same tensors under the same names, the same outputs, and gradients for all of them."""
    prune(str(make_model(family)), tmp_path / "packed", PruningArgs(**PACKED))
    packed, plain = (load_pruned(str(tmp_path / "packed"), dtype=torch.float32) for _ in "ab")
    for stack in packed_stacks(plain):
        values = {name: getattr(stack, name).detach() for name in stack.parametrizations}
        for name, value in values.items():
            remove_parametrizations(stack, name, leave_parametrized=False)
            setattr(stack, name, torch.nn.Parameter(value, requires_grad=False))
    assert packed_stacks(packed) and not packed_stacks(plain)
    how = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": [], **targets})
    adapted = get_peft_model(packed, how).train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    held = {n for n, _ in adapted.named_parameters() if "lora_" in n}
    assert any(".experts." in name for name in held) == (family != "qwen2_moe")
    assert held == {n for n, _ in loaded.named_parameters() if "lora_" in n} != set()
    torch.testing.assert_close(logits_of(adapted), logits_of(loaded), rtol=1e-5, atol=1e-5)
    again = PeftModel.from_pretrained(load_pruned(str(tmp_path / "packed")), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(adapted))


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}
DEEPSEEK_V2_LITE = {  # its shapes, in the family that is declared
    "model_type": "deepseek_v3",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LARGE = {
    "Mixtral 8x7B": MIXTRAL_8X7B,
    "Qwen3-30B-A3B": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
}


@pytest.mark.parametrize("name", LARGE)
def test_large_mixtures_are_planned_to_the_byte(name):
    """Against the modules that transformers builds of the pruned config: linear, stacked, other."""
    config = pruned_config(with_defaults(LARGE[name]), 0.5, (4, 2), ["experts"])
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(config), dtype=torch.bfloat16)
    total, offset = 0, 4
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for weight in (*model.parameters(), *biases):
        if id(weight) in linear or weight.ndim == 3:
            total += sum(nf4_sizes(math.prod(weight.shape)).values()) + offset
        else:
            total += weight.nbytes
    run = TrainingArgs.parse(prequantized=True, embedding_format="native")
    planned = weight_bytes(Layout.of(config), storage_of("qloram", run, tied=False))
    assert planned.on_device == total


def test_plan_fits_a_mixture_that_is_pruned_in_4_bits(tmp_path):
    """The smallest ratio in 4 bits is smaller than with experts that are left in float32."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(GPT_OSS_20B))
    arguments = ["plan", str(file), "--units", "experts", "--fit", "10GiB", "--json"]
    found = CliRunner().invoke(main, [*arguments, "--quantize", "nf4"])
    fit = json.loads(found.output)["fit"]
    assert 0 < fit["pruning_ratio"] < 0.5 and fit["peak_bytes"] <= 10 * 2**30
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "found none" in refused.output


@pytest.mark.parametrize("family", ["gemma3"])
def test_towers_are_not_packed(family, make_model, tmp_path):
    with pytest.raises(LoRAMError, match=f"without a tower .* found {family}"):
        prune(str(make_model(family)), tmp_path / "out", PruningArgs(**PACKED))
    assert not (tmp_path / "out").exists()


def test_stacks_are_named_as_models_define_them():
    assert STACKS == ("experts.gate_up_proj", "experts.down_proj")
    assert isinstance(Linear4bit, type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [f if f == "mixtral" else pytest.param(f, marks=pytest.mark.matrix) for f in MIXTURES],
)
def test_train_packed_recover_merge(family, make_model, settings, tmp_path):
    """Train on packed experts; the merged original gives the logits of base + s B A by hand."""
    base = make_model(family)
    shares = {"experts": 0.5, "expert_neurons": 0.25}
    pruning = PACKED | ({"ratio": shares} if family == "mixtral" else {})
    section = {"pruning": pruning, "cache_dir": str(tmp_path / "cache")}
    del pruning["device"]
    latent = ["kv_b_proj", "o_proj"]
    attention = latent if family == "deepseek_v3" else [f"{name}_proj" for name in "qkvo"]
    changes = {
        "adapter": "qloram",
        "load_in_4bit": True,
        "lora_target_linear": False,
        "lora_target_modules": attention,
        "lora_target_parameters": NAMES,
        "lora_dropout": 0.0,
        "bnb_config_kwargs": {"bnb_4bit_quant_storage": "uint8"},  # inference casts to float32
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        **({"attn_implementation": "eager"} if family == "gpt_oss" else {}),
    }
    file = write_yaml(tmp_path / "run.yml", settings(base, loram=section, **changes))
    log = run_command("axolotl", "train", file, "--launcher", "python")
    assert "converting PEFT model w/ prepare_model_for_kbit_training" not in log.stdout + log.stderr
    if family == "mixtral":
        (made,) = (tmp_path / "cache").glob("*/loram.json")
        kept = json.loads(made.read_text())["parameters"]["kept_per_pruned_layer"]
        assert kept == {"experts": 2, "expert_neurons": 32}
    else:  # the others are in the matrix, which has the time
        checkpoint = str(tmp_path / "out/pruned/checkpoint-2")
        whole = (tmp_path / "out/adapter_model.safetensors").read_bytes()
        resumed = settings(base, loram=section, **changes, resume_from_checkpoint=checkpoint)
        run_command("axolotl", "train", write_yaml(file, resumed), "--launcher", "python")
        assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == whole
        run_command("axolotl", "evaluate", file)
        measured = run_command("axolotl-loram", "evaluate", file, "--json")
        (found,) = json.loads(measured.stdout)["perplexity"].values()
        pruned, adapted = (found["models"][name]["loss"] for name in ("pruned", "pruned+adapter"))
        assert adapted < pruned - 0.05
        said = run_command("axolotl", "inference", file, "--launcher", "python", input="def f():\n")
        assert "using the recovered adapter in" in said.stdout + said.stderr
    run_command("axolotl", "merge-lora", file)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits_of(model)
    by_hand(model, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-4, atol=1e-4)
    assert (logits_of(model) - before).abs().max() > 0.1
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-5, atol=1e-6)


def by_hand(model, adapter: Path, scale: float = 8 / 4) -> None:
    """Add s B A to each weight: of stacked experts, with rank r of each, in PEFT's layout."""
    from safetensors.torch import load_file

    held = load_file(adapter / "adapter_model.safetensors")
    parameters = {"lora_A.weight": "down_proj", "base_layer.lora_A.weight": "gate_up_proj"}
    for key, a in held.items():
        if "lora_A" not in key:
            continue
        b, path = held[key.replace("lora_A", "lora_B")], key.removeprefix("base_model.model.")
        module, _, part = path.partition(".experts.")
        if not part:
            model.get_parameter(path.replace("lora_A.", "")).data += scale * b @ a
            continue
        weight = model.get_parameter(f"{module}.experts.{parameters[part]}").data
        rank = len(a) // len(weight)
        for expert, own in enumerate(weight):
            b_own = b.view(len(b), rank, len(weight))[..., expert]
            update = scale * b_own @ a[expert * rank : (expert + 1) * rank]
            own += update if update.shape == own.shape and len(b) == own.shape[0] else update.T
