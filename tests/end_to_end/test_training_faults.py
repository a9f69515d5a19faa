"""Runs that went wrong without a word: refused before the first step, or right to the end."""

import json

import pytest
import torch
from conftest import run_command, write_yaml
from peft import PeftModel
from safetensors.torch import load_file
from test_training import adapter_weights, train
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
RANDOM = {"ratio": 0.5, "method": "random"}
MASKED = {"pruning": {"sparsity": 0.5}, "recovery": "masked"}
VOCABULARY = ["embed_tokens", "lm_head"]
TOKENS = [f"<t{number}>" for number in range(10)]
GROWN = {"lora_modules_to_save": VOCABULARY, "tokens": TOKENS}
FOUR_BITS = {"adapter": "qloram", "load_in_4bit": True}
ADAPTED = {"lora_target_modules": VOCABULARY}
PADDED = {"resize_token_embeddings_to_32x": True}
REWARD = {
    "datasets": [{"path": "pairs.jsonl", "ds_type": "json", "type": "bradley_terry.chat_template"}],
    "val_set_size": 0.0,
    "reward_model": True,
    "chat_template": "chatml",
    "pad_to_sequence_len": False,
}
DPO = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")} | {
    "prompt_format": "{prompt}",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
}
PREFERENCES = {
    "rl": "dpo",
    "datasets": [{"path": "dpo.jsonl", "ds_type": "json", "split": "train", "type": DPO}],
}


@pytest.fixture
def start(make_model, settings, tmp_path):
    """Write the data and the YAML of a run, and start it."""
    said = {"prompt": "def f():", "chosen": "    return 1", "rejected": "    return 2"}
    for name, row in (("dpo", said), ("pairs", {**said, "input": said["prompt"], "system": ""})):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)

    def run(family="llama", section=None, check=False, **changes):
        base = make_model(family, **({"num_experts": 4} if "moe" in family else {}))
        section = {"pruning": RANDOM, "cache_dir": str(tmp_path / "cache"), **(section or {})}
        yaml_file = write_yaml(tmp_path / "run.yml", settings(base, loram=section, **changes))
        return train(yaml_file, check=check, cwd=tmp_path)

    return run


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"lora_modules_to_save": ["layers.1.mlp"]}, "found layers.1.mlp, which takes"),
        ({"family": "olmo2", "lora_modules_to_save": ["norm"]}, "found norm, which takes"),
        (
            {
                "unfrozen_parameters": [
                    "base_model[a-z0-9_.]+lora_[AB]",
                    "base_model[a-z0-9_.]+layernorm",
                ]
            },
            "layernorm.weight, which PEFT does not save",
        ),
        (REWARD, "score"),
        (
            {**REWARD, "type_of_model": "AutoModelForSequenceClassification", "num_labels": 1},
            "score",
        ),
        ({"family": "qwen3_moe", "section": {"fill": "fitted"}}, "expected LoRA on linear layers"),
        ({"section": MASKED, "peft_trainable_token_indices": [5, 6]}, "cannot be merged"),
        ({**PREFERENCES, "section": {"evaluate_recovered_every": 2}}, "pairs and rewards alone"),
        ({"layer_offloading": True}, "that offloads nothing"),
    ],
    ids=["gatems", "olnorm", "unf2", "rm", "rmauto", "moefill", "spmtok", "dpoev", "offload"],
)
def test_what_is_never_recovered_is_refused_before_the_first_step(case, message, start, tmp_path):
    done = start(**case)
    assert done.returncode and message in done.stderr + done.stdout, done.stderr[-3000:]
    assert not (tmp_path / "out/pruned/adapter_model.safetensors").exists()
    assert "'loss'" not in done.stdout


