"""The lm_head and the embedding in fewer bits, or on the CPU: which, when, and that it works."""

import logging

import pytest
import torch
from axolotl.utils.dict import DictDefault
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import build_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.config import PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models.formats import Formats, choose_formats
from axolotl_loram.models.small_head import (
    OffloadedEmbedding,
    check_device,
    decide_formats,
    prepare_packed,
    store_small,
    store_small_once_sized,
    weight_bytes,
)
from axolotl_loram.models.stream import replace_linear
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

TOKENS = torch.arange(3, 60)[None]
VOCABULARY = 264
CPU_NF4, NATIVE = ("nf4", "cpu"), ("native", "native")
WIDE = {"hidden_size": 64, "head_dim": 16}  # bitsandbytes looks up rows of whole blocks of 64


def outputs(model):
    with torch.no_grad():
        return model.train()(TOKENS).logits


NUMBERS = VOCABULARY * 64


@pytest.mark.parametrize(
    ("formats", "classes", "error", "kept"),
    [
        (
            {"lm_head": "nf4"},
            (Linear4bit, nn.Embedding),
            0.15,
            NUMBERS // 2 + NUMBERS // 64 + 4 * (16 + 2 + 256 + 1),  # scales, their scales, offset
        ),
        ({"embedding": "cpu"}, (nn.Linear, OffloadedEmbedding), 0.0, 0),
    ],
)
def test_each_format_stands_for_the_weights_in_fewer_bytes(formats, classes, error, kept):
    model = build_model(**WIDE)
    expected, before = outputs(model), weight_bytes(model)
    model.enable_input_require_grads()  # as for gradient checkpointing, before
    store_small(model, Formats(**formats), VOCABULARY)
    assert isinstance(model.get_output_embeddings(), classes[0])
    assert isinstance(model.get_input_embeddings(), classes[1])
    difference = float((outputs(model) - expected).norm() / expected.norm())
    assert difference <= error and (difference > 0) == (error > 0)
    assert before - weight_bytes(model) == 4 * NUMBERS - kept
    assert model.get_input_embeddings()(TOKENS).requires_grad  # the hook moved along
    model.state_dict()


