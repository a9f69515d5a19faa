"""What streaming `taylor` through one layer at a time saves, against the whole model.

Makes Llama checkpoints of random bfloat16 weights with the layers of Llama 3 8B (2, 4 and 8 of
them), then scores and prunes each at 0.85 on the same text, each as a whole process:

* `axolotl-loram prune --method taylor --no-refit`;
* the whole model in memory, as LLM-Pruner has it: every weight and its gradient, here in float32
  too, and scores |Σ w ∂L/∂w| of each MLP neuron and attention head. It writes no model.

Where the second does not fit into this machine's memory, it is not run, and its row says so. The
first needs one layer or the output embedding, whichever is larger, in float32, and the activations
of one batch; hidden states are on disk.

    python benchmarks/taylor_stream.py [--layers 2 4 8] [--csv]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from measure import ROOT, append_row, surroundings, timed
from prune_stream import LLAMA_3_8B, RATIO, make_checkpoint

sys.path.insert(0, str(ROOT / "examples/quickstart"))

from pretrained import SMOLLM2, folder_of

from axolotl_loram.architecture.config_json import layer_count
from axolotl_loram.architecture.model import parameter_count, tensors

SAMPLES, LENGTH = 4, 128
WHOLE = """
import sys, torch
from transformers import AutoModelForCausalLM
from axolotl_loram.config import PruningArgs
from axolotl_loram.text.calibration import load_calibration
from pathlib import Path
base, text, samples, length = sys.argv[1:]
settings = PruningArgs(ratio=0.5, method="taylor", calibration_path=text,
                       calibration_samples=int(samples), calibration_length=int(length))
tokens = torch.from_numpy(load_calibration(settings, Path(base)).tokens)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
for row in tokens[:, None]:
    model(input_ids=row, labels=row).loss.backward()
for layer in model.model.layers:
    for reader in (layer.mlp.down_proj, layer.self_attn.o_proj):
        (reader.weight * reader.weight.grad).sum(0).abs()
"""


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run(config: dict, folder: Path) -> dict[str, object]:
    """One row."""
    base, text, output = folder / "base", folder / "text.txt", folder / "pruned"
    make_checkpoint(base, config)
    for file in folder_of(SMOLLM2).glob("tokenizer*"):
        shutil.copy(file, base)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
    text.write_text("\n".join(file.read_text(encoding="utf-8") for file in sources), "utf-8")
    options = ["--method", "taylor", "--no-refit", "--pruning-ratio", str(RATIO)]
    options += ["--calibration", str(text), "--protect-first", "0", "--protect-last", "0"]
    options += ["--calibration-samples", str(SAMPLES), "--calibration-length", str(LENGTH)]
    ours = [sys.executable, "-m", "axolotl_loram.cli", "prune", str(base), str(output), *options]
    seconds, peak = timed(ours)
    parameters = parameter_count(config)
    one_layer = sum(math.prod(t.shape) for t in tensors(config) if t.layer == 0)
    head = config["vocab_size"] * config["hidden_size"]
    row = {
        "hidden": config["hidden_size"],
        "layers": layer_count(config),
        "parameters": parameters,
        "layer_float32_bytes": 4 * one_layer,
        "head_float32_bytes": 4 * head,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
    }
    whole = [sys.executable, "-c", WHOLE, str(base), str(text), str(SAMPLES), str(LENGTH)]
    if 8 * parameters < 0.85 * memory():
        took, most = timed(whole)
        return {**row, "whole_seconds": round(took, 1), "whole_peak_bytes": most}
    return {**row, "whole_seconds": "", "whole_peak_bytes": "does not fit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="add rows to taylor_stream.csv")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--hidden", type=int, help="smaller shapes, to try the script")
    options = parser.parse_args()
    shape = dict(LLAMA_3_8B)
    if options.hidden:
        shape |= {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden}
        shape |= {"num_attention_heads": options.hidden // 128, "num_key_value_heads": 1}
    for layers in options.layers:
        (ROOT / "build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
            row = run({**shape, "num_hidden_layers": layers}, Path(scratch))
        print(json.dumps(row))
        if options.csv:
            row |= {"samples": SAMPLES, "length": LENGTH}
            append_row(Path(__file__).with_suffix(".csv"), {**row, **surroundings()})


if __name__ == "__main__":
    main()
