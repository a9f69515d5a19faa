import json
import subprocess
import sys

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.models import patches
from axolotl_loram.models import per_layer as heterogeneous
from axolotl_loram.pruning.prune import prune

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture
def pruned(make_model, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    return tmp_path / "pruned"


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


def test_a_full_width_model_is_never_built_silently(pruned):
    script = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "AutoModelForCausalLM.from_config(config)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(pruned)], capture_output=True, text=True
    )
    assert result.returncode and "AmbiguousGlobalPerLayerAttributeError" in result.stderr


def test_an_implementation_that_builds_full_width_is_caught(pruned):
    """We step aside for transformers' own, but still look at what it built."""
    script = (
        "import sys; from transformers.integrations import heterogeneity\n"
        "heterogeneity.apply_heterogeneous_modeling = lambda model: None  # does nothing\n"
        "import axolotl_loram.heterogeneous\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "AutoModelForCausalLM.from_config(config)\n"
    )
    file = pruned / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"allow_global_per_layer_attribute_access": True, **config}))
    result = subprocess.run(
        [sys.executable, "-c", script, str(pruned)], capture_output=True, text=True
    )
    assert result.returncode and "LoRAMError: expected layers.1" in result.stderr


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


def test_it_steps_aside_for_transformers_own_implementation(monkeypatch):
    calls = []
    monkeypatch.setattr(patches, "_wrap", lambda cls, name, wrapper: calls.append(name))
    own = "apply_heterogeneous_modeling"
    monkeypatch.setattr(patches.heterogeneity, own, object(), raising=False)
    heterogeneous.install()
    assert calls == ["post_init"]  # its check stays
    monkeypatch.delattr(patches.heterogeneity, own)
    heterogeneous.install()
    assert calls[1:] == ["__init__", "set_attn_implementation", "post_init"]


def test_homogeneous_models_are_untouched():
    assert build_model().model.layers[1].mlp.up_proj.out_features == 48
