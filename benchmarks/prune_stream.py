"""How long pruning a checkpoint takes against copying the bytes it moves, and in how much memory.

Makes a Llama checkpoint of random bfloat16 weights on the spot, with the layers of Llama 3 8B and
as many of them as asked for, then runs in turn, each as a whole process:

* `axolotl-loram prune` at ratio 0.85, which also hashes what it writes and syncs it to disk;
* a copy: a script that imports next to nothing, reads as many bytes as pruning must and writes as
  many bytes as the pruned model has, in blocks of 16 MiB, and syncs each file.

What pruning must read: to score, each tensor with pruned units once (`magnitude`; `random` scores
without reading); to write, the kept rows of tensors pruned along rows, else the whole tensor, since
kept columns lie all over it. The copy reads as many bytes, but from the start of each tensor on.

Importing transformers, which fills in the config's defaults, takes seconds whatever the size of the
model: `startup_seconds` says how long `axolotl-loram plan` takes, which does that and no more, and
`share_without_startup` is the share of the copy's speed when that is taken off.

The page cache is `cold` (the checkpoint's pages are dropped before each run) or `warm` (it was read
whole), for both alike; what is written is on the disk when either ends.

    python benchmarks/prune_stream.py [--method magnitude] [--layers 14] [--scaling] [--csv]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, append_row, surroundings, timed

from axolotl_loram.architecture.model import Tensor, tensors
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.files.tensors import MODEL_FILE, Checkpoint, has_weights, write_safetensors

RATIO = 0.85
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
NARROW = {**LLAMA_3_8B, "hidden_size": 2048, "intermediate_size": 7168, "vocab_size": 32000}
NARROW |= {"num_attention_heads": 16, "num_key_value_heads": 4}
METHODS: dict[str, list[str]] = {"random": [], "magnitude": []}
"""Method → further options of the command."""
SHARD_BYTES = 4 * 10**9
TILE_BYTES = 32 * 2**20
COPY = """
import json, os, sys
buffer = memoryview(bytearray(16 * 2**20))
for target, parts in json.load(open(sys.argv[1])):
    with open(target, "wb", buffering=0) as output:
        for source, start, reads, writes in parts:
            with open(source, "rb", buffering=0) as handle:
                handle.seek(start)
                while reads:
                    got = handle.readinto(buffer[:reads])
                    reads -= got
                    writes -= output.write(buffer[: min(got, writes)])
        os.fsync(output.fileno())
