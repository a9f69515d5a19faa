"""Runs that went wrong without a word: refused before the first step, or right to the end."""

import json

import pytest
import torch
from conftest import write_yaml
from test_training import adapter_weights, train

pytestmark = pytest.mark.slow
RANDOM = {"ratio": 0.5, "method": "random"}
MASKED = {"pruning": {"sparsity": 0.5}, "recovery": "masked"}
VOCABULARY = ["embed_tokens", "lm_head"]
TOKENS = [f"<t{number}>" for number in range(10)]
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
    turns = {
        side: [{"role": "user", "content": "f"}, {"role": "assistant", "content": said[side]}]
        for side in ("chosen", "rejected")
    }
    for name, row in (("dpo", said), ("pairs", turns)):
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
    ],
    ids=["gatems", "olnorm", "unf2", "rm", "rmauto", "moefill", "spmtok", "dpoev"],
)
def test_what_is_never_recovered_is_refused_before_the_first_step(case, message, start, tmp_path):
    done = start(**case)
    assert done.returncode and message in done.stderr + done.stdout, done.stderr[-3000:]
    assert not (tmp_path / "out/pruned/adapter_model.safetensors").exists()
    assert "'loss'" not in done.stdout


@pytest.mark.parametrize("saved", [["model.embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_modules_named_by_their_paths_are_trained_and_saved(saved, start, tmp_path):
    start(adapter="qloram", load_in_4bit=True, lora_modules_to_save=saved, check=True)
    base = adapter_weights(next(tmp_path.glob("cache/*/*/model.safetensors")).parent)
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
