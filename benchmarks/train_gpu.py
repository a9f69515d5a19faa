"""Memory and speed of LoRA training on one NVIDIA GPU, beside what the planner predicts.

Models of real shapes with random weights, each in a process of its own. Weights, dtypes, LoRA (rank
8 on all linear layers), gradient checkpointing and the allocator's settings are as Axolotl has
them; the loop is a plain one, without its Trainer. Cases:

a. the paper's cost table: LLaMA-2-13B, LoRA and LoRAM 0.65, batch 128 in micro-batches of 4, with
   and without gradient checkpointing;
b. LLaMA-3.1-70B at 0.85, QLoRAM with the allocator limited to 20 GB, and QLoRA on the whole model;
c. QLoRA on the whole model with Axolotl's `layer_offloading` in the same 20 GB, where axolotl is
   there. The model is built first and limited then: its loading does not keep the limit;
e. attention on b's pruned model: PyTorch's flash kernel; flash-attn 2, 3 and 4 where installed.

Every row has the planner's prediction, but c's, which it does not make. `allocated_error` is of the
training steps; `peak_error` of the device: what the allocator reserved at most and CUDA's context.

Needs a GPU of 80 GB or more with torch, transformers, peft, bitsandbytes and pydantic; no network,
and axolotl for c alone (without it: PYTHONPATH=. for this package).

    python benchmarks/train_gpu.py [--case a b c e]  # adds rows to train_gpu.csv
    python benchmarks/train_gpu.py --tiny            # every path on the CPU, small, without a row
    python benchmarks/train_gpu.py --summary         # pruned against whole models, from the rows
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import append_row, surroundings
from prune_stream import LLAMA_3_8B

from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import Prediction, predict, pruned_config
from axolotl_loram.memory.settings import TrainingArgs

ROWS = Path(__file__).with_suffix(".csv")
PROTECTED = (4, 2)
LIMIT = 20 * 10**9
LLAMA_70B = LLAMA_3_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B |= {"num_attention_heads": 64, "max_position_embeddings": 131072}
LLAMA_13B = LLAMA_70B | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LLAMA_13B |= {"num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000}
SHAPES = {"LLaMA-2-13B": LLAMA_13B, "LLaMA-3.1-70B": LLAMA_70B}
TINY = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 7, "head_dim": 16}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256}
MEASURED = (
    *("outcome", "seconds_per_step", "steps", "tokens_per_second"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "context_bytes", "loading_peak_bytes"),
    *("weight_bytes", "predicted_weight_bytes", "predicted_loading_bytes", "loading_error"),
    *("predicted_loss_bytes", "predicted_layer_bytes", "predicted_allocated_bytes"),
    *("allocated_error", "predicted_peak_bytes", "peak_error"),
)
"""Columns that running a case fills in. Memory is a device's: on the CPU there is none."""


@dataclass(frozen=True)
class Case:
    """What is run: one row. A limit of 0 bytes is none."""

    case: str
    method: str
    shape: str
    ratio: float
    micro_batch: int
    length: int
    accumulation: int = 2  # gradients are then there when memory is at its highest
    checkpointing: bool = True
    attention: str = "sdpa"
    allocator_limit: int = 0
    layer_offloading: bool = False


WHOLE, PRUNED = ("qlora", "LLaMA-3.1-70B", 0.0), ("qloram", "LLaMA-3.1-70B", 0.85)
SIZES = ((1, 512), (4, 512), (1, 2048), (4, 2048))
FLASH = ("flash-attn", "flash-attn-3", "flash-attn-4")
ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
CASES = [
    Case("a", method, "LLaMA-2-13B", ratio, 4, 512, accumulation=32, checkpointing=checkpointing)
    for checkpointing in (False, True)
    for method, ratio in (("lora", 0.0), ("loram", 0.65))
]
for size in SIZES:
    CASES += [Case("b", *PRUNED, *size, allocator_limit=LIMIT), Case("b", *WHOLE, *size)]
