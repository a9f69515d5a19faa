"""Host memory of loading a checkpoint under ZeRO-3, per rank: anonymous pages and mapped files.

Makes a checkpoint of random bfloat16 weights (Llama, or Mixtral, whose experts are stored one by
one and stacked in memory), and loads it on two ranks of a CPU as transformers does, and with
`read_once`. Anonymous pages are a rank's own; mapped ones are page cache,
which all ranks share and the kernel takes back. On a CPU a rank's share of the weights, and each
weight while it is sent around, are host memory too: on a GPU, `share_bytes` would not be.

    python benchmarks/loading.py [--family mixtral] [--csv]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from measure import ROOT, append_row, surroundings

RANKS = 2
COMMON = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000}
CONFIGS = {
    "llama": COMMON | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12},
    "mixtral": COMMON
    | {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
}


def make(folder: Path, family: str) -> int:
    """Writes a checkpoint; returns its bytes."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**CONFIGS[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.uniform_(-0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="300MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident() -> dict[str, int]:
    """Bytes of this process by kind, as /proc has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith("Rss"))
    return {name: int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def watch(peak: dict[str, int]) -> None:
    """Keeps the highest of each kind in `peak`."""
    while True:
        for name, size in resident().items():
            peak[name] = max(peak.get(name, 0), size)
        time.sleep(0.01)


def load(folder: Path, output: Path, once: bool) -> None:
    """One rank, under torchrun."""
    import deepspeed
    import torch
    from read_once import read_once
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    settings = HfDeepSpeedConfig(config | {"train_micro_batch_size_per_gpu": 1})
    if once:
        read_once()
    before, peak, start = resident(), {}, time.perf_counter()
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    del settings
    found = {
        "rank": torch.distributed.get_rank(),
        "anonymous_bytes": peak["RssAnon"] - before["RssAnon"],
        "mapped_bytes": peak["RssFile"] - before["RssFile"],
        "share_bytes": sum(2 * weight.ds_tensor.numel() for weight in model.parameters()),
        "largest_weight_bytes": max(2 * weight.ds_numel for weight in model.parameters()),
        "seconds": round(seconds, 1),
        "sum": float(sum(weight.ds_tensor.double().sum() for weight in model.parameters())),
    }
    (output / f"rank{found['rank']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def measure(folder: Path, once: bool) -> list[dict[str, object]]:
    """What each rank found."""
    # Blocks of 1 MiB and more go back to the kernel when they are freed, or the heap's holes count.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
        command += [__file__, "--worker", str(folder), output, *(["--once"] if once else [])]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(file.read_text()) for file in sorted(Path(output).glob("rank*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=CONFIGS, nargs="+", default=list(CONFIGS))
    parser.add_argument("--csv", action="store_true", help="append to loading.csv")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        load(*arguments.worker, arguments.once)
        return
    for family in arguments.family:
        folder = Path(tempfile.mkdtemp(dir=ROOT / "build" if (ROOT / "build").is_dir() else None))
        try:
            size = make(folder, family)
            for once in (False, True):
                for found in measure(folder, once):
                    how = "read_once" if once else "transformers"
                    row = {"family": family, "checkpoint_bytes": size, "loader": how, **found}
                    row |= surroundings("transformers", "deepspeed")
                    print(json.dumps(row))
                    if arguments.csv:
                        append_row(ROOT / "benchmarks/loading.csv", row)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
