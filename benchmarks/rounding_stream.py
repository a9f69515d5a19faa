"""What rounding to 4 bits on text takes: processor seconds and host memory of a CPU.

Of a checkpoint with two layers of random bfloat16 weights the first goes whole, and the other is
written in NF4 with its numbers fitted to each other on 16 × 512 tokens (`quantize: nf4-gptq`), as a
whole process. The smallest width's figures stand for what a process takes anyway.

    python benchmarks/rounding_stream.py [--hidden 1024 2048 4096] [--csv]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from measure import ROOT, append_row, surroundings
from prune_stream import LLAMA_3_8B
from refit_stream import pruned

ROWS = Path(__file__).with_suffix(".csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="add rows to rounding_stream.csv")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    how = ("--units", "layers", "--pruning-ratio", "0.5", "--quantize", "nf4-gptq")
    for hidden in options.hidden:
        shape = {**LLAMA_3_8B, "hidden_size": hidden, "intermediate_size": 7 * hidden // 2}
        shape |= {"num_attention_heads": hidden // 128, "vocab_size": 32000}
        shape |= {"num_hidden_layers": 2}
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
            row = pruned(shape, options.samples, Path(scratch), *how)
        print(json.dumps(row), flush=True)
        if options.csv:
            append_row(ROWS, {**row, **surroundings("transformers", "bitsandbytes")})


if __name__ == "__main__":
    main()
