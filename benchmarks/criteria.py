"""Every criterion, with and without refit: what pruning costs, and what the recovered adapter is.

On the toy base (a small Llama that has read Python source; the task is to write a
function's docstring; whole modules are held out). For each criterion × {refit, no refit} × ratio ×
seed: prune, measure; train the same LoRA (same data, order, start and steps) on the pruned model;
recover it; measure the base with it. Perplexities are of held-out docstrings (task) and of held-out
source (text). The seed decides random selection, calibration samples, and LoRA's start and data.

    python benchmarks/criteria.py            # rows that criteria.csv has already are not run again
    python benchmarks/criteria.py --summary  # table and plot from the rows
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, append_row, surroundings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import toy_base as base
import toy_data as data
from peft import LoraConfig, PeftModel, get_peft_model
from toy_evaluation import _batches, _encode, heldout_perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import axolotl_loram.heterogeneous  # noqa: F401  (to load pruned models)
from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

BUILD = ROOT / "build/toy"
ROWS = Path(__file__).with_suffix(".csv")
METHODS = ("random", "magnitude", "activation", "fluctuation", "taylor")
RATIOS = (0.5, 0.75, 0.85)
SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH, LEARNING_RATE = 40, 16, 128, 3e-3
SETS = {"task": ("heldout", 2), "text": ("heldout_source", 3)}
"""Name → held-out file, and how many of its rows one row in the measured subset stands for."""


def train(model, tokenizer, seed: int, steps: int, **targets) -> PeftModel:
    """The same LoRA for every model: rank 8 on all projections, AdamW, cosine."""
    torch.manual_seed(seed)
    targets = targets or {"target_modules": "all-linear"}
    settings = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **targets)
    model = get_peft_model(model, settings).train()
    rows = [_encode(tokenizer, json.loads(line)) for line in (BUILD / "data/train.jsonl").open()]
    rows = [(tokens[:LENGTH], labels[:LENGTH]) for tokens, labels in rows]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        batch = [rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        ((tokens, mask, labels),) = _batches(batch, tokenizer.pad_token_id)
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def subset(name: str) -> Path:
    """Every n-th row of a held-out set, as a file."""
    stem, share = SETS[name]
    file = BUILD / f"data/{stem}-every-{share}.jsonl"
    lines = (BUILD / f"data/{stem}.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(lines[::share]) + "\n"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file


def perplexities(model, tokenizer, name: str) -> dict[str, float]:
    return {
        f"{name}_{kind}": round(heldout_perplexity(model, tokenizer, subset(kind)), 3)
        for kind in SETS
    }


def run(case: dict, tokenizer, steps: int) -> dict[str, object]:
    """One row."""
    settings = PruningArgs(
        method=case["method"],
        allocation=case["allocation"],
        refit=case["refit"],
        ratio=case["ratio"],
        seed=case["seed"],
        calibration_path=str(BUILD / "data/pretrain.jsonl"),
        calibration_samples=128,
        calibration_length=LENGTH,
    )
    with tempfile.TemporaryDirectory() as scratch:
        pruned, adapter = Path(scratch, "pruned"), Path(scratch, "adapter")
        start = time.perf_counter()
        record = prune(str(BUILD / "base"), pruned, settings)
        took = time.perf_counter() - start
        model = load(pruned)
        figures = perplexities(model, tokenizer, "pruned")
        train(model, tokenizer, case["seed"], steps).save_pretrained(adapter)
        trained = PeftModel.from_pretrained(load(pruned), adapter)
        figures |= perplexities(trained, tokenizer, "pruned_lora")
        recovered = recover(adapter, str(pruned))["output"]
        model = PeftModel.from_pretrained(load(BUILD / "base"), recovered)
        figures |= perplexities(model, tokenizer, "recovered")
    errors = list((record["refit"] or {}).values())
    for when in ("before", "after"):
        found = [error[f"heldout_error_{when}"] for error in errors]
        figures[f"layer_error_{when}"] = round(statistics.mean(found), 5) if found else ""
    figures["refits_accepted"] = sum(e["accepted"] for e in errors) if errors else ""
    return {**figures, "refits": len(errors), "prune_seconds": round(took, 2)}


def reference(seed: int, tokenizer, steps: int) -> dict[str, object]:
    """The base itself, and plain LoRA on it, in the columns of a row."""
    model = load(BUILD / "base")
    figures = perplexities(model, tokenizer, "pruned")
    model = train(model, tokenizer, seed, steps)
    figures |= perplexities(model, tokenizer, "pruned_lora")
    figures |= perplexities(model, tokenizer, "recovered")
    rest = ("layer_error_before", "layer_error_after", "refits_accepted")
    return {**figures, **dict.fromkeys(rest, ""), "refits": 0, "prune_seconds": 0}


def cases() -> list[dict]:
    """Those of the first seed first, those of the last one last, global allocation between."""
    names = ("method", "allocation", "refit", "ratio", "seed")
    plain = [("none (plain LoRA)", "", False, 0, seed) for seed in SEEDS]
    grid = [
        (method, "uniform", refit, ratio, seed)
        for seed in SEEDS
        for ratio in RATIOS
        for refit in (False, True)
        for method in METHODS
    ]
    competing = [
        (method, "global", refit, ratio, seed)
        for seed in SEEDS[:1]
        for ratio in RATIOS
        for refit in (False, True)
        for method in ("fluctuation", "taylor")
    ]
    middle = len(grid) // 2
    ordered = [*plain, *grid[:middle], *competing, *grid[middle:]]
    return [dict(zip(names, case, strict=True)) for case in ordered]


def key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in ("method", "allocation", "refit", "ratio", "seed"))


def rows() -> list[dict]:
    return list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []


def summarize() -> list[dict]:
    """Mean and spread (standard deviation) over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows():
        groups.setdefault(key(row)[:-1], []).append(row)
    table = []
    for (method, allocation, refit, ratio), members in groups.items():
        line = {"method": method, "allocation": allocation, "refit": refit, "ratio": float(ratio)}
        for name in ("pruned_task", "pruned_text", "pruned_lora_task", "recovered_task"):
            values = [float(member[name]) for member in members]
            line[name] = statistics.mean(values)
            line[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
        for name in ("layer_error_before", "layer_error_after"):
            values = [float(member[name]) for member in members if member[name]]
            line[name] = statistics.mean(values) if values else math.nan
        table.append({**line, "seeds": len(members)})
    return sorted(table, key=lambda line: (line["ratio"], line["recovered_task"]))


def show(table: list[dict]) -> None:
    print(
        f"{'ratio':5} {'method':18} {'alloc':7} {'refit':5} {'pruned text':>16} "
        f"{'pruned task':>16} {'+ LoRA':>14} {'recovered':>14} {'layer error':>15}"
    )
    for line in table:
        cells = [
            f"{line[name]:8.1f} ± {line[f'{name}_sd']:<5.1f}"
            for name in ("pruned_text", "pruned_task", "pruned_lora_task", "recovered_task")
        ]
        error = f"{line['layer_error_before']:.3f} → {line['layer_error_after']:.3f}"
        print(
            f"{line['ratio']:5} {line['method']:18} {line['allocation']:7} {line['refit']:5} "
            f"{' '.join(cells)} {error if 'nan' not in error else ''}"
        )


def plot(table: list[dict], file: Path) -> None:
    """Pruned and recovered perplexity over the ratio, one line for each way to prune."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "criteria"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    titles = {
        "pruned_text": "pruned, untrained: held-out source",
        "recovered_task": "base + recovered LoRA: held-out docstrings",
    }
    lines = [line for line in table if line["ratio"] > 0 and line["allocation"] == "uniform"]
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for number, method in enumerate(METHODS):
            for refit, style in (("False", "--"), ("True", "-")):
                own = sorted(
                    (line["ratio"], line[name], line[f"{name}_sd"])
                    for line in lines
                    if (line["method"], line["refit"]) == (method, refit)
                )
                if not own:
                    continue
                label = f"{method}{' + refit' if refit == 'True' else ''}"
                panel.errorbar(
                    *zip(*own, strict=True),
                    fmt=style,
                    color=f"C{number}",
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    capsize=2,
                    label=label,
                )
        plain = [line for line in table if line["ratio"] == 0]
        if plain:
            panel.axhline(plain[0][name], color="0.5", linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="pruning ratio", ylabel="perplexity", yscale="log")
    panels[0].legend(fontsize=7, ncols=2)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="only the table and the plot")
    parser.add_argument("--steps", type=int, default=STEPS, help="LoRA steps")
    parser.add_argument("--backwards", action="store_true", help="for a second process")
    parser.add_argument("--limit", type=int, help="run at most so many rows")
    options = parser.parse_args()
    if not options.summary:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        data.build(BUILD / "data")
        base.build(BUILD / "data/pretrain.jsonl", BUILD / "base")
        tokenizer = AutoTokenizer.from_pretrained(BUILD / "base")
        todo = cases()[:: -1 if options.backwards else 1][: options.limit]
        for number, case in enumerate(todo, start=1):
            if key(case) in {key(row) for row in rows()}:
                continue
            start = time.perf_counter()
            measured = run if case["ratio"] else lambda c, t, s: reference(c["seed"], t, s)
            row = {**case, "lora_steps": options.steps, **measured(case, tokenizer, options.steps)}
            append_row(ROWS, {**row, **surroundings()})
            took = time.perf_counter() - start
            print(f"{number}/{len(todo)} {' '.join(key(case))}: {took:.0f} s", file=sys.stderr)
    table = summarize()
    show(table)
    plot(table, ROWS.with_suffix(".svg"))


if __name__ == "__main__":
    main()
