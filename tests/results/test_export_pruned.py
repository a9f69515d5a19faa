"""Pruned models as GGUF, run by llama.cpp as by transformers."""

from dataclasses import replace

import llamacpp
import pytest
from gguf_story import HALF, IDS, difference, load, logprobs, write_base

import axolotl_loram.heterogeneous  # noqa: F401  (to load pruned models)
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.pruning.prune import prune
from axolotl_loram.results import export, export_pruned, gguf

EQUAL = {"protect_first": 0, "protect_last": 0}
OTHERS = gguf.ARCHITECTURES.keys() - {*export_pruned.EQUAL, "gpt_neox"}
"""Of GPT-NeoX the converter wants a field that `any_tokenizer` alone gives it."""


@pytest.fixture
def warm(monkeypatch):
    monkeypatch.setattr(export_pruned, "run_script", llamacpp.warmly)


@pytest.fixture
def pruned(tmp_path):
    def make(family, **settings):
        write_base(family, tmp_path / "base")
        prune(str(tmp_path / "base"), tmp_path / "pruned", PruningArgs.parse(**HALF | settings))
        return tmp_path / "pruned"

    return make


def check_runs(folder, family, file):
    right = logprobs(load(folder, family))
    assert difference(llamacpp.Engine(file).logprobs(IDS, len(right)), right) < 2e-3


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.matrix)])
def test_layers_that_differ_run_in_llama_cpp(family, pruned, warm, tmp_path):
    folder, file = pruned(family), tmp_path / "out/model.gguf"
    told = export.export(folder, tmp_path / "out")
    assert told == {
        "output": str(file.parent),
        "file": str(file),
        "architecture": "deci",
        "tensors": 28,
    }
    heads = gguf.field_of(gguf.read_gguf(file), "deci.attention.head_count")
    assert heads == [4, 2, 2, 4]
    check_runs(folder, family, file)
    config = PruningPlan.load(folder).pruned_config
    for change, said in (
        (lambda stored: stored["model.layers.1.self_attn.q_proj.weight"], "blk.1.attn_q"),
        (lambda stored: stored["model.layers.3.mlp.down_proj.weight"], "blk.3.ffn_down"),
    ):
        stored = Checkpoint(folder)
        tensor = change(stored)
        stored.tensors[tensor.name] = replace(tensor, start=tensor.start + 4)  # one value on
        with pytest.raises(LoRAMError, match=f"{said}.* other weights"):
            export_pruned.check_model_file(file, stored, config, "deci")


@pytest.mark.matrix
@pytest.mark.parametrize("family", export_pruned.EQUAL)
def test_equal_layers_run_in_llama_cpp(family, pruned, warm, tmp_path):
    folder = pruned(family, **EQUAL)
    told = export.export(folder, tmp_path / "out")
    assert told["architecture"] == gguf.ARCHITECTURES[family][0]
    check_runs(folder, family, tmp_path / "out/model.gguf")


@pytest.mark.matrix
@pytest.mark.parametrize("family", sorted(OTHERS))
def test_the_other_families_do_not_run_with_equal_layers(
    family, pruned, warm, tmp_path, monkeypatch
):
    """What is refused was tried: the file is another, or llama.cpp does not load it."""
    folder = pruned(family, **EQUAL)
    monkeypatch.setattr(export_pruned, "EQUAL", (family,))
    with pytest.raises((LoRAMError, RuntimeError), match=r"not write it|Failed to init server"):
        export.export(folder, tmp_path / "out")
        check_runs(folder, family, tmp_path / "out/model.gguf")


@pytest.mark.parametrize(("family", "settings"), [("qwen3", {}), ("qwen2", EQUAL)])
def test_what_llama_cpp_cannot_build_is_refused_before_the_work(
    family, settings, pruned, tmp_path, monkeypatch
):
    monkeypatch.setattr(export_pruned, "run_script", lambda *_: pytest.fail("the work began"))
    with pytest.raises(LoRAMError, match=f"found {family} with .*: serve it with transformers"):
        export.export(pruned(family, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
