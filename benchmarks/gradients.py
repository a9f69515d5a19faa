"""Where the gradient of LoRA goes in a pruned model, and where it would go in the base.

Cosine between the gradients of all B (of A it is 0 before the first step, as B is), summed over 16
training samples of GSM8K: the base's is restricted to what the pruned model has, and both have the
same A there. By loss, as in `real.py`, and by depth.

    python benchmarks/gradients.py MODEL GSM8K --scratch build   # where real.py has its files
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, append_row, surroundings
from peft import PeftModel
from real import Case, RealBench, Said, at_labels, batches, loss_of, masks_of, ones_of
from real_models import aligned, pruned

from axolotl_loram.training.distil import Targets
from axolotl_loram.training.teacher import most_likely

ROWS = Path(__file__).with_suffix(".csv")
STEPS, TOP_K, LAYERS_TOGETHER = 4, 32, 5
CASES = {
    "plain": Case(1, 0.5),
    "anchored": Case(1, 0.5, loss="anchored"),
    "anchored, aligned on the task": Case(1, 0.5, loss="anchored", aligned="task"),
    "anchored, hidden states of every layer": Case(1, 0.5, loss="hidden-1"),
}


def gradients(model: PeftModel, base: Any, bench: RealBench, case: Case) -> dict[str, torch.Tensor]:
    """Of every B, by name."""
    for batch in batches(bench, case)[:STEPS]:
        said = None
        if case.loss != "plain":
            with torch.no_grad():
                logits, labels, states = at_labels(base, batch, output_hidden_states=True)
            ids, *others = most_likely(logits, TOP_K, labels)
            said = Said(Targets(ids.long(), *others), states)
        loss_of(model, said, batch, case).backward()
    return {n: w.grad for n, w in model.named_parameters() if "lora_B" in n and w.grad is not None}


@torch.no_grad()
def lend(whole: PeftModel, narrow: PeftModel, kept: dict[str, torch.Tensor]) -> None:
    """Give a pruned model the A of the base's LoRA, where `kept` is not 0."""
    weights = dict(whole.named_parameters())
    for name, weight in narrow.named_parameters():
        if "lora_A" in name:
            weight.copy_(weights[name][:, kept[name].amax(0) > 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = RealBench(options.model, options.gsm8k, options.scratch / f"real-{options.model.name}")
    base, whole = bench.model("base"), bench.fresh(bench.model("base"), 1)
    wanted = gradients(whole, base, bench, Case(1))
    for name, case in CASES.items():
        kept = masks_of(ones_of(bench, pruned(bench, case)))
        narrow = bench.fresh(bench.model(aligned(bench, case)), 1)
        lend(whole, narrow, kept)
        sums: dict[str, list[float]] = {}
        for weight, own in gradients(narrow, base, bench, case).items():
            other = wanted[weight][kept[weight].amax(1) > 0]
            first = int(re.search(r"layers\.(\d+)", weight)[1]) // LAYERS_TOGETHER * LAYERS_TOGETHER
            for layers in ("all", f"{first}-{first + LAYERS_TOGETHER - 1}"):
                found = sums.setdefault(layers, [0.0, 0.0, 0.0])
                for i, (a, b) in enumerate(((own, other), (own, own), (other, other))):
                    found[i] += (a * b).sum().item()
        for layers, (product, own, other) in sums.items():
            row = {"model": bench.base.name, "ratio": case.ratio, "loss": name, "layers": layers}
            row |= {"cosine": round(product / (own * other) ** 0.5, 4)}
            row |= {"norm_ratio": round((own / other) ** 0.5, 4)}
            append_row(ROWS, row | surroundings("transformers", "peft"))
            print({key: row[key] for key in ("loss", "layers", "cosine", "norm_ratio")}, flush=True)


if __name__ == "__main__":
    main()
