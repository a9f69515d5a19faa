"""The whole story on a real model and real text, on a CPU, in minutes: train small, infer large.

SmolLM2-135M-Instruct learns to sum up Python functions as their authors do, in the first line of a
docstring; whole modules are held out. With the commands that a user types: LoRA on the original for
comparison, LoRAM (remove the first layers, train the others on the original's hidden states,
recover), merge, evaluate, report, and serve by llama.cpp.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import commands
import data
import pretrained
import samples
import served

from axolotl_loram.errors import LoRAMError

HERE = Path(__file__).resolve().parent
BUILD = Path("build/quickstart")
GOAL = 0.7
MEASURED = {
    "base": "base",
    "lora": "also:lora",
    "recovered": "base+recovered",
    "merged": "also:merged",
}
LABELS = {
    "base": "original model",
    "lora": "original + LoRA trained on it",
    "recovered": "original + recovered LoRA",
}


def main() -> None:
    os.chdir(HERE.parent.parent)
    shutil.rmtree(BUILD, ignore_errors=True)  # all is made anew, but the model
    BUILD.mkdir(parents=True)
    imports = commands.warm_up(BUILD / "imports.log")
    if not pretrained.ready(pretrained.SMOLLM2):
        commands.run("Getting SmolLM2-135M-Instruct, once", BUILD / "model.log", get_model)
    if not served.BASE.exists():
        commands.run("Getting its GGUF, once", BUILD / "gguf.log", get_gguf)
    started = time.monotonic() - imports
    commands.say("Reading the standard library")
    data.build(BUILD / "data")
    seconds = {"imports and data": round(time.monotonic() - started, 1), **run_commands()}
    results = {**collect(), "seconds": seconds}
    results["adapter_seconds"] = {name: seconds[name] for name in ("lora", "loram")}
    results["total_seconds"] = round(time.monotonic() - started, 1)
    (BUILD / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    if not results["recovered"] < results["base"] or results["share"] < GOAL:
        sys.exit(f"expected the recovered adapter to keep {GOAL} of what LoRA gains")


def get_model() -> None:
    try:
        pretrained.folder_of(pretrained.SMOLLM2)
    except LoRAMError as error:
        sys.exit(str(error))


def get_gguf() -> None:
    with contextlib.suppress(LoRAMError):  # the hub has no such file: the rest goes on
        pretrained.gguf_of(pretrained.SMOLLM2)


def run_commands() -> dict[str, float]:
    """Train, merge, evaluate, report; seconds of each."""
    lora, loram, merged = HERE / "lora.yml", HERE / "loram.yml", BUILD / "loram/merged"
    evaluation, report = BUILD / "evaluation.json", BUILD / "report.html"
    train = ["axolotl", "train", "--launcher", "python"]  # there is one process
    evaluate = ["axolotl-loram", "evaluate", loram]
    evaluate += ["--also", f"lora={BUILD / 'lora'}", "--also", f"merged={merged}"]
    evaluate += ["--out-of-domain", BUILD / "data/heldout_source.jsonl", "--output", evaluation]
    steps: dict[str, tuple] = {
        "lora": ("LoRA on the original", *train, lora),
        "loram": ("LoRAM: remove layers, train the others, recover", *train, loram),
        "merge": ("Merging the recovered adapter", "axolotl", "merge-lora", loram),
        "evaluate": ("Measuring on held-out modules", *evaluate),
        "samples": ("Summing up functions of held-out modules, before and after", samples.write),
        "report": (
            *("Report", "axolotl-loram", "report", BUILD / "loram", BUILD / "lora", evaluation),
            *("--output", report),
        ),
        "export": (
            *("Writing the adapter for llama.cpp", "axolotl-loram", "export", BUILD / "loram"),
            *(served.FOLDER, "--base-gguf", served.BASE),
        ),
        "serve": ("The first function by llama.cpp", served.write),
    }
    if not served.BASE.exists():  # the model came from the hub
        commands.say(f"Not served by llama.cpp: there is no {served.BASE}")
        del steps["export"], steps["serve"]
    return {
        name: commands.run(what, BUILD / f"{name}.log", *command)
        for name, (what, *command) in steps.items()
    }


def collect() -> dict[str, Any]:
    """Held-out perplexities, the share of LoRA's gain, parameter counts and samples."""
    evaluation = read(BUILD / "evaluation.json")
    measured = evaluation["perplexity"]["validation"]["models"]
    found = {name: measured[key]["perplexity"] for name, key in MEASURED.items()}
    gain, kept = (math.log(found["base"] / found[name]) for name in ("lora", "recovered"))
    pruned = read(BUILD / "loram/loram.json")["trained"]["pruned_model"]
    counts = read(Path(pruned) / "loram.json")["parameters"]
    parameters = {name: counts[f"{name}_parameters"] for name in ("base", "pruned")}
    return {
        **found,
        "share": kept / gain,
        "parameters": parameters,
        "samples": read(samples.FILE),
        "served": read(served.FILE) if served.FILE.exists() else None,
    }


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def show(results: dict) -> None:
    """What a user wants to see of it."""
    counts, seconds = results["parameters"], results["seconds"]
    print(f"\nparameters: {counts['base']:,} original, {counts['pruned']:,} pruned")
    print("perplexity of held-out summaries")
    for name, label in LABELS.items():
        print(f"  {label:34} {results[name]:9.2f}")
    print(f"the recovered adapter keeps {results['share']:.1%} of LoRA's gain (log perplexity)")
    print("seconds:", ", ".join(f"{name} {took:.0f}" for name, took in seconds.items()))
    for sample in results["samples"]:
        _, _, code = sample["prompt"].partition("\n\n")
        print(f"\n{code}\n")
        print(f"  people: {sample['written_by_people']}")
        print(f"  before: {sample['before']}")
        print(f"  after:  {sample['after']}")
    if results["served"]:
        print("\nthe first of them by llama.cpp, from the original's GGUF and the adapter's")
        print(f"  before: {results['served']['before']}")
        print(f"  after:  {results['served']['after']}")
    print(f"\nadapter for the original: {BUILD / 'loram'}")
    print(f"all of it in pictures: {(BUILD / 'report.html').resolve().as_uri()}")


if __name__ == "__main__":
    main()
