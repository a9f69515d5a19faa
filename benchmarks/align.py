"""Alignment before LoRA: what each objective makes of the pruned model and the recovered adapter.

On the toy base, pruned at random, with and without refit, and aligned on the base's own
pretraining text: by next-token loss, or by distillation from the base's stored outputs (all
weights but the lm_head). Then the same LoRA as in criteria.py is trained on it,
recovered, and the base measured with it: perplexity of held-out docstrings (task, what LoRA is
trained for) and of held-out source (text, what the base was trained for).

All alignments of a seed see the same sequences in the same order: a step is of 2 × 128 tokens. Each
number of steps has its own warmup and cosine. Rows of "layerwise" are of a way that is gone
(`align` of commit 4b8646c).

    python benchmarks/align.py            # rows that align.csv has already are not run again
    python benchmarks/align.py --summary  # table and plot from the rows
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from measure import append_row, surroundings

# isort: split
import torch
from criteria import BUILD, LENGTH, STEPS, load, perplexities, subset, train
from peft import PeftModel
from toy_evaluation import _batches, _encode
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover
from axolotl_loram.text.calibration import Calibration, load_calibration
from axolotl_loram.training.distil import IGNORED, distillation_loss
from axolotl_loram.training.teacher import Teacher, make_teacher

ROWS = Path(__file__).with_suffix(".csv")
RATIOS, SEEDS = (0.75, 0.85, 0.5), (0, 1)
BATCH, LONGEST, DISTILLED, TOP_K = 2, 1600, 200, 32
LEARNING_RATES = {"none": 0.0, "next-token": 5e-4, "distillation": 1e-3}
"""Of 3e-4, 1e-3 and 3e-3, what was nearest to the base after 100 steps of 4 × 128 tokens at 0.75:
1e-3 for distillation; 3e-4 and 1e-3 alike for next-token loss."""
WAYS = (
    (
        *(("", "none", 0), ("refit", "none", 0), ("refit", "distillation", 200)),
        *(("", "next-token", 1600), ("", "distillation", 200), ("", "next-token", 200)),
    ),
    (("refit", "distillation", 50), ("refit", "next-token", 200)),
)
"""Start, objective and steps, what matters most first."""


@cache
def text(seed: int, steps: int = LONGEST) -> Calibration:
    """Sequences of the base's pretraining text; fewer steps see the first of them."""
    settings = PruningArgs(
        ratio=0.5,
        calibration_path=str(BUILD / "data/pretrain.jsonl"),
        calibration_samples=LONGEST * BATCH,
        calibration_length=LENGTH,
        seed=seed + 1000,
    ).resolve()
    if steps == LONGEST:
        return load_calibration(settings, BUILD / "base")
    whole = text(seed)
    return Calibration(whole.tokens[: steps * BATCH], whole.source, whole.seed)


@cache
def teacher(seed: int) -> tuple[Teacher, float]:
    """The base's outputs on the sequences of `DISTILLED` steps, and the seconds they took."""
    folder, start = BUILD / f"teacher-{seed}-{DISTILLED * BATCH}", time.perf_counter()
    if not folder.exists():
        make_teacher(BUILD / "base", text(seed, DISTILLED).tokens, folder, TOP_K)
        (folder / "seconds").write_text(str(time.perf_counter() - start))
    return Teacher(folder), float((folder / "seconds").read_text())


