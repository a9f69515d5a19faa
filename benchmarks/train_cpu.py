"""Step time and memory of LoRA on the base against LoRAM, by `axolotl train` on one CPU thread.

A Llama with random weights, so wide that matrix products dominate, in float32. Every run has the
same Axolotl settings but for the plugin and its section. Each measurement is a process of its own;
the cases take turns, and the median is over all their steps but the first of each process. Seconds
are of processor time, which other processes disturb less than the clock's.

Arithmetic is the planner's (`axolotl_loram/memory/compute.py`), for each token.
share = (step time of LoRA / of LoRAM) / (operations of LoRA / of LoRAM). Rows of 7eff31a2ca86 count
5 % more: attention over the whole sequence, and the gradient of the first layer's input.

Predicted bytes are the planner's `allocated_bytes`, which has neither context nor slack; measured
is the peak of resident memory in training over what was resident before the model was loaded.

    python benchmarks/train_cpu.py [--csv] [--checkpointing] [--repeats N] [--hidden N --layers N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from measure import ROOT, append_row, surroundings

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.config import PruningArgs
from axolotl_loram.memory.compute import training_flops
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import predict
from axolotl_loram.memory.settings import TrainingArgs, settings_of
from axolotl_loram.pruning.prune import prune

RATIOS = (0.0, 0.5, 0.85)
VOCABULARY, LENGTH, BATCH, RANK, STEPS, PROTECTED = 2048, 256, 2, 8, 5, (1, 1)


def make_base(folder: Path, hidden: int, layers: int) -> None:
    """A Llama with random weights and a tokenizer of as many words; heads are 64 wide."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=8,
        head_dim=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 3)}
    special = {name: len(words) + i for i, name in enumerate(("<bos>", "<eos>", "<pad>"))}
    model = Tokenizer(models.WordLevel({**words, **special}, unk_token="w0"))
    names = {name.strip("<>") + "_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=model, **names).save_pretrained(folder)


def make_data(file: Path) -> None:
    """Rows of random tokens, prepared already."""
    rows = [[random.randrange(VOCABULARY - 3) for _ in range(LENGTH)] for _ in range(64)]
    named = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in rows]
    file.write_text("\n".join(map(json.dumps, named)), encoding="utf-8")


def settings(
    scratch: Path, ratio: float, checkpointing: bool, **changes: object
) -> dict[str, object]:
    """An Axolotl config; ratio 0 is LoRA on the base."""
    pruned = {"loram": {"pruned_model_path": str(scratch / str(ratio))}} if ratio else {}
    return {
        "base_model": str(scratch / "base"),
        "plugins": ["axolotl_loram.LoRAMPlugin"] * bool(ratio) + ["stopwatch.StopwatchPlugin"],
        **pruned,
        "datasets": [{"path": str(scratch / "data.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(scratch / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(scratch / f"out-{ratio}"),
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0,
        "lora_target_linear": True,
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")},
        "sequence_len": LENGTH,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpointing,
        "max_steps": STEPS,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        **dict.fromkeys(("bf16", "fp16", "tf32", "sample_packing"), False),
        "attn_implementation": "sdpa",
        "save_strategy": "no",
        **changes,
    }


def train(scratch: Path, ratio: float, checkpointing: bool, **changes: object) -> dict:
    """What the stopwatch found in one run of `axolotl train`."""
    file = scratch / "run.yml"
    run = settings(scratch, ratio, checkpointing, **changes)
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    quiet = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [str(Path(sys.executable).with_name("axolotl")), "train", str(file)]
    command += ["--launcher", "python"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"axolotl train failed: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    output = scratch / f"out-{ratio}"  # LoRAM trains in a folder inside
    found = json.loads(next(output.rglob("stopwatch.json")).read_text(encoding="utf-8"))
    shutil.rmtree(output)
    return found


def row_of(scratch: Path, ratio: float, checkpointing: bool, runs: list[dict]) -> dict:
    """Figures of one case, but for those that compare it with LoRA."""
    folder = scratch / (str(ratio) if ratio else "base")
    layout = Layout.of(load_config(str(folder)))
    run = TrainingArgs(**settings_of(settings(scratch, ratio, checkpointing)))
    prediction = predict(layout, run, "loram" if ratio else "lora")
    steps = [step for found in runs for step in found["steps"][1:]]
    grown = statistics.median(found["peak_bytes"] - found["before_model_bytes"] for found in runs)
    return {
        "method": "loram" if ratio else "lora",
        "ratio": ratio,
        "gradient_checkpointing": checkpointing,
        "layers": layout.depth,
        "hidden": layout.hidden,
        "tokens": LENGTH * BATCH,
        "steps": len(steps),
        "step_cpu_seconds": round(statistics.median(cpu for cpu, _ in steps), 3),
        "step_cpu_min": round(min(cpu for cpu, _ in steps), 3),
        "step_cpu_max": round(max(cpu for cpu, _ in steps), 3),
        "step_wall_seconds": round(statistics.median(wall for _, wall in steps), 3),
        "step_gflop": round(training_flops(run, layout).total * run.tokens / 1e9, 1),
        "peak_rss_bytes": max(found["peak_bytes"] for found in runs),
        "loading_rss_bytes": max(found["loading_peak_bytes"] for found in runs),
        "predicted_allocated_bytes": prediction.allocated_bytes,
        "measured_growth_bytes": round(grown),
    }


def compared(row: dict, lora: dict) -> dict:
    """`row` with what LoRA takes in proportion to it."""
    arithmetic = lora["step_gflop"] / row["step_gflop"]
    seconds = lora["step_cpu_seconds"] / row["step_cpu_seconds"]
    return {
        **row,
        "flop_ratio": round(arithmetic, 3),
        "step_time_ratio": round(seconds, 3),
        "share": round(seconds / arithmetic, 3),
        "measured_to_predicted": round(
            row["measured_growth_bytes"] / row["predicted_allocated_bytes"], 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="add rows to train_cpu.csv")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on")
    parser.add_argument("--repeats", type=int, default=2, help="processes for each case")
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 512")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_base(scratch / "base", options.hidden, options.layers)
        make_data(scratch / "data.jsonl")
        first, last = PROTECTED
        for ratio in RATIOS[1:]:
            how = PruningArgs(ratio=ratio, protect_first=first, protect_last=last)
            prune(str(scratch / "base"), scratch / str(ratio), how)
        found: dict[float, list[dict]] = {ratio: [] for ratio in RATIOS}
        for _ in range(options.repeats):
            for ratio, runs in found.items():
                runs.append(train(scratch, ratio, options.checkpointing))
                print(ratio, runs[-1], file=sys.stderr)
        rows = [
            row_of(scratch, ratio, options.checkpointing, runs) for ratio, runs in found.items()
        ]
    for row in rows:
        row = compared(row, rows[0])
        print("\n".join(f"{name:26} {value}" for name, value in row.items()), end="\n\n")
        if options.csv:
            append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings()})


if __name__ == "__main__":
    main()