"""


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights; parts of one random block, in little memory.

    The kernel counts the memory that this process has had at its peak to its children too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tile = np.empty(TILE_BYTES // 2, np.uint16)
    for part in np.split(tile, 32):
        normal = rng.standard_normal(len(part), dtype=np.float32) * np.float32(0.02)
        part[:] = normal.view(np.uint32) >> 16

    def bits(size: int) -> Iterator[np.ndarray]:
        while size:
            start = int(rng.integers(len(tile) // 2))
            count = min(size, len(tile) // 2)
            yield tile[start : start + count]
            size -= count

    shards = deal(list(tensors(config)))
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        described = [(tensor.name, "BF16", tensor.shape) for tensor in members]
        write_safetensors(folder / file, described, (bits(math.prod(t.shape)) for t in members))
        weight_map |= dict.fromkeys((tensor.name for tensor in members), file)
    (folder / f"{MODEL_FILE}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(config))


def deal(members: list[Tensor]) -> list[list[Tensor]]:
    """Shards of at most `SHARD_BYTES`, in order."""
    shards: list[list[Tensor]] = [[]]
    for tensor in members:
        if sum(2 * math.prod(t.shape) for t in [*shards[-1], tensor]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def copy_job(base: Path, pruned: Path, target: Path, method: str) -> list[tuple[str, list]]:
    """What the copy reads and writes: for each file (source, start, bytes to read, to write)."""
    plan = PruningPlan.load(pruned)
    source, result = Checkpoint(base), Checkpoint(pruned)
    scored, files = [], {shard: [] for shard in source.shards}
    for tensor in tensors(plan.config):
        stored, features = source[tensor.name], plan.features(tensor.dims, tensor.layer)
        part = (str(stored.file), stored.start)
        if method != "random" and any(kept is not None for kept in features):
            scored.append((*part, stored.nbytes, 0))
        share = 1 if features[0] is None else len(features[0]) / stored.shape[0]
        reads, writes = round(stored.nbytes * share), result[tensor.name].nbytes
        files[stored.file.name].append((*part, reads, writes))
    jobs = [("scored", scored), *files.items()]
    return [(str(target / name), parts) for name, parts in jobs]


def set_cache(base: Path, cache: str) -> None:
    """Drop the checkpoint from the page cache, or read it into it."""
    os.sync()
    for file in base.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            if cache == "cold":
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = bytearray(16 * 2**20)
                while handle.readinto(buffer):
                    pass


def measure(base: Path, scratch: Path, method: str, cache: str, runs: int) -> dict[str, object]:
    """Medians over `runs` runs of each, in turn, after one pruning that is not counted."""
    output, job, target = scratch / "pruned", scratch / "job.json", scratch / "copy"
    ours = [sys.executable, "-m", "axolotl_loram.cli", "prune", str(base), str(output)]
    ours += ["--overwrite", "--pruning-ratio", str(RATIO), "--method", method, *METHODS[method]]
    copy = [sys.executable, "-c", COPY, str(job)]
    startup = [*ours[:3], "plan", str(base), "--pruning-ratio", str(RATIO)]
    timed(ours)
    jobs = copy_job(base, output, target, method)
    job.write_text(json.dumps(jobs))
    seconds, copies, startups, peaks = [], [], [], []
    for run in range(runs):
        for command in (copy, ours) if run % 2 else (ours, copy):
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            set_cache(base, cache)
            took, peak = timed(command)
            (copies if command is copy else seconds).append(took)
            peaks += [peak] if command is ours else []
        startups.append(timed(startup)[0])
        took, least, idle = seconds[-1], copies[-1], startups[-1]
        print(
            f"run {run + 1}: {took:.2f} s, copy {least:.2f} s, start {idle:.2f} s", file=sys.stderr
        )
    reads = sum(part[2] for _, parts in jobs for part in parts)
    writes = sum(part[3] for _, parts in jobs for part in parts)
    shares = [least / took for took, least in zip(seconds, copies, strict=True)]
    without = [c / (took - idle) for took, c, idle in zip(seconds, copies, startups, strict=True)]
    return {
        "seconds": round(statistics.median(seconds), 2),
        "copy_seconds": round(statistics.median(copies), 2),
        "share_of_copy_speed": round(statistics.median(shares), 3),
        "share_min": round(min(shares), 3),
        "share_max": round(max(shares), 3),
        "startup_seconds": round(statistics.median(startups), 2),
        "share_without_startup": round(statistics.median(without), 3),
        "bytes_per_second": round((reads + writes) / statistics.median(seconds)),
        "copy_bytes_per_second": round((reads + writes) / statistics.median(copies)),
        "read_bytes": reads,
        "written_bytes": writes,
        "peak_bytes": max(peaks),
        "runs": runs,
    }


def benchmark(config: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row for each method and state of the page cache."""
    base = options.folder / f"llama-{config['hidden_size']}x{config['num_hidden_layers']}"
    if not has_weights(base):
        make_checkpoint(base, config)
    size = sum(tensor.nbytes for tensor in Checkpoint(base).tensors.values())
    about = {"hidden": config["hidden_size"], "layers": config["num_hidden_layers"]}
    try:
        for method in options.method or METHODS:
            for cache in options.cache or ("cold", "warm"):
                with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                    row = measure(base, Path(scratch), method, cache, options.runs)
                yield {"method": method, "cache": cache, **about, "base_bytes": size, **row}
    finally:
        if not options.keep:
            shutil.rmtree(base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line per row")
    parser.add_argument("--csv", action="store_true", help="add rows to prune_stream.csv")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--cache", action="append", choices=("cold", "warm"), help="default: both")
    parser.add_argument("--layers", type=int, default=14, help="14: 8.2 GB")
    parser.add_argument(
        "--scaling", action="store_true", help="8, 16 and 32 narrower layers instead"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/prune_stream")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next time")
    options = parser.parse_args()
    shapes = [{**LLAMA_3_8B, "num_hidden_layers": options.layers}]
    if options.scaling:
        shapes = [{**NARROW, "num_hidden_layers": layers} for layers in (8, 16, 32)]
    for config in shapes:
        for row in benchmark(config, options):
            if options.csv:
                append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings()})
            lines = "\n".join(f"{name:22} {value}" for name, value in row.items())
            print(json.dumps(row) if options.json else f"{lines}\n", flush=True)


if __name__ == "__main__":
    main()
