"""Checkpoints published in MXFP4 and FP8, against transformers' own dequantization, bit for bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command, write_yaml
from quantize import to_fp8, to_mxfp4
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import stored
from axolotl_loram.files.progress import no_progress
from axolotl_loram.files.quantized import format_of, without_format
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.bits import from_bits
from axolotl_loram.models.four_bit import dequantized
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.plain_base import plain_base, write_plain

NARROW = {"intermediate_size": 64}  # whole blocks of 32


@pytest.fixture
def published(make_model, tmp_path):
    """Makes a folder as its publisher would: gpt-oss in MXFP4, others in FP8."""

    def make(family: str, block=(8, 8), **sizes) -> Path:
        own = NARROW if family == "gpt_oss" else {}
        folder = shutil.copytree(make_model(family, **own, **sizes), tmp_path / "published")
        return to_mxfp4(folder) if family == "gpt_oss" else to_fp8(folder, block)

    return make


def plain_copy(folder: Path, copy: Path) -> Path:
    """The same model in plain numbers, as `merge-lora` has it."""
    copy.mkdir()
    write_plain(Checkpoint(folder), copy, no_progress)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(without_format(config)))
    for file in folder.glob("*token*"):
        shutil.copy(file, copy)
    return copy


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, but for what a NaN is made of."""
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    nan = one.isnan()
    alike = torch.equal(one[~nan].view(bits), other[~nan].view(bits))
    return one.dtype == other.dtype and torch.equal(nan, other.isnan()) and alike


@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("gpt_oss", None),
        ("qwen3", (8, 8)),
        ("qwen3", None),
        ("qwen3_moe", (8, 8)),
        ("deepseek_v3", (4, 8)),
    ],
)
def test_every_weight_is_what_transformers_makes_of_it(family, block, published):
    folder = published(family, block)
    config = load_config(str(folder))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **dequantized(config)
    )
    stream = LayerStream(Checkpoint(folder), config, "cpu", dtype=torch.bfloat16)
    for index, layer in enumerate(model.model.layers):
        expected, found = layer.state_dict(), stream.layer(index).state_dict()
        assert expected.keys() == found.keys()
        assert [n for n in found if not same(found[n].bfloat16(), expected[n].bfloat16())] == []


