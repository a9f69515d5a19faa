"""QLoRA on the whole SmolLM2-135M-Instruct against QLoRAM: steps and memory beside the prediction.

`axolotl train` on one CPU thread in float32, with weights in NF4; every run has the same settings
but for the plugin and its section. Each measurement is a process of its own, and the cases take
turns. Seconds are of processor time. The bound is the planner's operations for a token
(`axolotl_loram/memory/compute.py`) over the rate of a large float32 matrix product, measured
between the runs by the same clock; the memory is the peak of what is resident in training over what
was before the model was loaded, with an allocator that gives freed blocks back
(MALLOC_MMAP_THRESHOLD_). On a CPU weights that are kept in host memory are resident too, and so in
the prediction.

    python benchmarks/which_way.py [--csv] [--repeats N] [--steps N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, append_row, surroundings
from train_cpu import make_data, settings, train

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.config import PruningArgs
from axolotl_loram.memory.compute import training_flops
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import predict
from axolotl_loram.memory.settings import TrainingArgs, settings_of
from axolotl_loram.pruning.prune import prune

RATIOS = (0.0, 0.5, 0.75)
FOUR_BIT = {"adapter": "qlora", "load_in_4bit": True, "micro_batch_size": 1}


def flops_per_second() -> float:
    """Of a large matrix product in float32, on one thread, by processor time."""
    import torch

    torch.set_num_threads(1)
    left, right = torch.randn(1024, 2048), torch.randn(2048, 2048)
    found = []
    for _ in range(5):
        start = time.process_time()
        left @ right
        found.append(2 * 1024 * 2048 * 2048 / (time.process_time() - start))
    return max(found)


def row_of(scratch: Path, ratio: float, changes: dict, runs: list[dict], rate: float) -> dict:
    """Figures of one case."""
    layout = Layout.of(load_config(str(scratch / (str(ratio) if ratio else "base"))))
    run = TrainingArgs(**settings_of(settings(scratch, ratio, True, **changes)))
    method = "qloram" if ratio else "qlora"
    prediction = predict(layout, run, method)
    bytes_predicted = prediction.allocated_bytes + prediction.weights_host_bytes
    steps = [cpu for found in runs for cpu, _ in found["steps"][1:]]
    grown = statistics.median(found["peak_bytes"] - found["before_model_bytes"] for found in runs)
    flops = training_flops(run, layout).total * run.tokens
    seconds = statistics.median(steps)
    return {
        "method": method,
        "ratio": ratio,
        "tokens": run.tokens,
        "runs": len(runs),
        "steps": len(steps),
        "step_cpu_seconds": round(seconds, 3),
        "step_cpu_min": round(min(steps), 3),
        "step_cpu_max": round(max(steps), 3),
        "step_gflop": round(flops / 1e9, 1),
        "gflop_per_second": round(rate / 1e9, 1),
        "bound_seconds": round(flops / rate, 3),
        "bound_to_measured": round(flops / rate / seconds, 3),
        "predicted_bytes": bytes_predicted,
        "measured_growth_bytes": round(grown),
        "measured_to_predicted": round(grown / bytes_predicted, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="add rows to which_way.csv")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each case")
    parser.add_argument("--steps", type=int, default=5, help="of each process")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    sys.path.insert(0, str(ROOT / "examples/quickstart"))
    from pretrained import SMOLLM2, folder_of

    changes = {**FOUR_BIT, "max_steps": options.steps}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "base").symlink_to(folder_of(SMOLLM2).resolve())
        make_data(scratch / "data.jsonl")
        for ratio in RATIOS[1:]:
            prune(str(scratch / "base"), scratch / str(ratio), PruningArgs(ratio=ratio))
        found: dict[float, list[dict]] = {ratio: [] for ratio in RATIOS}
        rates = []
        for _ in range(options.repeats):
            for ratio, runs in found.items():
                rates.append(flops_per_second())
                runs.append(train(scratch, ratio, True, **changes))
                print(ratio, rates[-1], runs[-1], file=sys.stderr, flush=True)
        rate = statistics.median(rates)
        rows = [row_of(scratch, ratio, changes, runs, rate) for ratio, runs in found.items()]
    for row in rows:
        row["flop_ratio"] = round(rows[0]["step_gflop"] / row["step_gflop"], 3)
        row["step_time_ratio"] = round(rows[0]["step_cpu_seconds"] / row["step_cpu_seconds"], 3)
        row["memory_ratio"] = round(
            rows[0]["measured_growth_bytes"] / row["measured_growth_bytes"], 3
        )
        row["predicted_memory_ratio"] = round(
            rows[0]["predicted_bytes"] / row["predicted_bytes"], 3
        )
        print("\n".join(f"{key:26} {value}" for key, value in row.items()), end="\n\n")
        if options.csv:
            append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings("bitsandbytes")})


if __name__ == "__main__":
    main()
