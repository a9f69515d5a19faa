"""A recovered adapter as GGUF: by llama.cpp's converter, and run by llama.cpp as by PEFT."""

import json
import shutil
from pathlib import Path

import llamacpp
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_story import IDS, Story, difference, every
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.cli import main
from axolotl_loram.errors import LoRAMError
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.results import converter, export, gguf


@pytest.fixture
def warm(monkeypatch):
    monkeypatch.setattr(export, "run_script", llamacpp.warmly)


@pytest.mark.parametrize("family", every(gguf.ARCHITECTURES))
def test_every_family_runs_in_llama_cpp_as_in_peft(family, warm, tmp_path):
    story = Story(tmp_path, family)
    llamacpp.model_gguf(story.base, story.gguf)
    told = export.export(story.recovered, tmp_path / "out", base_gguf=story.gguf)
    assert told["architecture"] == gguf.ARCHITECTURES[family][0]
    engine = llamacpp.Engine(story.gguf, tmp_path / "out/adapter.gguf")
    before, after = story.with_peft()
    update = difference(before, after)
    assert update > 1e-3  # measured 0.0016 to 0.21
    assert difference(engine.logprobs(IDS, len(before), scale=0.0), before) < 0.05 * update
    assert difference(engine.logprobs(IDS, len(after)), after) < 0.05 * update


SCALES = {
    "rslora": {"use_rslora": True},
    "alpha-of-some": {"alpha_pattern": {"q_proj": 0.5, r"layers\.1\.mlp\.up_proj": 1}},
}


