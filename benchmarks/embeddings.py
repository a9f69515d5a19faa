"""What an lm_head and an embedding in fewer bits cost: QLoRAM with each format, recovered.

On the toy base (a small Llama that has read Python source; the task is to write a
function's docstring; whole modules are held out). The base is pruned once at 0.5 and loaded in NF4,
as `adapter: qloram` does; then, for each pair of formats, the same LoRA (start, data, order, steps)
is trained and recovered, and the base is measured with it. The seed decides LoRA's start and data.
The vocabulary's two matrices are 19 % of this base's parameters.

    python benchmarks/embeddings.py            # rows that embeddings.csv has are not run again
    python benchmarks/embeddings.py --summary  # table of the rows
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

from criteria import BUILD, STEPS, base, data, heldout_perplexity, load, subset, train
from measure import append_row, surroundings
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from axolotl_loram.config import PruningArgs
from axolotl_loram.models.formats import Formats
from axolotl_loram.models.small_head import store_small, weight_bytes
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

ROWS = Path(__file__).with_suffix(".csv")
RATIO, SEEDS = 0.5, (0, 1)
CASES = (  # lm_head, embedding, block size of NF4
    ("native", "native", 64),
    ("nf4", "native", 64),
    ("native", "cpu", 64),
    ("nf4", "cpu", 64),
    ("nf4", "cpu", 128),
)


def load_in_4bit(folder: Path, block: int):
    """As Axolotl does; a checkpoint of another block size is in 4 bits already."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    settings = {"quantization_config": quantization} if block == 64 else {}
    folder = folder if block == 64 else folder.with_name(f"{folder.name}-{block}")
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def run(case: tuple[str, str, int], seed: int, pruned: Path, tokenizer) -> dict[str, object]:
    """One row."""
    lm_head, embedding, block = case
    start = time.perf_counter()
    model = load_in_4bit(pruned, block)
    store_small(model, Formats(lm_head, embedding), len(tokenizer))
    size = weight_bytes(model)
    with tempfile.TemporaryDirectory() as scratch:
        train(model, tokenizer, seed, STEPS).save_pretrained(scratch)
        recovered = recover(Path(scratch), str(pruned), Path(scratch, "recovered"))["output"]
        model = PeftModel.from_pretrained(load(BUILD / "base"), recovered)
    task = round(heldout_perplexity(model, tokenizer, subset("task")), 3)
    took = round(time.perf_counter() - start, 1)
    names = {"lm_head": lm_head, "embedding": embedding, "block_size": block, "seed": seed}
    return {
        **names,
        "lora_steps": STEPS,
        "weight_bytes": size,
        "recovered_task": task,
        "seconds": took,
    }


def key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("lm_head", "embedding", "block_size", "seed"))


def rows() -> list[dict]:
    return list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []


def show() -> None:
    """Mean over the seeds, and of each seed's ratio to the same seed with native formats."""
    native = {row["seed"]: row for row in rows() if key(row)[:3] == ("native", "native", "64")}
    print(
        f"{'lm_head':8}{'embedding':10}{'block':>5}{'bytes':>10}{'task':>9}  to native (each seed)"
    )
    for case in CASES:
        own = [row for row in rows() if key(row)[:3] == tuple(map(str, case))]
        if own:
            ratios = [
                float(row["recovered_task"]) / float(native[row["seed"]]["recovered_task"]) - 1
                for row in own
            ]
            mean = statistics.mean(float(row["recovered_task"]) for row in own)
            each = " ".join(f"{ratio:+.2%}" for ratio in ratios)
            print(
                f"{case[0]:8}{case[1]:10}{case[2]:5}{int(own[0]['weight_bytes']):10,}{mean:9.2f}  "
                f"{statistics.mean(ratios):+.2%} ({each})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="only the table")
    parser.add_argument("--limit", type=int, help="run at most so many rows")
    options = parser.parse_args()
    if not options.summary:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        data.build(BUILD / "data")
        base.build(BUILD / "data/pretrain.jsonl", BUILD / "base")
        tokenizer = AutoTokenizer.from_pretrained(BUILD / "base")
        done = {key(row) for row in rows()}
        todo = [(case, seed) for seed in SEEDS for case in CASES]
        todo = [(case, seed) for case, seed in todo if (*map(str, case), str(seed)) not in done]
        with tempfile.TemporaryDirectory() as scratch:
            pruned = Path(scratch, "pruned")
            prune(str(BUILD / "base"), pruned, PruningArgs(ratio=RATIO))
            packed = PruningArgs(ratio=RATIO, quantize="nf4", quantize_block_size=128)
            prune(str(BUILD / "base"), pruned.with_name("pruned-128"), packed)
            for case, seed in todo[: options.limit]:
                row = run(case, seed, pruned, tokenizer)
                append_row(ROWS, {**row, **surroundings()})
                print(*key(row), f"{row['seconds']} s", file=sys.stderr)
    show()


if __name__ == "__main__":
    main()
