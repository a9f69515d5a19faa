"""Alignment by `axolotl train` itself: on one process, and on two under DeepSpeed on the CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RANKS, run_command, write_yaml
from safetensors.torch import load_file, save_file

from axolotl_loram.architecture.pairing import check_pruned
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune

pytestmark = pytest.mark.slow
STEPS, ROW = 6, 64
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_allgather_sequential": True,  # see zero_on_cpus
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.fixture(scope="module")
def work(make_model, tmp_path_factory):
    """A pruned model, two texts in rows of equal length, and one that is held out."""
    folder = tmp_path_factory.mktemp("align-ranks")
    prune(str(make_model()), folder / "pruned", PruningArgs(ratio=0.5))
    source = Path(json.__file__).read_text(encoding="utf-8")
    rows = [source[start : start + ROW - 1] for start in range(0, 100 * (ROW - 1), ROW - 1)]
    for name, part in (("a", rows[:40]), ("b", rows[40:80]), ("held-out", rows[80:])):
        lines = "\n".join(json.dumps({"text": row}) for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return folder


def settings(work, name, **changes):
    def data(text):
        file = str(work / f"{text}.jsonl")
        return {"path": file, "ds_type": "json", "split": "train", "type": "completion"}

    return {
        "base_model": str(work / "pruned"),
        "plugins": ["axolotl_loram.LoRAMPlugin", "witness.WitnessPlugin"],
        "loram": {"stage": "align"},
        "streaming": True,
        "datasets": [data("a"), data("b")],
        "test_datasets": [data("held-out")],
        "dataset_prepared_path": str(work / f"prepared-{name}"),
        "output_dir": str(work / name),
        "sequence_len": ROW,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "seed": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 2,
        "auto_resume_from_checkpoints": True,
        **changes,
    }


def train(work, name, *launcher, check=True, environment=None, **changes):
    """Run `axolotl train` and return what it says."""
    witness = work / f"witness-{name}"
    witness.mkdir(exist_ok=True)
    variables = {**RANKS, "WITNESS": str(witness), **(environment or {})}
    yaml_file = write_yaml(work / f"{name}.yml", settings(work, name, **changes))
    launcher = launcher or ("python",)
    command = ("axolotl", "train", yaml_file, "--launcher", *launcher)
    result = run_command(*command, check=check, variables=variables)
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def alone(work):
    """Aligned by a single process."""
    train(work, "alone")
    return work / "alone"


@pytest.fixture(scope="module")
def ranks(work):
    """Aligned by two ranks, of which one was killed in the fourth step; started again."""
    two = ("torchrun", "--", "--nproc_per_node", "2")
    changes = {"micro_batch_size": 2, "deepspeed": str(work / "zero3.json")}
    killed = {"KILL_RANK": "1", "KILL_STEP": "3"}
    train(work, "ranks", *two, check=False, environment=killed, **changes)
    folder = work / "ranks"
    assert not (folder / "config.json").exists() and not (folder / "loram.json").exists()
    assert (folder / "training/checkpoint-2/trainer_state.json").exists()
    said = train(work, "ranks", *two, **changes)
    assert "checkpoint-2" in said
    return folder


def log_of(folder):
    state = folder / f"training/checkpoint-{STEPS}/trainer_state.json"
    return json.loads(state.read_text())["log_history"]


def batches(work, name, rank):
    lines = (work / f"witness-{name}/rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def alignment(folder):
    (done,) = json.loads((folder / "loram.json").read_text())["alignments"]
    return done


def test_one_process_leaves_an_aligned_checkpoint(alone, work):
    check_pruned(alone, PruningPlan.load(work / "pruned"))
    plan = "loram_plan.safetensors"
    assert (alone / plan).read_bytes() == (work / "pruned" / plan).read_bytes()
    assert (alone / "tokenizer.json").exists()
    assert not list((alone / "training").glob("*.safetensors"))
    done = alignment(alone)
    assert (done["steps"], done["tokens"]) == (STEPS, STEPS * 4 * ROW)
    assert done["heldout_loss"]["before"] > done["heldout_loss"]["after"] > 0
    assert [Path(entry["path"]).name for entry in done["data"]] == ["a.jsonl", "b.jsonl"]
    before, after = (
        load_file(work / "pruned/model.safetensors"),
        load_file(alone / "model.safetensors"),
    )
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["lm_head.weight"] and before.keys() == after.keys()


def test_two_ranks_see_different_batches(ranks, alone, work):
    """Together they see what the single process sees."""
    seen = [batches(work, "ranks", rank) for rank in (0, 1)]
    for whole in batches(work, "alone", 0):
        step = whole["step"]
        halves = [next(b["rows"] for b in rank if b["step"] == step) for rank in seen]
        assert sorted(halves[0] + halves[1]) == sorted(whole["rows"])
        assert halves[0] != halves[1]


def test_a_killed_rank_does_not_change_the_losses(ranks, alone):
    """Nor the learning rates, the held-out losses, or the number of tokens."""
    resumed, whole = log_of(ranks), log_of(alone)
    for key in ("loss", "learning_rate", "eval_loss", "num_input_tokens_seen"):
        values = [[row[key] for row in log if key in row] for log in (resumed, whole)]
        assert len(values[0]) >= 2 and values[0] == pytest.approx(values[1], rel=1e-4)
    for key in ("steps", "tokens", "heldout_loss"):
        assert alignment(ranks)[key] == pytest.approx(alignment(alone)[key], rel=1e-4)
    assert alignment(ranks)["world_size"] == 2


def test_the_step_that_was_lost_is_done_again(ranks, work):
    """From the checkpoint on, and with the rows it had before."""
    for rank in (0, 1):
        seen = batches(work, "ranks", rank)
        steps = [batch["step"] for batch in seen]
        assert steps == [0, 1, 2, *([3] if rank == 0 and steps[3] == 3 else []), 2, 3, 4, 5]
        assert seen[2]["rows"] == seen[steps.index(2, 3)]["rows"]


def test_the_ranks_checkpoint_is_the_single_processes(ranks, alone):
    """Heterogeneous layers and all, though each rank held a part: complete, to 1e-4."""
    made, expected = (load_file(folder / "model.safetensors") for folder in (ranks, alone))
    assert made.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(made[name], weight, rtol=1e-4, atol=1e-4)
    configs = [(folder / "config.json").read_text() for folder in (ranks, alone)]
    assert configs[0] == configs[1] and "per_layer_config" in configs[0]


def test_ordinary_data_packed_into_a_checkpoint_in_16_bits(work):
    """A second alignment: prepared and packed data, the lm_head trained too, stored as before."""
    base, half = work / "base-in-16-bits", work / "half"
    shutil.copytree(json.loads((work / "pruned/loram.json").read_text())["base"]["id"], base)
    weights = load_file(base / "model.safetensors")
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    prune(str(base), half, PruningArgs(ratio=0.5))
    changes = {
        "base_model": str(half),
        "loram": {"stage": "align", "train_lm_head": True},
        "streaming": False,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "sequence_len": 2 * ROW + 10,
        "max_steps": 2,
        "save_strategy": "no",
        "save_steps": None,
        "test_datasets": None,
        "val_set_size": 0.1,
        "eval_sample_packing": False,
    }
    train(work, "packed", **changes)
    made = load_file(work / "packed/model.safetensors")
    assert {weight.dtype for weight in made.values()} == {torch.bfloat16}
    assert not torch.equal(made["lm_head.weight"], stored["lm_head.weight"])
    done = alignment(work / "packed")
    rows = [row for batch in batches(work, "packed", 0) for row in batch["rows"]]
    assert done["tokens"] == sum(token != 2 for row in rows for token in row)  # 2 is <pad>
    assert done["tokens"] < sum(map(len, rows)) and done["trained"]["lm_head"]
    assert done["heldout_loss"]["tokens"] == 8 * ROW