@pytest.mark.parametrize("settings", SCALES.values(), ids=SCALES)
def test_scales_of_peft_that_the_converter_does_not_know(settings, warm, tmp_path):
    story = Story(tmp_path, **settings)
    llamacpp.model_gguf(story.base, story.gguf)
    export.export(story.recovered, tmp_path / "out", base_gguf=story.gguf)
    found = llamacpp.Engine(story.gguf, tmp_path / "out/adapter.gguf").logprobs(IDS, 264)
    assert difference(found, story.with_peft()[1]) < 2e-3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A recovered adapter and its export, by the command itself."""
    story = Story(tmp_path_factory.mktemp("story"))
    llamacpp.model_gguf(story.base, story.gguf)
    arguments = [story.recovered, story.recovered.parent / "out", "--base-gguf", story.gguf]
    ran = CliRunner().invoke(main, ["export", *map(str, arguments), "--json"])
    assert ran.exit_code == 0, ran.output
    story.told = json.loads(ran.stdout)
    return story


def test_the_command_writes_file_and_modelfile(exported):
    out = exported.recovered.parent / "out"
    assert exported.told == {
        "output": str(out),
        "file": str(out / "adapter.gguf"),
        "architecture": "llama",
        "tensors": 56,  # A and B of 7 linear layers in each of 4
        "alpha": 0.25,
        "checked_against": str(exported.gguf),
        "template": False,
    }
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {exported.gguf}", "ADAPTER ./adapter.gguf"]
    assert sorted(file.name for file in out.iterdir()) == ["Modelfile", "adapter.gguf"]


def whole(tensors):
    return tensors


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def with_one_more(tensors):
    return {**tensors, "output.weight.lora_a": next(iter(tensors.values()))}


def swapped(tensors):
    """A for B and B for A."""
    other = {"a": "b", "b": "a"}
    return {f"{name[:-1]}{other[name[-1]]}": values for name, values in tensors.items()}


def in_the_order_of_transformers(tensors):
    name = "blk.0.attn_q.weight.lora_b"
    heads = tensors[name].reshape(4, -1, 2, tensors[name].shape[1])
    return {**tensors, name: heads.swapaxes(1, 2).reshape(tensors[name].shape)}


def with_one_value_off(tensors):
    name = "blk.2.ffn_down.weight.lora_a"
    values = tensors[name].copy()
    values[1, 3] *= 1.01
    return {**tensors, name: values}


BROKEN = {
    "scale": (whole, {"alpha": 0.5}, "adapter.lora.alpha to be 0.25"),
    "no-scale": (whole, {"alpha": None}, "adapter.lora.alpha to be 0.25 .* found None"),
    "architecture": (whole, {"architecture": "qwen2"}, "general.architecture to be llama"),
    "lost": (without_one, {}, "lora_a to be it .* found none"),
    "too-many": (with_one_more, {}, "output.weight.lora_a to be no such tensor .* found one"),
    "swapped": (swapped, {}, r"lora_a to be \[2, "),
    "order": (in_the_order_of_transformers, {}, "B A of blk.0.attn_q.weight"),
    "value": (with_one_value_off, {}, "B A of blk.2.ffn_down.weight"),
}


@pytest.mark.parametrize(("change", "header", "said"), BROKEN.values(), ids=BROKEN)
def test_what_the_converter_could_do_wrong_is_seen(exported, change, header, said, tmp_path):
    import gguf as package

    header = {"architecture": "llama", "alpha": 0.25, **header}
    written = {t.name: t.data for t in package.GGUFReader(exported.told["file"]).tensors}
    file = tmp_path / "adapter.gguf"
    writer = package.GGUFWriter(file, header["architecture"])
    writer.add_type(package.GGUFType.ADAPTER)
    writer.add_string(package.Keys.Adapter.TYPE, "lora")
    if header["alpha"] is not None:
        writer.add_float32(package.Keys.Adapter.LORA_ALPHA, header["alpha"])
    for name, values in change(written).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter, config = Adapter.open(exported.recovered), load_config(str(exported.base))
    pairs = gguf.pairs_of(export.loras_of(adapter, config).values(), config)
    with pytest.raises(LoRAMError, match=said):
        gguf.check_adapter_file(file, pairs, config, 0.25)


@pytest.fixture
def refused(exported, tmp_path):
    """The sentence that `export` ends with; nothing is written, and no converter run."""

    def sentence(adapter=None, **options):
        out = tmp_path / "refused"
        with pytest.raises(LoRAMError) as error, pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "run_script", lambda *_: pytest.fail("the work began"))
            export.export(adapter or exported.recovered, out, **options)
        assert not out.exists()
        return str(error.value)

    return sentence


def test_bad_input_is_refused_before_the_work(exported, refused, tmp_path, monkeypatch):
    assert "run axolotl-loram recover first" in refused(exported.trained)
    assert "expected a PEFT adapter with adapter_config.json" in refused(exported.base)
    assert "convert_lora_to_gguf.py in" in refused(llama_cpp=tmp_path)
    assert "expected a GGUF file" in refused(base_gguf=exported.base / "config.json")
    adapter_file = Path(exported.told["file"])
    assert "type adapter and architecture llama" in refused(base_gguf=adapter_file)
    other = Path(shutil.copytree(exported.recovered, tmp_path / "other"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(exported.base, elsewhere)
    config = json.loads((elsewhere / "config.json").read_text())
    for changes, said in (
        ({"model_type": "vit"}, "expected a model type out of llama"),
        ({"num_hidden_layers": 3}, "layers"),
        ({"intermediate_size": 40}, "mlp"),
    ):
        (elsewhere / "config.json").write_text(json.dumps(config | changes))
        assert said in refused(base=str(elsewhere))
    for alpha in (0, "16", None):
        exported.set(other, lora_alpha=alpha)
        assert "lora_alpha" in refused(other)
    exported.set(other, peft_type="IA3")
    assert "LORA" in refused(other)
    monkeypatch.setattr(converter, "VENDOR", "no_such_package")
    assert "pip install 'axolotl-loram[gguf]'" in refused()


def test_the_gguf_of_another_base_is_refused(exported, refused, tmp_path):
    import gguf as package

    def written(architecture, layers, shape):
        file = tmp_path / "other.gguf"
        writer = package.GGUFWriter(file, architecture)
        writer.add_type(package.GGUFType.MODEL)
        writer.add_block_count(layers)
        writer.add_tensor("blk.0.attn_q.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    assert "architecture llama" in refused(base_gguf=written("qwen2", 4, (32, 32)))
    assert "of 4 layers, found 5" in refused(base_gguf=written("llama", 5, (32, 32)))
    assert "blk.0.attn_q.weight of shape [32, 32]" in refused(
        base_gguf=written("llama", 4, (48, 32))
    )


def test_what_llama_cpp_has_no_place_for_is_refused(exported, refused, tmp_path):
    """A module saved whole, and an embedding's LoRA, both as PEFT writes them."""
    for number, settings in enumerate(
        ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]})
    ):
        model = AutoModelForCausalLM.from_pretrained(exported.base)
        targets = {"target_modules": ["q_proj"], **settings}
        adapter = tmp_path / str(number)
        get_peft_model(model, LoraConfig(r=2, **targets)).save_pretrained(adapter)
        assert "expected LoRA on linear layers alone" in refused(adapter)


def test_a_converter_that_fails_is_told_of(exported, tmp_path):
    (tmp_path / "convert_lora_to_gguf.py").write_text("raise SystemExit('no such tensor')")
    with pytest.raises(LoRAMError, match="convert this, found that it said: no such tensor"):
        export.export(exported.recovered, tmp_path / "out", llama_cpp=tmp_path)
    assert not (tmp_path / "out").exists()
