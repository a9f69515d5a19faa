"""Pruned checkpoints in 4 bits, against what load_in_4bit makes of the plain one."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_loram.architecture.counts import keep_counts
from axolotl_loram.architecture.model import config_changes, tensors
from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.nf4 import logical_shapes, nf4_sizes
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models import packing
from axolotl_loram.models.packing import Packing, plan_packing
from axolotl_loram.pruning.gather import needed_bytes
from axolotl_loram.pruning.prune import prune

TOKENS = torch.arange(3, 60)[None]


def settings_of(block=64, **changes):
    return PruningArgs(
        ratio=0.5, quantize="nf4", quantize_block_size=block, device="cpu", **changes
    )


def load_in_4bit(folder, skip):
    """As QLoRA loads the plain checkpoint, but with the lm_head in 4 bits where it has its own."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32
    )


def logits_of(model):
    with torch.no_grad():
        return model.train()(TOKENS).logits  # in eval mode bitsandbytes repacks for the CPU


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "tied"])
def test_it_is_the_model_that_load_in_4bit_makes(family, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 512)  # so that weights come in several
    sizes = {"tie_word_embeddings": True, "attention_bias": True} if family == "tied" else {}
    base = str(make_model(family.replace("tied", "llama"), **sizes))
    prune(base, tmp_path / "plain", PruningArgs(ratio=0.5))
    record = prune(base, tmp_path / "packed", settings_of())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    expected = load_in_4bit(tmp_path / "plain", None if sizes else ["none"])
    linear = {n: m for n, m in packed.named_modules() if isinstance(m, Linear4bit)}
    assert len(linear) == (4 if family == "phi3" else 7) * 4 + (not sizes)
    for name, module in linear.items():
        other = expected.get_submodule(name).weight
        assert torch.equal(module.weight.data, other.data)
        values = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(values, dequantize_4bit(other.data, other.quant_state))
    assert torch.equal(logits_of(packed), logits_of(expected))

    plan = PruningPlan.load(tmp_path / "packed")
    assert plan.digest == PruningPlan.load(tmp_path / "plain").digest
    check_pruned(tmp_path / "packed", plan)
    shapes = logical_shapes(Checkpoint(tmp_path / "packed").tensors)
    assert shapes == {n: t.shape for n, t in Checkpoint(tmp_path / "plain").tensors.items()}
    for file, digest in record["files"].items():
        assert hashlib.sha256((tmp_path / "packed" / file).read_bytes()).hexdigest() == digest


def sharded(make_model, folder):
    model = AutoModelForCausalLM.from_pretrained(make_model(), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return str(folder)


def test_files_are_packed_one_at_a_time_and_kept_after_an_interruption(
    make_model, tmp_path, monkeypatch
):
    base = sharded(make_model, tmp_path / "base")
    whole = prune(base, tmp_path / "whole", settings_of(128))
    calls, write = [], Packing._state

    def interrupted(self, *weight):
        calls.append(weight)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return write(self, *weight)

    monkeypatch.setattr(Packing, "_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(base, tmp_path / "packed", settings_of(128))
    assert not (tmp_path / "packed").exists()
    record = prune(base, tmp_path / "packed", settings_of(128))
    assert len(calls) < 12 + 29  # the files that were finished are not packed again
    assert record["files"] == whole["files"]
    stored = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert 0 < stored - record["weight_bytes"] < 40_000  # headers and the plan

    config = json.loads((tmp_path / "packed/config.json").read_text())
    index = json.loads((tmp_path / "packed/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == record["weight_bytes"]
    packing = plan_packing(config, Checkpoint(Path(base)).tensors, 128, "cpu")
    plan = PruningPlan.load(tmp_path / "packed")
    assert needed_bytes(Checkpoint(Path(base)), plan, packing) == record["weight_bytes"]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "packed"), "--json"])
    assert json.loads(shown.output)["quantize"] == "nf4"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert model.lm_head.weight.quant_state.blocksize == 128
    assert model.lm_head.weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (".absmax", "bytes in lm_head.weight.absmax for a weight of .264, 32.*found none"),
        (".quant_state.bitsandbytes__nf4", "4-bit state of lm_head.weight"),
    ],
)
def test_a_damaged_one_is_refused(part, message, make_model, tmp_path):
    prune(str(make_model()), tmp_path / "packed", settings_of())
    file = tmp_path / "packed/model.safetensors"
    stored = load_file(file)
    broken = stored.pop(f"lm_head.weight{part}")
    if part != ".absmax":
        stored[f"lm_head.weight{part}"] = torch.zeros_like(broken)
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(LoRAMError, match=message):
        check_pruned(tmp_path / "packed", PruningPlan.load(tmp_path / "packed"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_cannot_is_refused_before_pruning(make_model, tmp_path):
    arguments = ["prune", str(make_model()), str(tmp_path / "out"), "--pruning-ratio", "0.5"]
    result = CliRunner().invoke(main, [*arguments, "--quantize", "nf4", "--device", "cuda"])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "expected a device on which bitsandbytes does nf4, found cuda" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "quantize": "nf4"}, "quantize with a pruning ratio"),
        ({"ratio": 0.5, "quantize": "nf4", "quantize_block_size": 96}, "64, 128 or 256, found 96"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(LoRAMError, match=message):
        PruningArgs.parse(**options)


@pytest.mark.parametrize(
    ("size", "vocabulary", "neurons", "gib", "within"),
    [
        pytest.param(80, 128256, 28672, 8.31, {64: True, 128: True}, id="LLaMA-3.1-70B"),
        pytest.param(80, 32000, 28672, 7.58, {64: False, 128: True}, id="LLaMA-2-70B"),
    ],
)
def test_the_papers_figures_in_bytes_on_the_device(size, vocabulary, neurons, gib, within):
    """All linear layers and the lm_head packed, norms in 16 bits, the embedding on the CPU."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": size,
        "vocab_size": vocabulary,
        "hidden_size": 8192,
        "intermediate_size": neurons,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    pruned = {**config, **config_changes(config, keep_counts(config, 0.85, 4, 2))}
    for block, fits in within.items():
        total = 0  # bytes
        for tensor in tensors(pruned):
            if len(tensor.shape) == 1:
                total += 2 * tensor.shape[0]
            elif tensor.module != "model.embed_tokens":
                total += sum(nf4_sizes(math.prod(tensor.shape), block).values())
        assert (total / 2**30 <= gib) == fits
