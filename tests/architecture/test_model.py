import itertools
import json

import numpy as np
import pytest
import torch
from conftest import build_model
from families import pico_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from axolotl_loram.architecture.config_json import (
    TIED,
    check_config,
    family_of,
    is_tied,
    load_config,
    own_fields,
    with_defaults,
)
from axolotl_loram.architecture.counts import _say_fewer, keep_counts, protected_layers, summary
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.model import config_changes, parameter_count, parameters, tensors
from axolotl_loram.architecture.spaces import Space, kept_features
from axolotl_loram.errors import LoRAMError

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LLAMA_31_70B = {**LLAMA_2_70B, "vocab_size": 128256}
LLAMA_2_13B = {
    **LLAMA_2_70B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


@pytest.mark.parametrize(
    ("config", "ratio", "base", "pruned", "reduction", "nominal"),
    [
        (LLAMA_2_70B, 0.65, 68_976_648_192, 28_099_436_544, 2.45, 9.82),
        (LLAMA_2_70B, 0.75, 68_976_648_192, 21_488_738_304, 3.21, 12.84),
        (LLAMA_2_70B, 0.85, 68_976_648_192, 16_272_924_672, 4.24, 16.95),
        (LLAMA_2_70B, 0.95, 68_976_648_192, 9_662_226_432, 7.14, 28.56),
        (LLAMA_31_70B, 0.85, 70_553_706_496, 17_849_982_976, 3.95, 15.81),
    ],
)
def test_counts_reproduce_the_papers_table(config, ratio, base, pruned, reduction, nominal):
    counted = summary(config, keep_counts(config, ratio, 4, 2))
    assert (counted["base_parameters"], counted["pruned_parameters"]) == (base, pruned)
    assert round(counted["parameter_reduction"], 2) == reduction
    assert round(counted["nominal_qloram_reduction"], 2) == nominal


def test_multi_head_rounding_reproduces_llama_2_13b():
    counts = keep_counts(LLAMA_2_13B, 0.65, 4, 2)
    assert sorted(counts) == list(range(4, 38))
    assert counts[4] == {"neurons": 4838, "kv_groups": 14}
    assert round(summary(LLAMA_2_13B, counts)["parameter_reduction"], 2) == 2.17


def test_ratios_are_taken_as_decimals_not_as_floats():
    config = {**LLAMA_2_13B, "num_attention_heads": 40}
    assert keep_counts(config, 0.9, 4, 2)[4]["kv_groups"] == 4  # 40 · (1 − 0.9) is 3.99… in floats


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 4}, {"tie_word_embeddings": True}])
def test_declaration_lists_exactly_the_real_models_tensors(family, sizes):
    model = build_model(family, **sizes)
    real = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {t.name: t.shape for t in tensors(model.config.to_dict())} == real
    assert parameter_count(model.config.to_dict()) == model.num_parameters()


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_declaration_knows_biases(biases):
    model = build_model("llama", **biases)
    assert {t.name for t in tensors(model.config.to_dict())} == {
        n for n, _ in model.named_parameters()
    }


@given(st.data())
def test_kept_features_are_the_units_blocks_in_each_segment(data):
    units, block, other = (data.draw(st.integers(1, 6)) for _ in range(3))
    kept = data.draw(st.lists(st.integers(0, units - 1), unique=True, min_size=1).map(sorted))
    sizes = {"heads": units, "dim": block, "fixed": other}
    fused = (Space("heads", ("dim",)), Space(block=("fixed",)), Space("heads"))
    expected = [u * block + i for u in kept for i in range(block)]
    expected += [units * block + i for i in range(other)]
    expected += [units * block + other + u for u in kept]
    assert kept_features(fused, sizes, {"heads": np.array(kept)}).tolist() == expected
    assert kept_features(fused, sizes, {"neurons": np.array([0])}) is None


def test_equal_layers_give_a_plain_homogeneous_config():
    config = {**LLAMA_2_70B, "num_hidden_layers": 4}
    changes = config_changes(config, keep_counts(config, 0.5, 0, 0))
    assert changes == {
        "head_dim": 128,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }


def test_heads_that_do_not_divide_the_hidden_size_are_given_per_layer():
    config = {**LLAMA_2_70B, "num_hidden_layers": 4}
    changes = config_changes(config, keep_counts(config, 0.7, 0, 0))  # 24 heads, 8192 hidden
    assert set(changes) == {"head_dim", "per_layer_config"}
    assert changes["per_layer_config"]["3"]["num_attention_heads"] == 24


