"""What a run says of the servers that its adapter is for, and several adapters on one base."""

import pytest
import torch
from conftest import run_command, write_yaml
from peft import LoraConfig, PeftModel, get_peft_model
from test_recover import TOKENS, train_on
from transformers import AutoModelForCausalLM

from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

VOCABULARY = ["q_proj", "v_proj", "embed_tokens", "lm_head"]


@pytest.fixture
def start(make_model, settings, tmp_path):
    """Start a run of a YAML; returns what it said."""

    def run(section, **changes):
        section = {
            "pruning": {"ratio": 0.5, "method": "random"},
            "cache_dir": str(tmp_path / "cache"),
            **section,
        }
        file = write_yaml(tmp_path / "run.yml", settings(make_model(), loram=section, **changes))
        done = run_command("axolotl", "train", file, "--launcher", "python", check=False)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_a_named_server_that_would_refuse_ends_the_run_before_the_pruning(start, tmp_path):
    code, said = start({"serve_with": ["peft", "vllm"]}, lora_modules_to_save=["lm_head"])
    assert code and "expected an adapter that vllm takes as it is" in said, said[-3000:]
    assert "found modules_to_save: ['lm_head']: train without lora_modules_to_save" in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_what_only_the_model_shows_ends_the_run_before_its_first_step(start, tmp_path):
    """A vocabulary that Axolotl pads, with LoRA on it: nothing of the YAML names the new rows."""
    code, said = start(
        {"serve_with": ["vllm"]},
        lora_target_linear=False,
        lora_target_modules=VOCABULARY,
        resize_token_embeddings_to_32x=True,
    )
    assert code and "found a vocabulary of 288 tokens, where the base has 264" in said, said[-3000:]
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))


@pytest.mark.slow
def test_a_run_warns_in_one_line_and_goes_on(start, tmp_path):
    code, said = start({}, lora_modules_to_save=["lm_head"])
    warnings = [line for line in said.splitlines() if "will not be taken as it is" in line]
    assert code == 0 and len(warnings) == 1, said[-3000:]
    assert "by vllm (base_model.model.lm_head.weight, which is no matrix" in warnings[0]
    assert "and llama.cpp (" in warnings[0]
    assert "Taken as it is by peft, merge-lora." in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_merging_lora_on_tied_embeddings_is_refused(make_model, settings, tmp_path):
    """PEFT would add the head's update to the embedding too, and say nothing."""
    base = make_model(tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "lora")
    section = {"loram": {"pruning": {"ratio": 0.5}}, "lora_model_dir": str(tmp_path / "lora")}
    file = write_yaml(tmp_path / "run.yml", settings(base, **section))
    done = run_command("axolotl", "merge-lora", file, check=False)
    said = done.stdout + done.stderr
    assert done.returncode and "found LoRA on lm_head, which are one tensor" in said, said[-3000:]
    assert not (tmp_path / "out/merged").exists()


def test_adapters_of_differently_pruned_models_share_one_base(make_model, tmp_path):
    """Each by its name, on one model in memory; without any, the base is what it was."""
    base = make_model()
    expected, model = {}, AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        untouched = model(TOKENS).logits
    for name, ratio in (("a", 0.5), ("b", 0.25)):
        pruned = tmp_path / f"pruned-{name}"
        prune(str(base), pruned, PruningArgs(ratio=ratio, seed=ord(name)))
        train_on(pruned, tmp_path / name, r=4 if name == "a" else 8)
        folder = recover(tmp_path / name, output=tmp_path / f"recovered-{name}")["output"]
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        with torch.no_grad():
            expected[name] = alone.eval()(TOKENS).logits
    served = PeftModel.from_pretrained(model, tmp_path / "recovered-a", adapter_name="a").eval()
    served.load_adapter(tmp_path / "recovered-b", adapter_name="b")
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-2)
    for name in ("a", "b", "a"):
        served.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(served(TOKENS).logits, expected[name])
    rows = TOKENS.repeat(3, 1)
    with torch.no_grad():
        mixed = served(rows, adapter_names=["b", "__base__", "a"]).logits
    for row, logits in zip(mixed, (expected["b"], untouched, expected["a"]), strict=True):
        torch.testing.assert_close(row[None], logits)