def test_every_byte_and_exponent_of_mxfp4(tmp_path):
    byte = torch.arange(256, dtype=torch.uint8)
    packed = byte.view(1, 16, 1, 16).expand(256, 16, 1, 16).contiguous()
    scales = byte.view(256, 1, 1).expand(256, 16, 1).contiguous()
    save_file({"e_blocks": packed, "e_scales": scales}, tmp_path / "model.safetensors")
    weight = Checkpoint(tmp_path)["e"]
    expected = convert_moe_packed_tensors(packed, scales)
    assert same(from_bits(weight.read(), "BF16"), expected)
    assert same(from_bits(weight.part(130).read(), "BF16"), expected[130].contiguous())


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "uint8", "float8_e8m0fnu", "one"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_byte_of_fp8_under_every_kind_of_scale(scale, dtype, tmp_path):
    torch.manual_seed(0)
    bits = torch.arange(256, dtype=torch.uint8)
    weight = torch.cat([bits, bits.flip(0)]).view(16, 32).view(torch.float8_e4m3fn)
    if scale == "one":
        scales = torch.tensor(0.37)
    elif "8" in scale:
        scales = torch.randint(110, 140, (2, 4), dtype=torch.uint8).view(getattr(torch, scale))
    else:
        scales = torch.rand(2, 4).to(getattr(torch, scale))
    held = {"a.weight": weight, "a.weight_scale_inv": scales}
    save_file(held | {"a.activation_scale": torch.ones(())}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": dtype}))
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a.weight"] and len(checkpoint.stored) == 3
    found = from_bits(checkpoint["a.weight"].read(), checkpoint["a.weight"].dtype)
    rounded = getattr(torch, dtype)
    assert same(found, Fp8Dequantize(None)._dequantize_one(weight, scales, rounded))


@pytest.mark.parametrize("section", [None, "text_config"])
def test_the_last_blocks_may_be_narrower(section, tmp_path):
    """DeepSeek V3's kv_a_proj_with_mqa has 576 outputs in blocks of 128.

    What the section of a language tower says counts as what is said of the whole model.
    """
    torch.manual_seed(0)
    weight, scales = torch.randn(20, 19).to(torch.float8_e4m3fn), torch.rand(3, 3)
    held = {"a.weight": weight, "a.weight_scale_inv": scales}
    save_file(held, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    own = config | {"dtype": "float16"}
    config = {section: own, "model_type": "x"} if section else own
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = scales.repeat_interleave(8, 0)[:20].repeat_interleave(8, 1)[:, :19]
    found = from_bits(Checkpoint(tmp_path)["a.weight"].read(), "F16")
    assert same(found, (weight.float() * whole).half())
    assert format_of(config) == "fp8" and format_of(without_format(config)) is None


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_parts_are_parts_of_the_whole(family, published, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", 1000)
    found = Checkpoint(published(family)).tensors.values()
    for tensor in (tensor for tensor in found if isinstance(tensor, stored.Quantized)):
        whole = tensor.read()
        rows = np.arange(0, tensor.shape[0], 3)
        blocks = list(tensor.blocks(rows))
        assert (np.concatenate(blocks) == whole[rows]).all()
        assert max(map(len, blocks)) == min(len(rows), max(1, 1000 // whole[0].nbytes))
        assert (tensor.read_bytes(7, 90) == whole.reshape(-1).view(np.uint8)[7:97]).all()
        if len(tensor.shape) == 3:
            part = tensor.part(1)
            assert (part.read() == whole[1]).all() and part.shape == tensor.shape[1:]
            assert (np.concatenate([*part.blocks(np.array([0, 5]))]) == whole[1][[0, 5]]).all()
            assert (np.concatenate([*part.blocks()]) == whole[1]).all()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt_oss", {"units": "experts,kv_groups"}),
        ("gpt_oss", {"units": "experts,expert_neurons", "method": "magnitude"}),
        ("qwen3_moe", {"method": "activation", "calibration_samples": 4, "calibration_length": 32}),
        ("qwen3", {"quantize": "nf4", "device": "cpu"}),
        ("qwen3", {"sparsity": 0.5, "ratio": None, "method": "magnitude"}),
    ],
)
def test_pruning_it_is_pruning_it_in_plain_numbers(
    family, settings, published, tmp_path, text_file
):
    folder = published(family)
    if "calibration_samples" in settings:
        settings = {**settings, "calibration_path": str(text_file)}
    args = PruningArgs(**{"ratio": 0.5, "method": "random", "refit": False, **settings})
    record = prune(str(folder), tmp_path / "pruned", args)
    expected = prune(str(plain_copy(folder, tmp_path / "plain")), tmp_path / "expected", args)
    names = [name for name in expected["files"] if name.startswith("model")]
    assert names and {n: record["files"][n] for n in names} == {
        n: expected["files"][n] for n in names
    }
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert config == json.loads((tmp_path / "expected/config.json").read_text())
    assert record["base"]["fingerprint"] == Checkpoint(folder).fingerprint()
    assert record["base"]["fingerprint"] != expected["base"]["fingerprint"]  # as it is stored


def spoil(folder: Path, quantization: dict | None = None, without: str = "") -> Path:
    """Change what a config says of its format, or leave out the tensors of a name."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= quantization or {}
    file.write_text(json.dumps(config))
    for shard in folder.glob("*.safetensors") if without else ():
        from safetensors.torch import load_file

        held = load_file(shard)
        save_file({n: t for n, t in held.items() if without not in n}, shard, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"quant_method": "awq"}}, "16 or 32 bits, MXFP4 or FP8, found .* 'awq'"),
        (
            {"quantization": {"quant_method": "compressed-tensors"}},
            "found quantization_config 'compressed-te",
        ),
        ({"quantization": {"weight_block_size": [8]}}, "two positive numbers .* found .8."),
        ({"quantization": {"weight_block_size": [0, 8]}}, "two positive numbers"),
        ({"without": "q_proj.weight_scale_inv"}, "q_proj.weight of F8_E4M3 without"),
    ],
)
def test_formats_that_are_not_read_are_refused(changes, message, published, tmp_path):
    folder = spoil(published("qwen3"), **changes)
    with pytest.raises(LoRAMError, match=message):
        prune(str(folder), tmp_path / "out", PruningArgs(ratio=0.5, method="random", refit=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a_blocks": torch.zeros(2, 3, 1, 16), "a_scales": torch.zeros(2, 3, 1)}, "F32"),
        (
            {
                "a_blocks": torch.zeros(2, 3, 1, 8, dtype=torch.uint8),
                "a_scales": torch.zeros(2, 3, 1, dtype=torch.uint8),
            },
            r"blocks of 32 numbers .* found U8 .2, 3, 1, 8",
        ),
        (
            {
                "a.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
                "a.weight_scale_inv": torch.zeros(3, 3),
            },
            r"for each block .* of its .8, 8. numbers, found F32 .3, 3.",
        ),
    ],
)
def test_scales_of_other_weights_are_refused(held, message, tmp_path):
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(LoRAMError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_what_is_merged_into_is_the_base_in_plain_numbers(family, published, tmp_path, caplog):
    """Any program loads it; it is gone afterwards; a base in plain numbers is taken as it is."""
    folder, place = published(family), tmp_path / "merged-base"
    caplog.set_level("INFO", "axolotl_loram")
    with plain_base(str(folder), None, place, no_progress) as base:
        found, expected = (
            AutoModelForCausalLM.from_pretrained(at, dtype=torch.bfloat16, **options).state_dict()
            for at, options in ((base, {}), (folder, dequantized(load_config(str(folder)))))
        )
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert found.keys() == expected.keys()
        with plain_base(base, None, tmp_path / "other", no_progress) as again:
            assert again == base and not (tmp_path / "other").exists()
    assert not place.exists() and "the merged model is stored in BF16" in caplog.text


def test_no_room_for_a_plain_copy_is_said_before(published, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(LoRAMError, match=r"GiB free for .*merged-base"),
        plain_base(str(published("qwen3")), None, tmp_path / "merged-base", no_progress),
    ):
        raise AssertionError("there is no room")
    assert not (tmp_path / "merged-base").exists()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_train_evaluate_and_merge_into_what_was_published(family, published, settings, tmp_path):
    """The merged model is, tensor by tensor, the base in plain numbers plus s B A."""
    base = published(family)
    changes = {"lora_target_linear": False, "lora_target_parameters": EXPERTS}
    projections = [f"{name}_proj" for name in "qkvo"]
    pruning = {"ratio": 0.5, "method": "random", "refit": False}
    section = {"pruning": pruning, "cache_dir": str(tmp_path / "cache")}
    attention = {"attn_implementation": "eager"} if family == "gpt_oss" else {}
    run = settings(
        base,
        **{**changes, **attention, "lora_target_modules": projections, "lora_dropout": 0.0},
        loram=section,
    )
    file = write_yaml(tmp_path / "run.yml", run)
    run_command("axolotl", "train", file, "--launcher", "python")
    log = run_command("axolotl", "merge-lora", file)
    form = "MXFP4" if family == "gpt_oss" else "FP8"
    assert f"is stored in {form}" in log.stdout + log.stderr
    assert not (tmp_path / "out/merged-base").exists()
    names = ("--models", "base,base+recovered")
    shown = run_command("axolotl-loram", "evaluate", file, *names)
    assert "base+recovered" in shown.stdout

    from peft import PeftModel

    plain = plain_copy(base, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float32)
    changed = set()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, adapted[name].bfloat16().float(), rtol=2**-7, atol=2**-8)
        changed |= {name.split(".")[-2 if name.endswith("weight") else -1]}
        if torch.equal(value, before[name]):
            changed -= {name.split(".")[-2 if name.endswith("weight") else -1]}
    assert changed == {*projections, "gate_up_proj", "down_proj"}
    dtype, told = ("BF16", "BF16") if family == "gpt_oss" else ("F32", "torch.float32")
    assert {t.dtype for t in Checkpoint(tmp_path / "out/merged").tensors.values()} == {dtype}
    assert f"the merged model is stored in {told} " in log.stdout + log.stderr
