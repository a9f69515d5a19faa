"""Bases as they are stored: damaged anywhere, or with tensors under other names than usual."""

import shutil

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from families import pico_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune

BOTH = ("experts", "expert_neurons")
HALF = PruningArgs(ratio=0.5)


def stored_otherwise(base, folder, change):
    """A copy of a model with its weights changed."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "name", "units"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", None),
        ("llama", "model.layers.2.self_attn.q_proj.weight", None),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_h_to_4h.bias", None),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.{}.w2.weight", None),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", None),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj_bias", BOTH),
    ],
)
def test_no_number_is_passed_over(family, name, units, make_model, tmp_path):
    """Also in rows and experts that go: the adapter is for the base, which has them."""
    settings = PruningArgs(ratio=0.5, method="random", units=units)
    for place in range(4):

        def plant(weights, place=place):
            weight = weights[name.format(place)]
            weight[0 if "{}" in name else place * len(weight) // 4].view(-1)[-1] = float("nan")

        base = stored_otherwise(make_model(family), tmp_path / str(place), plant)
        with pytest.raises(LoRAMError, match=f"NaN or infinity in {name.format(place)}"):
            prune(str(base), tmp_path / "out", settings)
        assert not (tmp_path / "out").exists()


def with_another_head(weights, embedding, head):
    weights[head] = torch.randn_like(weights[embedding])


def with_the_head_alone(weights, embedding, head):
    weights[head] = weights.pop(embedding)


def with_both(weights, embedding, head):
    weights[head] = weights[embedding].clone()


@pytest.mark.parametrize("change", [with_another_head, with_the_head_alone, with_both])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("gpt_neox", "embed_out.weight"),
        ("gemma3", "language_model.lm_head.weight"),
        ("gemma3", "lm_head.weight"),
    ],
)
def test_heads_of_tied_models_are_known_by_every_name(
    family, head, change, make_model, text_file, tmp_path
):
    base = make_model(family, tie_word_embeddings=True)
    names = {"gpt_neox": "gpt_neox.embed_in", "gemma3": "language_model.model.embed_tokens"}
    embedding = f"{names[family]}.weight"
    base = stored_otherwise(base, tmp_path / "base", lambda w: change(w, embedding, head))
    text = {"calibration_path": str(text_file), "calibration_length": 32}
    settings = PruningArgs(ratio=0.5, method="taylor", calibration_samples=4, **text)
    prune(str(base), tmp_path / "out", settings)
    auto = getattr(transformers, FAMILIES[family].auto_class)
    theirs, ours = (auto.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_a_vision_language_model_with_a_head_of_its_own(make_model, tmp_path):
    """Transformers stores it as language_model.lm_head."""
    base = make_model("gemma3", tie_word_embeddings=False)
    prune(str(base), tmp_path / "out", HALF)
    stored = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out")]
    assert torch.equal(*(weights["language_model.lm_head.weight"] for weights in stored))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_passes_over_is_passed_over(family):
    row = FAMILIES[family]
    with torch.device("meta"):
        auto = getattr(transformers, row.auto_class)
        model = auto.from_config(pico_config(family))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    assert {*row.ignored} == {*ignored}


def test_masks_of_early_checkpoints_are_left_out(make_model, tmp_path):
    """As in Pythia's: the second is −∞ in 16 bits."""

    def add(weights):
        for layer in range(4):
            prefix = f"gpt_neox.layers.{layer}.attention"
            weights[f"{prefix}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
            weights[f"{prefix}.masked_bias"] = torch.tensor(-1e9).half()
            weights[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(4)

    base = stored_otherwise(make_model("gpt_neox"), tmp_path / "base", add)
    prune(str(base), tmp_path / "out", HALF)
    plan = PruningPlan.load(tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert plan.counts and not [name for name in stored if "masked_bias" in name]
    assert AutoModel.from_pretrained(tmp_path / "out")


def test_every_file_that_reads_text_goes_along(make_model, tmp_path):
    base = shutil.copytree(make_model(), tmp_path / "base")
    byte_tokenizer().save_pretrained(base)
    for name in ("tekken.json", "tokenizer.model", "additional_chat_templates/rag.jinja"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    prune(str(base), tmp_path / "out", HALF)
    for name in ("tekken.json", "tokenizer.model", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "out" / name).read_text() == name
