"""What pruning by `activation` with the refit takes: processor seconds and host memory of a CPU.

Makes Llama checkpoints of random bfloat16 weights, all layers pruned, and prunes each by
`axolotl-loram prune --method activation` on the same text, as a whole process. One layer is in
memory at a time, in float32, so that the peak follows the layer and not the model; the time follows
layers × tokens. Processor seconds are of all threads: others may be on the machine.

--extrapolate says what a fit over all rows of that ratio says of a real model:

    seconds = a + b × layer parameters × layers × tokens        (least squares)
    peak    = c + d × float32 bytes of a layer                  (least squares)

    python benchmarks/refit_stream.py [--hidden 2048 4096] [--samples 4 16] [--ratio 0.5] [--csv]
    python benchmarks/refit_stream.py --extrapolate docs/configs/llama-3.1-70b.json
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import resource
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from measure import ROOT, append_row, surroundings, timed
from prune_stream import LLAMA_3_8B, make_checkpoint

from axolotl_loram.architecture.config_json import layer_count, load_config
from axolotl_loram.architecture.model import parameter_count, tensors

ROWS = Path(__file__).with_suffix(".csv")
LENGTH = 512
DEFAULT_TOKENS = 128 * 512


def processor_seconds() -> float:
    """Of all children so far, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def layer_parameters(config: dict) -> int:
    """Parameters of a layer in the middle."""
    middle = layer_count(config) // 2
    return sum(math.prod(t.shape) for t in tensors(config) if t.layer == middle)


def run(config: dict, samples: int, ratio: float, folder: Path) -> dict[str, object]:
    """One row."""
    options = ["--method", "activation", "--pruning-ratio", str(ratio)]
    options += ["--protect-first", "0", "--protect-last", "0"]
    return {"ratio": ratio, **pruned(config, samples, folder, *options)}


def pruned(config: dict, samples: int, folder: Path, *options: str) -> dict[str, object]:
    """What one pruning takes, of a checkpoint that is made for it."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/support")]
    from conftest import byte_tokenizer

    base, text, output = folder / "base", folder / "text.txt", folder / "pruned"
    make_checkpoint(base, config)
    byte_tokenizer().save_pretrained(base)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
    text.write_text("\n".join(file.read_text(encoding="utf-8") for file in sources), "utf-8")
    options += ("--device", "cpu", "--calibration", str(text))
    options += ("--calibration-samples", str(samples), "--calibration-length", str(LENGTH))
    before = processor_seconds()
    command = [sys.executable, "-m", "axolotl_loram.cli", "prune", str(base), str(output)]
    wall, peak = timed([*command, *options])
    return {
        "hidden": config["hidden_size"],
        "neurons": config["intermediate_size"],
        "layers": layer_count(config),
        "layer_parameters": layer_parameters(config),
        "tokens": samples * LENGTH,
        "processor_seconds": round(processor_seconds() - before, 1),
        "wall_seconds": round(wall, 1),
        "peak_bytes": peak,
    }


def extrapolate(model: str, ratio: float) -> None:
    """Print what a ratio's rows say of a model with the default calibration (128 × 512 tokens)."""
    with ROWS.open(encoding="utf-8", newline="") as handle:
        rows = [{k: float(row[k]) for k in list(row)[:9]} for row in csv.DictReader(handle)]
    rows = [row for row in rows if row["ratio"] == ratio]
    each = np.array([row["layer_parameters"] for row in rows])
    work = each * [row["layers"] * row["tokens"] for row in rows]
    seconds, peaks = (
        np.array([row[n] for row in rows]) for n in ("processor_seconds", "peak_bytes")
    )
    start, slope = np.linalg.lstsq(np.column_stack([np.ones(len(rows)), work]), seconds)[0]
    bytes_of = np.column_stack([np.ones(len(rows)), 4 * each])
    memory = np.linalg.lstsq(bytes_of, peaks)[0]
    config = load_config(model)
    one = layer_parameters(config)
    total = start + slope * one * layer_count(config) * DEFAULT_TOKENS
    errors = np.abs(bytes_of @ memory / peaks - 1).max()
    print(f"{model}: {parameter_count(config):,} parameters, {one:,} in a layer")
    print(f"processor seconds {total:,.0f} ({total / 3600:.1f} h), {DEFAULT_TOKENS:,} tokens")
    print(f"peak {(memory @ [1, 4 * one]) / 2**30:.1f} GiB (rows fit within {errors:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="add rows to refit_stream.csv")
    parser.add_argument("--ratio", type=float, default=0.85)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--extrapolate", metavar="MODEL", nargs="+", default=[])
    options = parser.parse_args()
    for model in options.extrapolate:
        extrapolate(model, options.ratio)
    cases = [(h, n, s) for h in options.hidden for n in options.layers for s in options.samples]
    for hidden, layers, samples in [] if options.extrapolate else cases:
        shape = {**LLAMA_3_8B, "hidden_size": hidden, "intermediate_size": 7 * hidden // 2}
        shape |= {"num_attention_heads": hidden // 128, "vocab_size": 32000}
        shape |= {"num_hidden_layers": layers}
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
            row = run(shape, samples, options.ratio, Path(scratch))
        print(json.dumps(row), flush=True)
        if options.csv:
            append_row(ROWS, {**row, **surroundings("transformers")})


if __name__ == "__main__":
    main()
