"""`inspect` on what LoRAM has not made: what it is, what pruning would leave, what to do next."""

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import build_model, byte_tokenizer
from families import FAMILIES
from safetensors.numpy import load_file, save_file

from axolotl_loram.cli import main


def loram(*arguments: object):
    return CliRunner().invoke(main, list(map(str, arguments)))


def told(*arguments: object) -> dict:
    return json.loads(loram("inspect", *arguments, "--json").stdout)


def test_a_model_is_told_with_what_plan_would_say(make_model):
    base = make_model(num_hidden_layers=32)
    found = told(base)
    assert (found["kind"], found["model_type"], found["layers"]) == ("model", "llama", 32)
    assert found["units_of_a_layer"] == {"neurons": 48, "kv_groups": 2}
    assert found["layers_left_whole"] == [0, 1, 2, 3, 30, 31]
    assert (found["stored_as"], found["weight_bytes"]) == ("F32", 4 * found["parameters"])
    planned = json.loads(loram(*shlex.split(found["next"])[1:], "--json").stdout)
    first = found["pruned"][0]
    assert first["pruning_ratio"] == 0.5
    for name in ("pruned_parameters", "parameter_reduction", "kept_per_pruned_layer"):
        assert first[name] == planned[name]
    shown = loram("inspect", base).stdout
    assert "48 neurons, 2 kv groups" in shown and "pruned at 0.85" in shown
    assert "tied embeddings    no" in shown


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_told(make_model, family, tmp_path):
    """From the config alone, too: of a hub id, no weights are downloaded for it."""
    from conftest import pico_config

    pico_config(family).save_pretrained(tmp_path)
    found = told(tmp_path)
    assert found["kind"] == "model" and found["units_of_a_layer"]
    assert found["pruned"][0]["pruned_parameters"] < found["parameters"]
    assert "weight_bytes" not in found


def test_weights_of_another_config_are_refused(make_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = np.ones(31, np.float32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    result = loram("inspect", tmp_path)
    assert result.exit_code == 1 and "model.norm.weight of shape [32]" in result.stderr


def test_what_cannot_be_pruned_says_why(make_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert "16 bits" in told(tmp_path)["cannot_be_pruned"]


def test_an_ordinary_adapter_is_told(make_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build_model()
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = told(tmp_path)
    assert (found["kind"], found["rank"], found["target_modules"]) == ("adapter", 3, "q_proj")
    assert "lora_model_dir" in loram("inspect", tmp_path).stdout
