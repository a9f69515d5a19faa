"""Embeddings in every form that Axolotl and PEFT give them, from training to the published adapter.

Some of it runs always (test_training_faults.py); here is the whole product.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import run_command, write_yaml
from peft import PeftModel
from safetensors.torch import load_file
from test_training import train
from transformers import AutoModelForCausalLM

from axolotl_loram.cli import main
from axolotl_loram.results.candidates import load_model, with_adapter

pytestmark = pytest.mark.slow
WORDS = 259
"""As many tokens as the tokenizer has, so that one more makes the vocabulary grow."""
TOKENS = torch.arange(3, 60)[None]
BOTH = ["embed_tokens", "lm_head"]
VOCABULARIES = {
    "grown": {"special_tokens": {"pad_token": "[PAD]"}},
    "padded": {"resize_token_embeddings_to_32x": True},
    "as it was": {},
}
FORMS = {
    "saved whole": {"lora_modules_to_save": BOTH},
    "adapted": {"lora_target_modules": [*BOTH, "q_proj", "up_proj"], "lora_target_linear": False},
    "tokens": {"peft_trainable_token_indices": [5, 6]},
    "left alone": {},
}
BITS = {"16": {}, "4": {"adapter": "qloram", "load_in_4bit": True}}
ALWAYS = ("as it was", "saved whole", True)
PRODUCT = [
    pytest.param(*case, marks=() if case == ALWAYS else pytest.mark.matrix)
    for case in ((v, f, t) for v in VOCABULARIES for f in FORMS for t in (False, True))
]


@pytest.fixture
def story(make_model, settings, tmp_path):
    """Settings of a run with these embeddings, and its base."""

    def make(vocabulary, form, tied, **changes):
        base = make_model(vocab_size=WORDS, tie_word_embeddings=tied)
        own = {**VOCABULARIES[vocabulary], **FORMS[form]}
        section = {"pruning": {"ratio": 0.5}, "cache_dir": str(tmp_path / "cache")}
        return base, settings(base, **{"loram": section, **own, **changes})

    return make


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def adapted(base, output, size):
    """The base with the adapter, as PEFT loads it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if size != WORDS:
        model.resize_token_embeddings(size)
    return PeftModel.from_pretrained(model, output).eval()


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def check_merged(base, output, vocabulary):
    """What merge-lora wrote computes what PEFT does."""
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float)
    size = merged.config.vocab_size
    assert (size == WORDS) == (vocabulary == "as it was")
    expected = logits_of(adapted(base, output, size))
    close = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(logits_of(merged.eval()), expected, **close)


@pytest.mark.parametrize("bits", ["16", pytest.param("4", marks=pytest.mark.matrix)])
@pytest.mark.parametrize(("vocabulary", "form", "tied"), PRODUCT)
def test_from_training_to_the_published_adapter(vocabulary, form, tied, bits, story, tmp_path):
    base, run = story(vocabulary, form, tied, **BITS[bits])
    run["loram"]["evaluate_recovered_every"] = 2
    train(write_yaml(tmp_path / "run.yml", run), cwd=tmp_path)
    output, found = tmp_path / "out", {}

    told = CliRunner().invoke(
        main,
        [
            *("evaluate", str(tmp_path / "run.yml"), "--limit", "4"),
            *("--models", "base,pruned+adapter,base+recovered", "--output", str(tmp_path / "e")),
        ],
        catch_exceptions=False,
    )
    assert told.exit_code == 0, told.stderr
    [text] = json.loads((tmp_path / "e").read_text())["perplexity"].values()
    found = {name: text["models"][name]["perplexity"] for name in ("base", "base+recovered")}
    assert found["base+recovered"] < found["base"]

    merged = run_command("axolotl", "merge-lora", tmp_path / "run.yml", cwd=tmp_path, check=False)
    if form == "adapted" and tied:
        assert merged.returncode and "one tensor in the base" in merged.stderr
    else:
        assert not merged.returncode, merged.stderr[-3000:]
        check_merged(base, output, vocabulary)

    published = CliRunner().invoke(
        main, ["publish", str(output), "org/name", "--dry-run"], catch_exceptions=False
    )
    assert published.exit_code == 0, published.stderr

    again = {"lora_model_dir": str(output), "output_dir": str(tmp_path / "again")}
    warm = {**run, **again, "learning_rate": 1e-9, "max_steps": 1}
    train(write_yaml(tmp_path / "again.yml", warm), cwd=tmp_path)
    before, after = weights_of(output), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name].float(), weight.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "form", "tied"), PRODUCT)
def test_merged_under_masks_or_refused_at_the_start(vocabulary, form, tied, story, tmp_path):
    base, run = story(vocabulary, form, tied)
    run["loram"] |= {"pruning": {"sparsity": 0.5}, "recovery": "masked"}
    done = train(write_yaml(tmp_path / "run.yml", run), cwd=tmp_path, check=False)
    if form == "tokens" or (tied and form != "left alone"):
        assert done.returncode and "which cannot be merged" in done.stderr
        assert "'loss'" not in done.stdout
        return
    assert not done.returncode, done.stderr[-3000:]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float)
    [sparse] = (found.parent for found in (tmp_path / "cache").glob("*/loram.json"))
    with torch.no_grad(), with_adapter(load_model(str(base)), tmp_path / "out", sparse) as model:
        expected = model(TOKENS).logits
    close = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(logits_of(merged.eval()), expected, **close)
