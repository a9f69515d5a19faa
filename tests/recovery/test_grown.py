"""Adapters whose vocabulary grew in training, as PEFT writes them."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapter import FILE, PREFIX, UP_B, loaded, pruned, rewrite  # noqa: F401  (pruned is a fixture)
from test_masked import make_sparse
from test_recover import TOKENS, randomize, train_on
from transformers import AutoModelForCausalLM

from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.recover import recover
from axolotl_loram.results.candidates import load_model, with_adapter
from axolotl_loram.results.inspect import failures, verify

FORMS = {
    "resized": {"target_modules": ["q_proj", "up_proj"]},
    "lora": {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"]},
    "saved whole": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "tokens": {"target_modules": ["q_proj", "up_proj"], "trainable_token_indices": [3, 264]},
}


def grow(model, rows=266):
    torch.manual_seed(7)  # the new rows are drawn
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train_grown(folder, output, **config):
    model = grow(AutoModelForCausalLM.from_pretrained(folder))
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    randomize(model)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name:
            weight.data += 0.1
    if len(config) == 1:  # not frozen, as some trainers leave it
        model.get_input_embeddings().weight.data += 0.1
    model.save_pretrained(output)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_embeddings_that_grew_go_through_as_peft_writes_them(form, tied, make_model, tmp_path):
    base = make_model(tie_word_embeddings=tied)
    prune(str(base), tmp_path / "pruned", PruningArgs(ratio=0.5))
    train_grown(tmp_path / "pruned", tmp_path / "adapter", **FORMS[form])
    recover(tmp_path / "adapter")
    before, after = (load_file(tmp_path / at / FILE) for at in ("adapter", "recovered-adapter"))
    inside = [name for name in before if ".layers." not in name]
    assert inside and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in inside)
    assert not failures(verify(tmp_path / "recovered-adapter"))
    served = loaded(
        grow(AutoModelForCausalLM.from_pretrained(base)), tmp_path / "recovered-adapter"
    )
    with torch.no_grad():
        expected = served(TOKENS).logits
    model = load_model(str(base))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad(), with_adapter(model, tmp_path / "recovered-adapter") as evaluated:
        torch.testing.assert_close(evaluated(TOKENS).logits, expected)
    assert model.state_dict().keys() == weights.keys() and model.config.vocab_size == 264
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["resized", "lora", "saved whole"])
def test_masked_recovery_grows_the_model(form, tied, make_model, tmp_path):
    base = make_model(tie_word_embeddings=tied)
    sparse = make_sparse(base, tmp_path / "sparse")
    model = train_grown(sparse, tmp_path / "adapter", **FORMS[form])
    if tied and form != "resized":  # PEFT trains the two apart, which a tied model cannot hold
        if form == "saved whole":
            model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
            model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(LoRAMError, match="which cannot be merged"):
            merge_masked(tmp_path / "adapter")
        assert not (tmp_path / "merged-adapter").exists()
        return
    merge_masked(tmp_path / "adapter")
    recover(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-adapter")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 266
    original, added = load_model(str(base)), tmp_path / "recovered-adapter"
    with torch.no_grad(), with_adapter(original, added, sparse) as expected:
        wanted = expected(TOKENS).logits
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not failures(verify(tmp_path / "merged-adapter"))


@pytest.mark.parametrize("form", ["resized", "saved whole"])
def test_masked_recovery_onto_a_base_that_stores_its_head_alone(form, make_model, tmp_path):
    shutil.copytree(make_model(tie_word_embeddings=True), tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, metadata={"format": "pt"})
    prune(str(tmp_path / "base"), tmp_path / "sparse", PruningArgs(sparsity=0.5))
    train_grown(tmp_path / "sparse", tmp_path / "adapter", **FORMS[form])
    merge_masked(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-adapter")
    saved = load_file(tmp_path / "adapter" / FILE)
    for part in ("model.embed_tokens", "lm_head"):
        weight = merged.get_submodule(part).weight
        assert torch.equal(weight, saved[f"{PREFIX}{part}.weight"])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_embeddings_is_not_merged(whole, make_model, tmp_path):
    """PEFT trains it apart from the other; a tied model would hold it as both, or lose it."""
    sparse = make_sparse(make_model(tie_word_embeddings=True), tmp_path / "sparse")
    form = {"target_modules": ["q_proj"], "modules_to_save": [whole]}
    model = get_peft_model(load_model(str(sparse)), LoraConfig(r=4, **form))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoRAMError, match="which cannot be merged"):
        merge_masked(tmp_path / "adapter")


@pytest.mark.parametrize("rows", [263, 270])
def test_embeddings_of_another_model_are_refused(rows, pruned, tmp_path):
    train_grown(pruned, tmp_path / "adapter", **FORMS["lora"])
    name = f"{PREFIX}lm_head.base_layer.weight"
    rewrite(tmp_path / "adapter", lambda w: {**w, name: torch.zeros(rows, 32)})
    with pytest.raises(LoRAMError, match=r"embeddings for 2[67][06] tokens, found 26[36]"):
        recover(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", lambda w: {**w, name: torch.zeros(266, 16)})
    with pytest.raises(LoRAMError, match=r"of shape \[266, 32\], found \[266, 16\]"):
        recover(tmp_path / "adapter")


def test_masked_recovery_knows_weights_by_their_stored_names(make_model, tmp_path):
    """GPT-NeoX's lm_head is embed_out in checkpoints."""
    base, name = make_model("gpt_neox"), "embed_out.weight"
    prune(str(base), tmp_path / "sparse", PruningArgs(method="magnitude", sparsity=0.5))
    targets = {"target_modules": ["dense_4h_to_h", "lm_head"], "alpha_pattern": {"lm_head": 3}}
    model = train_on(tmp_path / "sparse", tmp_path / "adapter", **targets)
    merge_masked(tmp_path / "adapter")
    before, after = (
        load_file(at / "model.safetensors")[name] for at in (base, tmp_path / "merged-adapter")
    )
    update = model.base_model.model.lm_head.get_delta_weight("default").detach()
    assert update.any()
    torch.testing.assert_close(after, before + update)
