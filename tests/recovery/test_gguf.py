"""A recovered adapter becomes a GGUF file by the rules of llama.cpp's convert_lora_to_gguf.py.

The converter pairs ``….lora_A.weight`` with ``….lora_B.weight``, calls both after the base's tensor
(its name in the map of the base's architecture), and wants A (r, inputs) and B (outputs, r) of that
tensor's shape. It refuses any other name.
"""

import json

import gguf
import hostile
import numpy as np
import pytest
from safetensors.numpy import load_file

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.model import tensors
from axolotl_loram.recovery.recover import recover

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA}


def base_name(lora_tensor: str) -> str:
    """As `get_base_tensor_name` of the converter."""
    name = lora_tensor.replace("base_model.model.", "")
    return name.replace(".lora_A.weight", ".weight").replace(".lora_B.weight", ".weight")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_recovered_adapter_becomes_gguf(model_type, tmp_path):
    whole = hostile.Artefacts.make(tmp_path, model_type)
    folder = tmp_path / "recovered"
    recover(whole.adapter, str(whole.pruned), folder)
    adapter = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    config = load_config(settings["base_model_name_or_path"])  # what the converter reads too
    shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
    names = gguf.get_tensor_name_map(ARCHITECTURES[model_type], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", model_type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"])
    for name, matrix in adapter.items():
        called = names.get_name(base_name(name), try_suffixes=(".weight",))
        assert called is not None, name
        side = "lora_a" if ".lora_A." in name else "lora_b"
        writer.add_tensor(f"{called}.{side}", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert len(read) == len(adapter)
    for name in (name for name in adapter if ".lora_A." in name):
        called = names.get_name(base_name(name), try_suffixes=(".weight",))
        a, b = read[f"{called}.lora_a"], read[f"{called}.lora_b"]
        assert (b.shape[0], a.shape[1]) == shapes[base_name(name)]
        assert a.shape[0] == b.shape[1] == settings["r"]
        np.testing.assert_array_equal(b @ a, adapter[name.replace("_A.", "_B.")] @ adapter[name])