CASES += [Case("c", *WHOLE, *size, allocator_limit=LIMIT, layer_offloading=True) for size in SIZES]
CASES += [Case("e", *PRUNED, *size, attention=name) for size in SIZES[2:] for name in ATTENTIONS]


def config_of(case: Case, tiny: bool) -> dict[str, Any]:
    """The config of the model that is trained on."""
    config = SHAPES[case.shape] | (TINY if tiny else {})
    return pruned_config(config, case.ratio, PROTECTED) if case.ratio else config


def prediction_of(case: Case, config: dict[str, Any], precision: str) -> Prediction:
    """What the planner says of a case."""
    run = TrainingArgs(
        sequence_len=case.length,
        micro_batch_size=case.micro_batch,
        gradient_checkpointing=case.checkpointing,
        precision=precision,
    )
    return predict(Layout.of(config), run, case.method)


def measure(case: Case, steps: int, tiny: bool) -> dict[str, Any]:
    """Columns of a row that are found by running it. On the CPU those of memory are empty.

    Raises:
        LeftOut: Something that it needs is not installed.
    """
    import torch
    from random_model import build, check_attention, offloaded, step_seconds, with_lora

    from axolotl_loram.models.small_head import weight_bytes

    check_attention(case.attention)
    torch.manual_seed(0)
    cuda, found = not tiny, dict.fromkeys(MEASURED, "")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    config = config_of(case, tiny)
    predicted = prediction_of(case, config, "bf16" if cuda else "fp32")
    found |= {"outcome": "ok", "predicted_weight_bytes": predicted.weights_device_bytes}
    if cuda and not case.layer_offloading:
        limit_allocator(case)
    try:
        model = build(config, case.method, case.attention, torch.device(device), dtype)
        found["weight_bytes"] = weight_bytes(model)
        found["loading_peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else ""
        model = with_lora(model, case.checkpointing)
        context = offloaded(model) if case.layer_offloading else nullcontext()
        if cuda:
            limit_allocator(case)
            torch.cuda.reset_peak_memory_stats()
        shape = (case.micro_batch, case.length)
        seconds = statistics.median(step_seconds(model, shape, case.accumulation, steps, context))
        rate = case.accumulation * case.micro_batch * case.length / seconds
        found |= {"seconds_per_step": round(seconds, 4), "steps": steps}
        found |= {"tokens_per_second": round(rate, 1)}
    except torch.OutOfMemoryError:
        found["outcome"] = "out of memory"
    if cuda:
        free, total = torch.cuda.mem_get_info()
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["context_bytes"] = total - free - torch.cuda.memory_reserved()
    return found if case.layer_offloading else found | compared(predicted, found)


def limit_allocator(case: Case) -> None:
    """Let PyTorch's allocator reserve no more than the case's limit."""
    import torch

    if case.allocator_limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case.allocator_limit / total)


def compared(predicted: Prediction, found: dict[str, Any]) -> dict[str, Any]:
    """Predictions, and their errors relative to what was measured to the end."""
    result = {f"predicted_{name}_bytes": size for name, size in predicted.moments.items()}
    training = max(size for name, size in predicted.moments.items() if name != "loading")
    result |= {"predicted_allocated_bytes": training, "predicted_peak_bytes": predicted.peak_bytes}
    if found["outcome"] != "ok" or not found["peak_allocated_bytes"]:
        return result
    peak = found["peak_reserved_bytes"] + found["context_bytes"]
    pairs = {
        "loading": (predicted.moments["loading"], found["loading_peak_bytes"]),
        "allocated": (training, found["peak_allocated_bytes"]),
        "peak": (predicted.peak_bytes, peak),
    }
    return result | {f"{name}_error": round(p / m - 1, 4) for name, (p, m) in pairs.items()}