@pytest.mark.parametrize(("layers", "whole"), [(2, []), (4, [0, 3]), (8, [0, 1, 6, 7])])
def test_shallow_models_protect_a_quarter_at_each_end_and_say_so(layers, whole, caplog):
    _say_fewer.cache_clear()  # said once in a process
    assert sorted(protected_layers(layers, 4, 2)) == whole
    assert "at most a quarter" in caplog.text


def test_deep_models_protect_what_was_asked_quietly(caplog):
    assert sorted(protected_layers(32, 4, 2)) == [0, 1, 2, 3, 30, 31]
    assert not caplog.text


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(LoRAMError, match="between 0 and 1"):
        keep_counts(LLAMA_2_70B, ratio, 4, 2)


def test_a_layer_without_a_kv_group_is_refused():
    with pytest.raises(LoRAMError, match=r"at most 0\.975"):
        keep_counts(LLAMA_2_13B, 0.99, 4, 2)


def test_unknown_architecture_says_how_to_add_one():
    with pytest.raises(LoRAMError, match=r"'mamba'.*CONTRIBUTING"):
        family_of({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gemma3_text", "num_kv_shared_layers"),
        ("phi", "qk_layernorm"),
        ("phi", "tie_word_embeddings"),
    ],
)
def test_a_structure_that_is_not_declared_is_refused_by_name(family, field):
    with pytest.raises(LoRAMError, match=f"expected a {family} model without {field}, found 2"):
        family_of({"model_type": family, field: 2})


def test_pruning_a_pruned_model_is_refused():
    with pytest.raises(LoRAMError, match="pruned already"):
        keep_counts({**LLAMA_2_70B, "per_layer_config": {"5": {}}}, 0.5, 4, 2)


@pytest.mark.parametrize("number", [int, str, "{:02}".format, "{:03}".format])
def test_a_layers_number_means_the_same_however_it_is_written(number):
    """Padded, as transformers saves it as soon as a layer above 9 has fields of its own."""
    counts = keep_counts(LLAMA_2_70B, 0.85, 4, 2)
    written = config_changes(LLAMA_2_70B, counts)
    own = written["per_layer_config"]
    config = {**LLAMA_2_70B, **written}
    again = config | {"per_layer_config": {number(int(key)): own[key] for key in own}}
    check_config(again)
    assert list(own_fields(again)) == sorted(counts)
    assert own_fields(again) == own_fields(config)
    assert list(parameters(again)) == list(parameters(config))
    with pytest.raises(LoRAMError, match="pruned already"):
        keep_counts(again, 0.5, 4, 2)


def test_a_layer_that_is_numbered_twice_is_refused():
    twice = {"4": {"intermediate_size": 8}, "04": {"intermediate_size": 16}}
    with pytest.raises(LoRAMError, match=r"layers 0…79, each once, found \{'4'"):
        check_config({**LLAMA_2_70B, "per_layer_config": twice})


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_config_json_leaves_out_mean_what_transformers_takes_them_for(family, tmp_path):
    row, raw = FAMILIES[family], pico_config(family).to_dict()
    optional = {"num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias"}
    optional |= {"mlp_bias", "num_local_experts", *row.defaults}
    section = raw[row.section] if row.section else raw
    section = {**section, "num_attention_heads": 64, "hidden_size": 512, "layer_types": None}
    for left_out in sorted(optional & set(section)):
        less = {key: value for key, value in section.items() if key != left_out}
        if row.section:
            less = {**raw, row.section: less}
        (tmp_path / "config.json").write_text(json.dumps(less))
        theirs = CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(less))).to_dict()
        listed = [(t.name, t.shape) for t in tensors(load_config(str(tmp_path)))]
        assert listed == [(t.name, t.shape) for t in tensors(theirs)], left_out


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.section])
def test_embeddings_are_tied_where_transformers_ties_them(family):
    """Savers of different versions say it of the whole model, of its language tower, or of both."""
    section, raw = FAMILIES[family].section, pico_config(family).to_dict()
    for whole, tower in itertools.product([{}, {TIED: True}, {TIED: False}], repeat=2):
        inner = {key: value for key, value in raw[section].items() if key != TIED}
        outer = {key: value for key, value in raw.items() if key != TIED}
        config = {**outer, **whole, section: {**inner, **tower}}
        with torch.device("meta"):
            settings = CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(config)))
            model = AutoModelForImageTextToText.from_config(settings)
        running = {name for name, _ in model.named_parameters()}
        for listed in (with_defaults(config), model.config.to_dict()):
            found = {tensor.name for tensor in parameters(listed)}
            assert is_tied(listed) == ("lm_head.weight" not in running), (whole, tower)
            assert found & {"lm_head.weight"} == running & {"lm_head.weight"}, (whole, tower)