def align(model, objective: str, steps: int, seed: int) -> None:
    """Train all weights but the lm_head's."""
    model.train().get_output_embeddings().requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATES[objective], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    sequences = torch.from_numpy(text(seed, steps).tokens)
    for step in range(steps):
        tokens = sequences[step * BATCH : (step + 1) * BATCH]
        if objective == "next-token":
            loss = model(input_ids=tokens, labels=tokens).loss
        else:
            labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
            targets = teacher(seed)[0].targets(tokens)
            logits = model(input_ids=tokens).logits
            loss = distillation_loss(logits, targets, labels) / (labels != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(True)


@torch.no_grad()
def divergence(model, tokenizer) -> float:
    """Mean KL(base ‖ model) over the tokens of held-out source, in nats."""
    total, count = 0.0, 0
    for batch, mask, labels, logprobs in _of_base(tokenizer):
        counts = labels[:, 1:] != IGNORED
        own = model(input_ids=batch, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        total += (logprobs.exp() * (logprobs - own)).sum(-1)[counts].sum().item()
        count += int(counts.sum())
    return total / count


@cache
@torch.no_grad()
def _of_base(tokenizer) -> list[tuple[torch.Tensor, ...]]:
    base = load(BUILD / "base")
    rows = [_encode(tokenizer, json.loads(line)) for line in subset("text").open()][::2]
    found = []
    for tokens, mask, labels in _batches(sorted(rows, key=len), tokenizer.pad_token_id):
        logits = base(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        found.append((tokens, mask, labels, logits.log_softmax(-1)))
    return found


def run(case: dict, tokenizer) -> dict[str, object]:
    """One row."""
    settings = PruningArgs(
        method="random",
        ratio=case["ratio"],
        refit=bool(case["start"]),
        seed=case["seed"],
        calibration_path=str(BUILD / "data/pretrain.jsonl"),
        calibration_samples=128,
        calibration_length=LENGTH,
    )
    objective, steps, seed = case["objective"], case["steps"], case["seed"]
    with tempfile.TemporaryDirectory() as scratch:
        pruned, adapter = Path(scratch, "pruned"), Path(scratch, "adapter")
        prune(str(BUILD / "base"), pruned, settings)
        teacher_seconds = teacher(seed)[1] if objective == "distillation" else 0
        start = time.perf_counter()
        model = load(pruned)
        if steps:
            align(model, objective, steps, seed)
        took = time.perf_counter() - start
        figures = {"divergence_text": round(divergence(model, tokenizer), 4)}
        figures |= perplexities(model, tokenizer, "pruned")
        train(model, tokenizer, seed, STEPS).save_pretrained(adapter)
        recovered = recover(adapter, str(pruned))["output"]
        model = PeftModel.from_pretrained(load(BUILD / "base"), recovered)
        figures |= perplexities(model, tokenizer, "recovered")
    return {
        "tokens": steps * BATCH * LENGTH,
        "learning_rate": LEARNING_RATES[objective],
        **figures,
        "align_seconds": round(took, 1),
        "teacher_seconds": round(teacher_seconds, 1),
        "lora_steps": STEPS,
    }


NAMES = ("ratio", "start", "objective", "steps", "seed")


def cases() -> list[dict]:
    """A seed after the other, and of each what matters most first."""
    grid = [
        (ratio, *way, seed) for seed in SEEDS for ways in WAYS for ratio in RATIOS for way in ways
    ]
    return [dict(zip(NAMES, case, strict=True)) for case in grid]


def key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in NAMES)


def rows() -> list[dict]:
    return list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []


FIGURES = ("divergence_text", "pruned_text", "pruned_task", "recovered_text", "recovered_task")


def summarize() -> list[dict]:
    """Means over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows():
        groups.setdefault(key(row)[:-1], []).append(row)
    table = []
    for found, members in groups.items():
        line: dict = dict(zip(NAMES, found, strict=False)) | {"seeds": len(members)}
        line |= {"ratio": float(line["ratio"]), "steps": int(line["steps"])}
        line["tokens"] = int(members[0]["tokens"])
        for name in (*FIGURES, "align_seconds"):
            line[name] = statistics.mean(float(member[name]) for member in members)
        table.append(line)
    return sorted(table, key=lambda line: (line["ratio"], line["objective"], line["steps"]))


def show(table: list[dict]) -> None:
    print(f"{'ratio':5} {'alignment':26} {'steps':>5} {'tokens':>7}", end=" ")
    print("KL(base) | pruned: text   task | recovered: text   task | seconds, seeds")
    for line in table:
        name = f"{line['start']} + {line['objective']}".removeprefix(" + ")
        print(
            f"{line['ratio']:5} {name:26} {line['steps']:5} {line['tokens']:7} "
            f"{line['divergence_text']:8.4f} | {line['pruned_text']:12.1f} "
            f"{line['pruned_task']:6.1f} | {line['recovered_text']:15.1f} "
            f"{line['recovered_task']:6.1f} | {line['align_seconds']:5.0f}, {line['seeds']}"
        )


def plot(table: list[dict], file: Path) -> None:
    """Recovered perplexity over alignment tokens, a panel for each set and ratio."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "align"
    from matplotlib import pyplot

    ratios = sorted({line["ratio"] for line in table})
    figure, panels = pyplot.subplots(
        2, len(ratios), figsize=(4 * len(ratios), 7), layout="constrained", squeeze=False
    )
    colours = {"next-token": "C0", "distillation": "C1", "layerwise": "C2"}
    for across, ratio in enumerate(ratios):
        for down, kind in enumerate(("task", "text")):
            panel, name = panels[down][across], f"recovered_{kind}"
            own = [line for line in table if line["ratio"] == ratio]
            for start, style in (("", "--"), ("refit", "-")):
                first = [line for line in own if line["steps"] == 0 and line["start"] == start]
                for objective, colour in colours.items():
                    found = [
                        line
                        for line in own
                        if (line["start"], line["objective"]) == (start, objective)
                    ]
                    if found:
                        points = sorted((line["tokens"], line[name]) for line in first + found)
                        label = f"{start} + {objective}".removeprefix(" + ")
                        panel.plot(
                            *zip(*points, strict=True),
                            style,
                            color=colour,
                            marker="o",
                            markersize=3,
                            label=label,
                        )
            panel.set(title=f"ratio {ratio}, {kind}", xlabel="alignment tokens")
            panel.set_xscale("symlog", linthresh=2e4)
    panels[0][0].set_ylabel("perplexity, base + recovered LoRA")
    panels[1][0].set_ylabel("perplexity, base + recovered LoRA")
    panels[0][0].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="only the table and the plot")
    parser.add_argument("--limit", type=int, help="run at most so many of the cases")
    options = parser.parse_args()
    if not options.summary:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(BUILD / "base")
        todo = cases()[: options.limit]
        for number, case in enumerate(todo, start=1):
            if key(case) in {key(row) for row in rows()}:
                continue
            start = time.perf_counter()
            append_row(ROWS, {**case, **run(case, tokenizer), **surroundings()})
            took = time.perf_counter() - start
            print(f"{number}/{len(todo)} {' '.join(key(case))}: {took:.0f} s", file=sys.stderr)
    table = summarize()
    show(table)
    if table:
        plot(table, ROWS.with_suffix(".svg"))


if __name__ == "__main__":
    main()
