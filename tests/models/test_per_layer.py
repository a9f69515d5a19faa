import json

import pytest
import torch
from bare import Bare
from conftest import build_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models import per_layer as heterogeneous
from axolotl_loram.pruning.prune import prune

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture
def pruned(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    return tmp_path / "pruned"


@pytest.fixture(scope="module")
def bare():
    with Bare() as process:
        yield process


def test_save_load_and_generate(pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned).eval()
    assert model.model.layers[1].mlp.up_proj.out_features == 24
    assert model.model.layers[0].mlp.up_proj.out_features == 48
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    cached, uncached = (
        model.generate(
            TOKENS, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None
        )
        for cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_bitsandbytes_builds_narrow_4_bit_layers_and_peft_trains_them(pruned):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(pruned, quantization_config=quantization)
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.out_features == 24
    assert layer.weight.numel() == 24 * 32 // 2
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def test_attention_can_be_chosen_after_loading(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned, attn_implementation="sdpa").eval()
    expected = model(TOKENS).logits
    model.set_attn_implementation("eager")
    used = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    assert used == {"eager"}
    result = model(TOKENS, output_attentions=True)
    assert [a.shape[1] for a in result.attentions] == [4, 2, 2, 4]  # heads of each layer
    torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-4)


def test_static_caches_have_each_layers_heads(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(TOKENS, **options)
    static = model.generate(TOKENS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(dynamic, static)


def test_a_full_width_model_is_never_built_silently(pruned, bare, tmp_path):
    script = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "AutoModelForCausalLM.from_config(config)"
    )
    result = bare.run(script, pruned, scratch=tmp_path)
    assert result.returncode and "AmbiguousGlobalPerLayerAttributeError" in result.stderr


NATIVE = """
import json, sys
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import heterogeneity
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

SAYS, BUILDS, RAISES = json.loads(sys.argv[1])

def find(model):
    if model.config.model_type in SAYS:
        return SimpleNamespace(layer_cls=LlamaDecoderLayer)
    if RAISES:
        raise ValueError("No heterogeneous modeling spec is defined")

def build(layer, config, layer_idx):
    build.calls += 1
    whole = not (BUILDS and config.is_heterogeneous)
    plain(layer, config if whole else config.per_layer_config[layer_idx], layer_idx)

build.calls, plain = 0, LlamaDecoderLayer.__init__
LlamaDecoderLayer.__init__ = build
heterogeneity.get_heterogeneous_modeling_spec = find
import axolotl_loram.heterogeneous

for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    print(model(torch.arange(3, 40)[None]).logits.sum().item())
ours = [hasattr(cls.__init__, "_loram_per_layer") for cls in (LlamaDecoderLayer, Qwen3DecoderLayer)]
print(ours, build.calls)
"""
"""A transformers that builds Llama itself, as its pull request 45332 does: it lists families."""


@pytest.mark.parametrize("raises", [False, True], ids=["finds nothing", "raises"])
def test_it_steps_aside_for_the_families_that_transformers_builds(
    raises, pruned, make_model, bare, tmp_path
):
    prune(str(make_model("qwen3")), tmp_path / "qwen3", PruningArgs(ratio=0.5))
    folders = (pruned, tmp_path / "qwen3")
    expected = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    how = json.dumps([["llama"], True, raises])
    done = bare.run(NATIVE, how, *folders, scratch=tmp_path)
    *sums, ours = done.stdout.splitlines()
    sums = [float(line.split()[0]) for line in sums]
    assert sums == pytest.approx([m(TOKENS).logits.sum().item() for m in expected]), done.stderr
    assert ours == "[False, True] 4"


def test_an_implementation_that_builds_full_width_is_caught(pruned, bare, tmp_path):
    """We step aside for transformers' own, but still look at what it built."""
    how = json.dumps([["llama"], False, False])
    done = bare.run(NATIVE, how, pruned, scratch=tmp_path)
    assert done.returncode and "LoRAMError: expected layers.1" in done.stderr


def test_widths_are_checked_after_building(pruned):
    model = build_model()
    model.config = AutoConfig.from_pretrained(pruned)
    with pytest.raises(LoRAMError, match=r"layers\.1\.self_attn\.q_proj .* \[16, 32\], found \[32"):
        heterogeneous.check_widths(model)


def test_ignoring_mismatched_sizes_does_not_widen_the_model(pruned, make_model):
    config = json.loads((pruned / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        make_model(), config=AutoConfig.from_pretrained(pruned), ignore_mismatched_sizes=True
    )
    assert model.model.layers[2].mlp.down_proj.in_features == 24
    assert config["per_layer_config"]["2"]["intermediate_size"] == 24


def test_homogeneous_models_are_untouched():
    assert build_model().model.layers[1].mlp.up_proj.out_features == 48
