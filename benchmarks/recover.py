"""How long recovering a 70B adapter takes, against merely reading and writing its tensors.

Makes a rank-8 adapter of the shape of LLaMA-2-70B pruned at 0.85 (80 layers, all projections,
float32), then runs in turn, each as a whole process:

* `axolotl-loram recover`, which also checks the adapter, syncs it to disk and writes its card;
* the floor: a script that imports torch, reads those tensors and writes tensors of the output's
  shapes, with nothing checked and nothing synced. Recovery moves bits and never imports torch, so
  the time that the import takes is given too.

    python benchmarks/recover.py [--json] [--csv]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import append_row, surroundings, timed
from safetensors.numpy import save_file

from axolotl_loram.architecture.counts import keep_counts
from axolotl_loram.architecture.model import tensors
from axolotl_loram.architecture.plan import Base, PruningPlan, entries_of
from axolotl_loram.pruning.importance import random_scores, select

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
FLOOR = """
import sys, torch
from safetensors.torch import load_file, save_file
source, shapes, target = sys.argv[1:]
loaded = load_file(source)
shapes = load_file(shapes)
save_file({name: torch.zeros(tuple(shapes[name].tolist())) for name in loaded}, target)
"""


def make_adapter(folder: Path, layers: int, rank: int) -> None:
    """Write a plan, and an adapter trained under it, with the shapes of its recovery aside."""
    config = {**LLAMA_2_70B, "num_hidden_layers": layers}
    counts = keep_counts(config, 0.85, 4, 2)
    kept = {
        name: select(
            random_scores(28672 if group.kind == "neurons" else 8, 0, layer, group.kind), n
        )
        for name, layer, group in entries_of(config)
        if (n := counts.get(layer, {}).get(group.kind))
    }
    plan = PruningPlan(config, kept, Base("meta-llama/Llama-2-70b-hf"))
    (folder / "pruned").mkdir()
    plan.save(folder / "pruned")
    rng = np.random.default_rng(0)
    whole = {t.module: t.shape for t in tensors(config)}
    adapter, shapes = {}, {}
    for tensor in tensors({**config, **plan.changes}):
        if tensor.layer is None or len(tensor.dims) != 2:
            continue
        for part, axis in (("lora_A", 1), ("lora_B", 0)):
            name = f"base_model.model.{tensor.module}.{part}.weight"
            shape = (rank, tensor.shape[1]) if axis else (tensor.shape[0], rank)
            full = whole[tensor.module][axis]
            adapter[name] = rng.standard_normal(shape, dtype=np.float32)
            shapes[name] = np.array((rank, full) if axis else (full, rank))
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    save_file(shapes, folder / "shapes.safetensors")
    described = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": str(folder / "pruned")}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(described))


def measure(folder: Path, runs: int) -> dict[str, object]:
    """Medians over `runs` runs of each, in turn, after one that is not counted."""
    source, target = folder / "adapter/adapter_model.safetensors", folder / "out"
    ours = [sys.executable, "-m", "axolotl_loram.cli", "recover", str(source.parent)]
    ours += ["--output", str(target)]
    floor = [sys.executable, "-c", FLOOR, str(source), str(folder / "shapes.safetensors")]
    floor += [str(folder / "floor.safetensors")]
    seconds, floors, peaks, output = [], [], [], 0
    for run in range(runs + 1):
        print(f"run {run} of {runs}", file=sys.stderr)
        shutil.rmtree(target, ignore_errors=True)
        took, peak = timed(ours)
        output = sum(file.stat().st_size for file in target.iterdir())
        least, _ = timed(floor)
        if run:
            seconds.append(took)
            floors.append(least)
            peaks.append(peak)
    imports, _ = timed([sys.executable, "-c", "import torch, safetensors.torch"])
    ratios = [took / least for took, least in zip(seconds, floors, strict=True)]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "floor_seconds": round(statistics.median(floors), 3),
        "floor_import_seconds": round(imports, 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "peak_bytes": max(peaks),
        "input_bytes": source.stat().st_size,
        "output_bytes": output,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--csv", action="store_true", help="add a row to recover.csv")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_adapter(Path(scratch), options.layers, options.rank)
        result = measure(Path(scratch), options.runs)
    row = {"layers": options.layers, "rank": options.rank, **result}
    if options.csv:
        append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings()})
    print(json.dumps(row) if options.json else "\n".join(f"{k:14} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