def gpu_name() -> str:
    """The GPU, if there is one. A CUDA context in this process would be counted in every case."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def in_tiny(case: Case) -> Case:
    """The same path in a few tokens."""
    return replace(case, micro_batch=2, length=16, accumulation=2)


def in_child(cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What `child` prints of the cases, from a process of its own with Axolotl's allocator.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, __file__, "--steps", str(options.steps)]
    command += ["--tiny"] * options.tiny + ["--child", json.dumps([asdict(case) for case in cases])]
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    environment |= os.environ
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return [dict.fromkeys(MEASURED, "") | {"outcome": f"over {options.limit} s"}] * len(cases)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def child(cases: list[Case], steps: int, tiny: bool) -> None:
    """Run the cases in this process and print their columns, or why they are left out."""
    from random_model import LeftOut

    found: list[dict[str, Any]] = []
    for case in cases:
        try:
            found.append(measure(case, steps, tiny))
        except LeftOut as reason:
            found.append({"left_out": str(reason)})
    print(json.dumps(found))


def run(cases: list[Case], options: argparse.Namespace) -> int:
    """Every case, each row written as its case ends; returns how many failed."""
    failed, around = 0, surroundings("transformers", "peft", "bitsandbytes", *FLASH)
    around |= {"hardware": options.hardware, "commit": options.commit or around["commit"]}
    batches = [list(dict.fromkeys(map(in_tiny, cases)))] if options.tiny else [[c] for c in cases]
    for batch in batches:
        try:
            results = in_child(batch, options)
        except RuntimeError as error:
            failed += len(batch)
            print(f"{batch[0]} failed:\n{error}", file=sys.stderr)
            continue
        for case, found in zip(batch, results, strict=True):
            print(*asdict(case).values(), json.dumps(found), file=sys.stderr)
            if not options.tiny and "left_out" not in found:
                append_row(options.csv, {**asdict(case), **found, **around})
    return failed


def show(file: Path) -> None:
    """Each pruned model that finished beside the whole one in the same settings."""
    rows = [row for row in csv.DictReader(file.open(encoding="utf-8")) if row["outcome"] == "ok"]
    same = ("shape", "micro_batch", "length", "accumulation", "checkpointing", "attention")
    whole_of = {"loram": "lora", "qloram": "qlora"}
    for row, whole in itertools.product(rows, rows):
        if whole_of.get(row["method"]) != whole["method"]:
            continue
        if all(row[name] == whole[name] for name in same):
            less = int(whole["peak_reserved_bytes"]) / int(row["peak_reserved_bytes"])
            faster = float(whole["seconds_per_step"]) / float(row["seconds_per_step"])
            against = "offloaded " * (whole["layer_offloading"] == "True") + whole["method"]
            print(
                f"{row['case']}: {row['method']} {row['ratio']},",
                *(f"{name} {row[name]}," for name in same),
                f"against {against}: memory ÷ {less:.2f}, speed × {faster:.2f}",
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=tuple("abce"), default=list("abce"))
    parser.add_argument("--tiny", action="store_true", help="pico shapes on the CPU, no rows")
    parser.add_argument("--summary", action="store_true", help="only compare the rows there are")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are timed")
    parser.add_argument("--limit", type=int, default=420, help="seconds for each case")
    parser.add_argument("--csv", type=Path, default=ROWS)
    parser.add_argument("--commit", help="of this project, where there is no git")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = 1 if options.tiny else options.steps
    if options.child:
        child([Case(**case) for case in json.loads(options.child)], options.steps, options.tiny)
        return 0
    if options.summary:
        show(options.csv)
        return 0
    options.hardware = "" if options.tiny else gpu_name()
    if not options.tiny and not options.hardware:
        print("expected an NVIDIA GPU, found none: --tiny tries the script", file=sys.stderr)
        return 2
    return 1 if run([case for case in CASES if case.case in options.case], options) else 0


if __name__ == "__main__":
    sys.exit(main())