@pytest.mark.parametrize("saved", [["model.embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_modules_named_by_their_paths_are_trained_and_saved(saved, start, make_model, tmp_path):
    start(adapter="qloram", load_in_4bit=True, lora_modules_to_save=saved, check=True)
    base = load_file(make_model() / "model.safetensors")
    found = adapter_weights(tmp_path / "out")
    for name in saved:
        weight = found[f"base_model.model.{name}.weight"]
        assert not torch.equal(weight.float(), base[f"{name}.weight"].float())


def test_labels_that_are_all_masked_are_said_before_and_refused_after(start, tmp_path):
    data = {"path": "masked.jsonl", "ds_type": "json", "type": "input_output"}
    row = {"segments": [{"label": False, "text": "def f():\n    return 1\n"}]}
    (tmp_path / "masked.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    done = start(datasets=[data], val_set_size=0.0)
    said = done.stdout + done.stderr
    assert done.returncode and "rows are masked" in said, done.stderr[-3000:]
    assert "found 0 at all" in said and not (tmp_path / "out/adapter_config.json").exists()


def losses_on_the_base(tmp_path):
    """What `axolotl-loram evaluate` says of the base, without and with the adapter."""
    run_command(
        *("axolotl-loram", "evaluate", tmp_path / "run.yml", "--limit", "4"),
        *("--models", "base,pruned+adapter,base+recovered", "--output", tmp_path / "told.json"),
        cwd=tmp_path,
    )
    [text] = json.loads((tmp_path / "told.json").read_text())["perplexity"].values()
    return [text["models"][name]["perplexity"] for name in ("base", "base+recovered")]


def merged_and_adapted(tmp_path, make_model, family):
    """Logits of what merge-lora wrote, and of the base with the adapter."""
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float)
    base = AutoModelForCausalLM.from_pretrained(make_model(family))
    base.resize_token_embeddings(merged.config.vocab_size)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        return [model.eval()(torch.arange(3, 60)[None]).logits for model in (merged, adapted)]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", GROWN),
        ("llama", {**GROWN, **FOUR_BITS}),
        ("llama", PADDED),
        ("llama", ADAPTED),
        ("llama", {**ADAPTED, **FOUR_BITS}),
        ("gpt_neox", {}),
    ],
    ids=["big", "bigq", "pad32", "embt", "embtq", "gpt_neox"],
)
def test_vocabularies_are_recovered_evaluated_and_merged(
    family, changes, start, make_model, tmp_path
):
    start(family, {"evaluate_recovered_every": 2}, check=True, **changes)
    base, recovered = losses_on_the_base(tmp_path)
    assert recovered < base
    run_command("axolotl", "merge-lora", tmp_path / "run.yml", cwd=tmp_path)
    merged, adapted = merged_and_adapted(tmp_path, make_model, family)
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-3 * float(adapted.abs().max()))


def test_text_of_new_tokens_is_evaluated_where_there_are_such(start, text_file, tmp_path):
    """As with ChatML on a base that lacks its tokens: in every row."""
    rows = [json.loads(line) for line in text_file.read_text().splitlines()]
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"<t0>{row['text']}<t9>"}) for row in rows))
    named = [{"path": str(data), "ds_type": "json", "type": "completion"}]
    done = start("llama", {"evaluate_recovered_every": 2}, check=True, datasets=named, **GROWN)
    assert "recovered_perplexity" in done.stdout + done.stderr
    command = ("axolotl-loram", "evaluate", tmp_path / "run.yml", "--limit", "4")
    refused = run_command(*command, cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "evaluate --models pruned+adapter" in refused.stderr
    both, told = "pruned+adapter,base+recovered", tmp_path / "told.json"
    run_command(*command, "--models", both, "--output", told, cwd=tmp_path)
    [text] = json.loads(told.read_text())["perplexity"].values()
    assert set(text["models"]) == {"pruned+adapter", "base+recovered"}


def test_a_plain_run_with_new_tokens_is_a_warm_start(start, make_model, settings, tmp_path):
    plain = settings(make_model(), **GROWN, output_dir=str(tmp_path / "plain"))
    plain.pop("plugins")
    train(write_yaml(tmp_path / "plain.yml", plain), cwd=tmp_path)
    start(check=True, lora_model_dir=str(tmp_path / "plain"), learning_rate=1e-9, **GROWN)
    before, after = adapter_weights(tmp_path / "plain"), adapter_weights(tmp_path / "out")
    name = "base_model.model.lm_head.weight"
    assert before[name].shape == (269, 32)
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_a_padded_vocabulary_is_merged_under_masks(start, make_model, tmp_path):
    start(section=MASKED, check=True, **PADDED)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged")
    assert merged.config.vocab_size == len(merged.lm_head.weight) == 288


def test_an_adapter_that_axolotl_would_pass_over_is_refused(start, tmp_path):
    done = start(**PREFERENCES, lora_model_dir=str(tmp_path / "start"))
    assert done.returncode and "Axolotl 0.19 passes over it" in done.stderr + done.stdout
