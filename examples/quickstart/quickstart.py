"""The whole story on real input, on a CPU, in minutes: train small, infer large.

A small Llama is trained on the Python standard library's source and stands in for the large model.
Then, with the commands that a user types: prune it, train a LoRA on the pruned model with Axolotl,
recover the adapter for the original, merge, evaluate, report. The task is to write a function's
docstring from its signature; whole modules are held out. A plain LoRA on the original is trained
beside, on the same data for the same steps.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import base
import data
import torch
from evaluation import generate_samples, heldout_perplexity
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import axolotl_loram.heterogeneous  # noqa: F401  (to load the pruned model)

HERE = Path(__file__).resolve().parent
BUILD = Path("build/quickstart")
PROGRAMS = Path(sys.executable).parent
GOAL = 0.85
MEASURED = {
    "base": "base",
    "lora": "also:lora",
    "pruned_lora": "pruned+adapter",
    "recovered": "base+recovered",
}
LABELS = {
    "base": "original model",
    "lora": "original + LoRA trained on it",
    "pruned_lora": "pruned model + its LoRA",
    "recovered": "original + recovered LoRA",
}


def main() -> None:
    os.chdir(HERE.parent.parent)
    started = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    say("Reading the standard library, training the base model on it (cached)")
    data.build(BUILD / "data")
    if base.build(BUILD / "data/pretrain.jsonl", BUILD / "base"):
        # Axolotl knows a prepared data set by its settings, not by the text that it was made from.
        shutil.rmtree(BUILD / "prepared", ignore_errors=True)
    for folder in ("pruned", "lora", "loram"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    prune = ["axolotl-loram", "prune", BUILD / "base", BUILD / "pruned", "--pruning-ratio", "0.5"]
    # Units are chosen, and what stays is refitted, on the task's own data.
    prune += ["--calibration", HERE / "lora.yml", "--calibration-length", "128"]
    run("Pruning half of the neurons and KV groups of the inner layers", *prune, "--json")
    seconds = {
        "lora": run("Plain LoRA on the original", "axolotl", "train", HERE / "lora.yml"),
        "loram": run(
            "LoRAM: on the pruned model, recovered", "axolotl", "train", HERE / "loram.yml"
        ),
    }
    run("Merging", "axolotl", "merge-lora", HERE / "loram.yml")
    evaluate = ["axolotl-loram", "evaluate", HERE / "loram.yml", "--also", f"lora={BUILD / 'lora'}"]
    texts = [BUILD / f"data/{name}.jsonl" for name in ("heldout", "heldout_source")]
    evaluate += ["--in-domain", texts[0], "--out-of-domain", texts[1]]
    evaluation, report = BUILD / "evaluation.json", BUILD / "report.html"
    run("Measuring on held-out modules", *evaluate, "--output", evaluation)
    results = {**measure(), "adapter_seconds": seconds}
    results["total_seconds"] = round(time.monotonic() - started, 1)
    (BUILD / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    folders = [BUILD / "loram", BUILD / "lora", evaluation]
    run("Report", "axolotl-loram", "report", *folders, "--output", report)
    print(f"the same in pictures: {report.resolve().as_uri()}")
    if not results["recovered"] < results["base"] or results["share"] < GOAL:
        sys.exit(f"expected the recovered adapter to keep {GOAL} of what LoRA gains")


def say(what: str) -> None:
    print(f"\n== {what}", file=sys.stderr, flush=True)


def run(what: str, program: str, *arguments: str | Path) -> float:
    """Run a command with its output in a log and its progress on the terminal; seconds."""
    say(what)
    log = BUILD / f"{re.sub(r'[^a-z]+', '-', what.lower())[:40].strip('-')}.log"
    command = [str(PROGRAMS / program), *map(str, arguments)]
    print(f"   {program} {' '.join(command[1:])}\n   log: {log}", file=sys.stderr)
    environment = {
        **os.environ,
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        **{"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    }
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while process.poll() is None:
            time.sleep(0.5)
            show_progress(log, time.monotonic() - started)
    took = time.monotonic() - started
    print(f"\r   done in {took:.0f} s{' ' * 60}", file=sys.stderr, flush=True)
    if process.returncode:
        sys.exit(f"{program} failed:\n{log.read_text(encoding='utf-8')[-4000:]}")
    return round(took, 1)


def show_progress(log: Path, seconds: float) -> None:
    """Repeat the last progress bar of a log on the terminal."""
    if sys.stderr.isatty():
        bars = re.findall(
            r"(\d+/\d+ \[[^\]]+\])", log.read_text(encoding="utf-8", errors="replace")
        )
        print(f"\r   {seconds:4.0f} s  {bars[-1] if bars else '':60}", end="", file=sys.stderr)


def measure() -> dict:
    """Held-out perplexities, parameter counts and samples of the models."""
    torch.set_grad_enabled(False)
    evaluation = json.loads((BUILD / "evaluation.json").read_text(encoding="utf-8"))
    measured = evaluation["perplexity"]["heldout"]["models"]
    results = {name: measured[key]["perplexity"] for name, key in MEASURED.items()}
    heldout, tokenizer = BUILD / "data/heldout.jsonl", AutoTokenizer.from_pretrained(BUILD / "base")
    original = AutoModelForCausalLM.from_pretrained(BUILD / "base")
    pruned = AutoModelForCausalLM.from_pretrained(BUILD / "pruned")
    merged = AutoModelForCausalLM.from_pretrained(BUILD / "loram/merged")
    counts = {"base": original.num_parameters(), "pruned": pruned.num_parameters()}
    results["merged"] = heldout_perplexity(merged, tokenizer, heldout)
    before = generate_samples(original, tokenizer, heldout)
    recovered = PeftModel.from_pretrained(original, BUILD / "loram")
    after = generate_samples(recovered, tokenizer, heldout)
    gain, kept = (math.log(results["base"] / results[name]) for name in ("lora", "recovered"))
    samples = [
        {"prompt": prompt, "written_by_people": reference, "before": old, "after": new}
        for (prompt, reference, old), (_, _, new) in zip(before, after, strict=True)
    ]
    return {**results, "share": kept / gain, "parameters": counts, "samples": samples}


def show(results: dict) -> None:
    """The table."""
    counts = results["parameters"]
    print(f"\nparameters: {counts['base']:,} original, {counts['pruned']:,} pruned")
    print(f"{'held-out perplexity':40}")
    for name, label in LABELS.items():
        print(f"  {label:34} {results[name]:9.2f}")
    print(f"the recovered adapter keeps {results['share']:.1%} of LoRA's gain (log perplexity)")
    took = results["adapter_seconds"]
    print(
        f"seconds of `axolotl train`: LoRA {took['lora']}, LoRAM with recovery {took['loram']}; "
        f"of everything {results['total_seconds']}"
    )
    sample = results["samples"][0]
    print(f"\n{sample['prompt']}\n  before: {sample['before']!r}\n  after:  {sample['after']!r}")
    print(f"  people: {sample['written_by_people']!r}")
    print(f"\nresults: {BUILD / 'results.json'}; adapter for the original: {BUILD / 'loram'}")


if __name__ == "__main__":
    main()
