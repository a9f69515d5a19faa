"""What exact gradients below the upper layers would add: windows of layers, trained in turn.

The upper layers are trained as `units: layers` trains them, on hidden states of the ones below.
Here those are trained too, a window at a time, so that no more than a window, or the upper layers,
has to be in memory: a pass through the whole model (in earnest a layer at a time) gives the
gradient g of the loss by what each window hands on, h; then the window alone learns to minimize

    Σ g·(h − h₀) + λ/2 ‖h − h₀‖²,   λ = rms ‖g‖ / (ρ · median ‖h₀‖)

over tokens, whose gradient at the start is the loss's; then the upper layers are trained on what
the windows give. `--rounds` does that so many times, on a part of the steps each. `--rho 0` trains
the upper layers alone. The rest is as in `real.py`.

    python benchmarks/windows.py MODEL GSM8K --upper 12 --windows 2 --rounds 4 --rho 0.1
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import real
import rivals
import torch
from measure import ROOT, append_row, surroundings
from peft import PeftModel
from plain_loop import Bench
from plain_loop import measured as of_task
from real_cases import Case
from real_models import RealBench

ROWS = Path(__file__).with_suffix(".csv")
Batch = dict[str, torch.Tensor]


class Stop(Exception):
    """The hidden states that were wanted are there."""


class Windows:
    """A LoRA of every layer, trained window by window."""

    def __init__(self, bench: Bench, case: Case, upper: int, windows: int, rho: float) -> None:
        model = bench.model("base")
        names = [n.rpartition(".")[2] for n in rivals.linears(model.base_model.layers[0])]
        self.model: PeftModel = bench.fresh(model, case.seed, target_modules=names).train()
        self.layers, self.rho = self.model.get_base_model().base_model.layers, rho
        first = len(self.layers) - upper
        self.cuts = [round(first * i / windows) for i in range(windows + 1)]
        self.seen: dict[int, torch.Tensor] = {}
        self.mode: Any = None
        for cut in self.cuts[1:]:
            hook = partial(self.see, cut)
            self.layers[cut].register_forward_pre_hook(hook, with_kwargs=True)
        spans = [*pairwise(self.cuts), (first, len(self.layers))]
        self.weights = [self.lora(*span) for span in spans]
        self.optimizers = [torch.optim.AdamW(w, case.rate, weight_decay=0.0) for w in self.weights]

    def lora(self, start: int, stop: int) -> list[torch.nn.Parameter]:
        """The trained weights of some layers."""
        named = [item for layer in self.layers[start:stop] for item in layer.named_parameters()]
        return [weight for name, weight in named if "lora_" in name]

    def see(self, cut: int, layer: Any, args: tuple, given: dict[str, Any]) -> Any:
        """Keep the hidden states before a layer, as `mode` says."""
        hidden = args[0] if args else given["hidden_states"]
        if self.mode == "gradients" and cut == self.cuts[1]:
            hidden = hidden.detach().requires_grad_()
        self.seen[cut] = hidden
        if self.mode == cut:
            raise Stop
        return ((hidden, *args[1:]), given) if args else ((), given | {"hidden_states": hidden})

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean over the labelled tokens."""
        logits, labels, _ = real.at_labels(self.model, batch)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    def handed_on(self, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What each window hands on, (batch, tokens, hidden), and the loss's gradient by it."""
        self.mode = "gradients"
        loss, self.mode = self.loss(batch), None
        states = [self.seen[cut] for cut in self.cuts[1:]]
        gradients = torch.autograd.grad(loss, states)
        return [(h.detach(), g) for h, g in zip(states, gradients, strict=True)]

    def first_order(
        self, window: int, batch: Batch, h: torch.Tensor, g: torch.Tensor, rate: float
    ) -> torch.Tensor:
        """What a window minimizes; `rate` is λ."""
        self.mode = self.cuts[window + 1]
        try:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            self.model.get_base_model().base_model(**inputs)
        except Stop:
            self.mode = None
        moved = (self.seen[self.cuts[window + 1]] - h) * batch["attention_mask"].unsqueeze(-1)
        return (g * moved).sum() + rate / 2 * moved.square().sum()

    def step(self, number: int, loss: torch.Tensor) -> None:
        """Of a window's, or the upper layers', optimizer."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights[number], 1.0)
        self.optimizers[number].step()
        self.model.zero_grad()

    def only(self, number: int) -> None:
        """Train these weights and no others."""
        for other, weights in enumerate(self.weights):
            for weight in weights:
                weight.requires_grad_(other == number)

    def round(self, batches: list[Batch]) -> None:
        """Each window on the gradients of now, then the upper layers on what the windows give."""
        handed = [self.handed_on(batch) for batch in batches] if self.rho else []
        before = [[w.detach().clone() for w in weights] for weights in self.weights]
        after = []
        for window in range(len(self.cuts) - 1 if self.rho else 0):
            for weights, old in zip(self.weights, before, strict=True):
                for weight, value in zip(weights, old, strict=True):
                    weight.data.copy_(value)
            own = [
                (*pair[window], batch["attention_mask"].bool())
                for pair, batch in zip(handed, batches, strict=True)
            ]
            slope = torch.cat([g[m].norm(dim=-1) for _, g, m in own]).square().mean().sqrt()
            size = torch.cat([h[m].norm(dim=-1) for h, _, m in own]).median()
            self.only(window)
            for batch, (h, g, _) in zip(batches, own, strict=True):
                self.step(window, self.first_order(window, batch, h, g, slope / (self.rho * size)))
            after.append([w.detach().clone() for w in self.weights[window]])
        for window, values in enumerate(after):
            for weight, value in zip(self.weights[window], values, strict=True):
                weight.data.copy_(value)
        self.only(len(self.weights) - 1)
        for batch in batches:
            self.step(-1, self.loss(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build")
    parser.add_argument("--upper", type=int, default=12, help="layers at the top")
    parser.add_argument("--windows", type=int, default=2, help="of the layers below")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3)
    o = parser.parse_args()
    torch.set_num_threads(1)
    bench = RealBench(o.model, o.gsm8k, o.scratch / f"real-{o.model.name}")
    case, begun = Case(o.seed, rate=o.rate), time.perf_counter()
    trained, batches = Windows(bench, case, o.upper, o.windows, o.rho), real.batches(bench, case)
    size = len(batches) // o.rounds
    for start in range(0, len(batches), size):
        trained.round(batches[start : start + size])
        print(f"{start + size} steps, {time.perf_counter() - begun:.0f} s", flush=True)
    perplexity = of_task(bench, trained.model.eval())["perplexity"]
    found = {"recovered_task": round(perplexity, 4), "share": share(bench, case, perplexity)}
    said = {
        name: getattr(o, name) for name in ("seed", "upper", "windows", "rounds", "rho", "rate")
    }
    row = {"model": o.model.name, **said, **found, "seconds": round(time.perf_counter() - begun)}
    append_row(ROWS, row | surroundings("transformers", "peft"))
    print(row, flush=True)


def share(bench: Bench, case: Case, perplexity: float) -> float:
    """Of the gain of the best LoRA of that seed in real.csv."""
    rows = csv.DictReader(ROWS.with_name("real.csv").read_text(encoding="utf-8").splitlines())
    own = [row for row in rows if (row["model"], row["task"]) == (bench.base.name, "gsm8k")]
    lora = {"ratio": "0.0", "loss": "plain", "bits": "16", "arithmetic": "float32"}
    lora |= {"seed": str(case.seed), "steps": str(case.steps)}
    best = min(float(row["recovered_task"]) for row in own if lora.items() <= row.items())
    base = next(float(row["recovered_task"]) for row in own if not row["seed"])
    return round(math.log(base / perplexity) / math.log(base / best), 4)


if __name__ == "__main__":
    main()