@pytest.mark.parametrize("outputs_", [24, 32, 264])
@pytest.mark.parametrize("inputs", [24, 32, 48, 64, 80])
def test_every_width_is_right_in_4_bits(inputs, outputs_):
    """Of pruned layers too: on CPUs with AVX512, bitsandbytes by itself is right for some only."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(inputs, outputs_, bias=False))
    weight, given = layer[0].weight.data, torch.randn(8, inputs)
    weight *= torch.logspace(-1, 1, weight.numel()).view_as(weight)  # no two scales are alike
    replace_linear(layer, "0", weight, torch.device("cpu"))
    with torch.no_grad():
        found = layer.eval()(given)
    assert type(layer[0]) is Linear4bit
    assert (found - given @ weight.T).norm() / found.norm() < 0.15
    own = layer[0].weight
    assert (dequantize_4bit(own.data, own.quant_state) - weight).norm() / weight.norm() < 0.11


def test_both_of_tied_embeddings_are_kept_small():
    model = build_model(tie_word_embeddings=True)
    expected, before = outputs(model), weight_bytes(model)
    store_small(model, Formats("nf4", "cpu"), VOCABULARY)
    assert float((outputs(model) - expected).norm() / expected.norm()) < 0.15
    assert before - weight_bytes(model) > 0.8 * VOCABULARY * 32 * 4


def test_an_offloaded_table_is_out_of_reach():
    """Of `model.to(device)`, of DistributedDataParallel, of the optimizer, of checkpoints."""
    model = build_model()
    store_small(model, Formats(embedding="cpu"), VOCABULARY)
    embedding = model.get_input_embeddings()
    model.to(torch.float64)
    assert embedding.weight.dtype == torch.float32 and not embedding.weight.requires_grad
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    assert not any("embed_tokens" in name for name in model.state_dict())


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return 3 * super().forward(tokens)


def test_an_embedding_that_scales_its_rows_does_so_on_the_cpu():
    model = build_model()
    scaled = Scaled(*model.model.embed_tokens.weight.shape, _weight=model.model.embed_tokens.weight)
    model.set_input_embeddings(scaled)
    expected = outputs(model)
    store_small(model, Formats(embedding="cpu"), VOCABULARY)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_parts_get_small_when_the_vocabulary_is_settled_and_no_later(tied):
    """Axolotl calls one of two methods for that, and then turns what is native to float32."""
    model = build_model(tie_word_embeddings=tied)
    store_small_once_sized(model, Formats("nf4", "cpu"))
    assert type(model.lm_head) is nn.Linear
    model.tie_weights()
    assert type(model.lm_head).__name__ == "Linear4bit"
    assert isinstance(model.get_input_embeddings(), OffloadedEmbedding)
    assert not {"tie_weights", "resize_token_embeddings"} & set(model.__dict__)
    resized = build_model(tie_word_embeddings=tied)
    store_small_once_sized(resized, Formats("nf4", "cpu"))
    resized.resize_token_embeddings(VOCABULARY + 8)
    assert type(resized.lm_head) is nn.Linear and resized.lm_head.out_features == VOCABULARY + 8
    assert not {"tie_weights", "resize_token_embeddings"} & set(resized.__dict__)


def test_a_resized_vocabulary_stays_native_or_is_refused():
    model = build_model()
    model.resize_token_embeddings(VOCABULARY + 8)
    store_small(model, Formats("nf4", "cpu"), VOCABULARY)
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    with pytest.raises(LoRAMError, match=r"lm_head_format: native.*nf4: the vocabulary was res"):
        store_small(model, Formats("nf4", asked=frozenset(["lm_head"])), VOCABULARY)


@pytest.mark.parametrize("format", ["native", "nf4"])
def test_an_lm_head_of_any_format_can_be_adapted_and_recovered(format, make_model, tmp_path):
    """PEFT saves the frozen weight of an adapted lm_head too, which packed is of no use."""
    base = make_model(**WIDE)
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    store_small(model, Formats(format, "cpu"), VOCABULARY)
    settings = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    frozen = {name for name in names if "lora_" not in name}
    assert len(frozen) == (format == "native")
    record = recover(tmp_path / "adapter", str(tmp_path / "pruned"))
    recovered = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), record["output"]
    )
    assert not torch.allclose(outputs(recovered), outputs(build_model(**WIDE)), atol=0.1)


def chosen(changes, section=(), config=(), packed_head=False):
    cfg = DictDefault({"load_in_4bit": True, **changes})
    section = LoRAMConfig(pruned_model_path="x", **dict(section))
    found = choose_formats(section, cfg, {"model_type": "llama", **dict(config)}, packed_head)
    return found.lm_head, found.embedding


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("changes", "section", "config", "expected"),
    [
        ({}, {}, {}, CPU_NF4),
        ({}, {}, TIED, CPU_NF4),
        ({"load_in_4bit": False}, {}, {}, NATIVE),
        ({"load_in_4bit": False}, {"lm_head_format": "nf4"}, {}, ("nf4", "native")),
        ({}, {"lm_head_format": "native"}, {}, ("native", "cpu")),
        ({}, {"embedding_format": "native"}, {}, ("nf4", "native")),
        ({"lora_modules_to_save": ["lm_head"]}, {}, {}, ("native", "cpu")),
        ({"lora_modules_to_save": ["lm_head"]}, {}, TIED, NATIVE),
        ({"lora_modules_to_save": ["embed_tokens"]}, {}, {}, ("nf4", "native")),
        ({"lora_modules_to_save": ["model.embed_tokens"]}, {}, {}, ("nf4", "native")),
        ({"lora_modules_to_save": ["other.embed_tokens"]}, {}, {}, CPU_NF4),
        ({"lora_target_modules": ["embed_tokens", "q_proj"]}, {}, {}, ("nf4", "native")),
        ({"lora_target_modules": ["lm_head"]}, {}, {}, CPU_NF4),
        ({"lora_target_modules": ".*(q_proj|embed_tokens)"}, {}, {}, ("nf4", "native")),
        ({"lora_target_modules": r"vision\.embed_tokens"}, {}, {}, CPU_NF4),
        (
            {"lora_target_modules": r"model\.language_model\.embed_tokens"},
            {},
            {"model_type": "gemma3"},
            NATIVE,  # tied
        ),
        ({"peft_trainable_token_indices": [5]}, {}, {}, NATIVE),
        ({"cut_cross_entropy": True}, {}, {}, ("native", "cpu")),
        ({"liger_fused_linear_cross_entropy": True}, {}, {}, ("native", "cpu")),
        ({"trl": {"use_liger_loss": True}}, {}, {}, ("native", "cpu")),
        ({"fsdp_config": {"offload_params": True}}, {}, {}, NATIVE),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, {}, {}, NATIVE),
        ({"deepspeed": "deepspeed_configs/zero3.json"}, {}, {}, NATIVE),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, {}, CPU_NF4),
    ],
)
def test_a_default_gives_way_to_what_needs_plain_weights(
    changes, section, config, expected, request, monkeypatch
):
    monkeypatch.chdir(request.config.rootpath)
    assert chosen(changes, section, config) == expected


@pytest.mark.parametrize(
    ("changes", "section", "config", "message"),
    [
        (
            {"cut_cross_entropy": True},
            {"lm_head_format": "nf4"},
            {},
            "expected `lm_head_format: native`, found nf4: cut_cross_entropy multiplies",
        ),
        ({"lora_modules_to_save": ["embed_tokens"]}, {"embedding_format": "cpu"}, {}, "whole"),
        ({"fsdp_config": {"x": 1}}, {"embedding_format": "cpu"}, {}, "FSDP and ZeRO-3"),
        ({"load_in_4bit": False}, {"lm_head_format": "nf4"}, TIED, "embeddings are tied"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(changes, section, config, message):
    with pytest.raises(LoRAMError, match=message):
        chosen(changes, section, config)


def test_a_default_that_gives_way_is_logged(caplog):
    with caplog.at_level(logging.INFO, "axolotl_loram"):
        chosen({"cut_cross_entropy": True})
    assert "keeping the lm_head in its native format, not nf4: cut_cross_entropy" in caplog.text


@pytest.mark.parametrize(
    ("changes", "section", "message"),
    [
        ({}, {"lm_head_format": "native"}, "lm_head_format is native"),
        ({"lora_modules_to_save": ["lm_head"]}, {}, "trains it whole.*quantize: nf4"),
    ],
)
def test_a_packed_lm_head_cannot_be_another(changes, section, message):
    assert chosen({}, packed_head=True) == CPU_NF4
    with pytest.raises(LoRAMError, match=message):
        chosen(changes, section, packed_head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False}, "`load_in_4bit: true`"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "FSDP or ZeRO-3"),
    ],
)
def test_a_packed_model_is_trained_in_4_bits_and_whole(changes, message, make_model, tmp_path):
    folder = tmp_path / "packed"
    prune(str(make_model()), folder, PruningArgs(ratio=0.5, quantize="nf4"))
    cfg = DictDefault({"load_in_4bit": True, "base_model": str(make_model())})
    section = LoRAMConfig(pruned_model_path=str(folder))
    assert decide_formats(section, cfg, folder).small == {"lm_head": "nf4", "embedding": "cpu"}
    with pytest.raises(LoRAMError, match=message):
        decide_formats(section, DictDefault({**cfg, **changes}), folder)
    making = LoRAMConfig(pruning=PruningArgs(ratio=0.5, quantize="nf4"))
    with pytest.raises(LoRAMError, match=message):
        decide_formats(making, DictDefault({**cfg, **changes}), None)

    model = AutoModelForCausalLM.from_pretrained(folder)
    prepare_packed(model, folder, torch.bfloat16)
    weight = model.lm_head.weight
    assert dequantize_4bit(weight.data, weight.quant_state).dtype == torch.bfloat16
    assert model.lm_head.compute_dtype == torch.bfloat16
    with pytest.raises(LoRAMError, match=r"found 300 tokens.*without quantize"):
        model.resize_token_embeddings(300)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a device that is not there")
def test_a_device_that_cannot_is_named():
    check_device("cpu")
    with pytest.raises(LoRAMError, match="does nf4, found mps"):
        check_device("mps")
