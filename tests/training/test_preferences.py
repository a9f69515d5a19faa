"""Preferences over the original's upper layers: what Axolotl trains on the original itself."""

import json

import pretrained
import pytest
from axolotl.utils.dict import DictDefault
from conftest import run_command, write_yaml
from safetensors.torch import load_file
from test_real import folder_of

from axolotl_loram.errors import LoRAMError
from axolotl_loram.training.anchor import make_anchor
from axolotl_loram.training.states import whole_rows
from axolotl_loram.training.support import check_supported

ROWS = [
    {"prompt": f"{i} and {i} make ", "chosen": f"{2 * i}.", "rejected": f"{2 * i + 1}, I think."}
    for i in range(24)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in ROWS
    for name in ("chosen", "rejected")
]
LOSSES = {
    "dpo": {},
    "ipo": {},
    "kto": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "orpo": {"orpo_alpha": 0.1, "chat_template": "chatml"},
    "simpo": {"cpo_alpha": 1.0, "simpo_gamma": 0.5, "rl_beta": 2.0},
}


def data(rl, folder):
    """The rows as each trainer of Axolotl's takes them."""
    rows, kind = (JUDGED if rl == "kto" else ROWS), None
    if rl == "orpo":
        rows, kind = [_messages(row) for row in ROWS], "chat_template.argilla"
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "split": "train", "type": kind}]


def _messages(row):
    def said(name):
        asked = {"role": "user", "content": row["prompt"]}
        return [asked, {"role": "assistant", "content": row[name]}]

    return {**row, "chosen": said("chosen"), "rejected": said("rejected")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rl", "layers"),
    [
        ("dpo", 4),
        *(pytest.param(rl, 4, marks=pytest.mark.matrix) for rl in LOSSES if rl != "dpo"),
        pytest.param("dpo", 30, marks=pytest.mark.real),  # SmolLM2-135M-Instruct
    ],
)
def test_they_are_learnt_as_on_the_original(rl, layers, make_model, settings, tmp_path):
    """Log-probabilities and rewards, step by step, and the adapter: those of plain Axolotl."""
    base = make_model(num_hidden_layers=4) if layers == 4 else folder_of(pretrained.SMOLLM2)
    changes = {"rl": rl, "datasets": data(rl, tmp_path), "remove_unused_columns": False}
    changes |= {"sequence_len": 128, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    changes |= {"eval_on_start": True, "val_set_size": 0.2, "gradient_checkpointing": True}
    changes |= {"save_strategy": "steps", "save_steps": 8, "logging_steps": 1, **LOSSES[rl]}
    upper = {"pruning": {"units": "layers", "ratio": 0.5}, "anchor": "base"}
    upper["cache_dir"] = str(tmp_path / "cache")
    found, adapters = {}, {}
    for name, own in (
        ("plain", {"plugins": [], "peft_layers_to_transform": [*range(layers // 2, layers)]}),
        ("loram", {"loram": upper}),
    ):
        own |= {"output_dir": str(tmp_path / name)}
        file = write_yaml(tmp_path / f"{name}.yml", settings(base, **{**changes, **own}))
        run_command("axolotl", "train", file, "--launcher", "python")
        trained = tmp_path / name / ("pruned" if name == "loram" else ".")
        state = json.loads((trained / "checkpoint-8/trainer_state.json").read_text())
        found[name] = {
            (row["step"], key): value
            for row in state["log_history"]
            for key, value in row.items()
            if key.endswith(("loss", "logps/chosen", "logps/rejected", "rewards/chosen"))
        }
        adapters[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert found["loram"].keys() == found["plain"].keys() and len(found["plain"]) > 20
    for place, wanted in found["plain"].items():
        assert found["loram"][place] == pytest.approx(wanted, rel=0.02, abs=0.01), place
    assert adapters["loram"].keys() == adapters["plain"].keys()
    allowed = 0.1 if layers == 4 else 0.3  # Adam makes steps of the smallest gradients' signs
    for key, wanted in adapters["plain"].items():
        assert (adapters["loram"][key] - wanted).norm() < allowed * wanted.norm(), key
    assert any(w.abs().max() > 0.01 for key, w in adapters["loram"].items() if "lora_B" in key)


UPPER = {"pruning": {"units": "layers", "ratio": 0.5}, "anchor": "base"}


@pytest.mark.parametrize("changes", [{"rl": "grpo"}, {"precompute_ref_log_probs": True}])
def test_what_is_not_known_before_training_is_refused(changes):
    cfg = DictDefault({"adapter": "lora", "loram": UPPER, "rl": "dpo", **changes})
    with pytest.raises(LoRAMError, match=f"expected no `{next(iter(changes))}` with `anchor`"):
        check_supported(cfg)


def test_inside_layers_preferences_are_not_anchored(make_model, settings, tmp_path):
    """Said before pruning, where the YAML tells, as well as of a pruned model that is named."""
    run_command("axolotl-loram", "prune", make_model(), tmp_path / "pruned", "--pruning-ratio", 0.5)
    inside = {"pruning": {"ratio": 0.5}, "cache_dir": str(tmp_path / "cache")}
    for section in (inside, {"pruned_model_path": str(tmp_path / "pruned")}):
        changes = {"rl": "dpo", "datasets": data("dpo", tmp_path), "val_set_size": 0}
        own = settings(make_model(), loram={**section, "anchor": "base"}, **changes)
        file = write_yaml(tmp_path / "run.yml", own)
        with pytest.raises(AssertionError, match="its reference the offset cancels"):
            run_command("axolotl", "train", file, "--launcher", "python")
    assert not (tmp_path / "cache").exists()


def test_the_command_leaves_preferences_to_the_run(make_model, settings, tmp_path):
    changes = {"rl": "dpo", "datasets": data("dpo", tmp_path), "val_set_size": 0}
    file = write_yaml(tmp_path / "run.yml", settings(make_model(), loram=UPPER, **changes))
    with pytest.raises(LoRAMError, match="found rl: dpo, where the trainer does it: leave"):
        make_anchor(file, tmp_path / "states")
    with pytest.raises(LoRAMError, match="expected rows of token ids, found text"):
        list(whole_rows([{"text": "three"}]))
