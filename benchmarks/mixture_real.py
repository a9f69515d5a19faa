"""How much of LoRA's gain is kept when experts of a real pretrained model are pruned.

The mixture is upcycled from a dense chat model of llama's kind: a Mixtral with its attention, and
in every layer copies of its MLP as experts, 2 of which a token goes through. As copies they compute
the dense model exactly, whatever random routers choose; each is then perturbed by a little noise.
Experts and routers are trained on GSM8K and on source of the standard library, with a loss that
balances the load of each layer. What became of the routing is in mixture_real_routing.csv.

For each seed × criterion × share: remove experts (of all but the first 4 and last 2 layers), train
LoRA on attention to sum up functions in a line (the quickstart's data), recover it, measure the
mixture with it: perplexity of 16 held-out lines.

share = ln(mixture / recovered) / ln(mixture / LoRA on the mixture), both of the same seed.

    python benchmarks/mixture_real.py MODEL GSM8K   # rows that are there are not run again
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plain_loop
import torch
from measure import ROOT, append_row, surroundings
from peft import PeftModel
from plain_loop import Bench, padded
from transformers import AutoModelForCausalLM
from upcycling import EXPERTS, TEXTS, losses, perturb, routing, scale_routers, train, upcycled

sys.path.insert(0, str(ROOT / "examples/quickstart"))
import data

from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

ROWS = Path(__file__).with_suffix(".csv")
ROUTING = ROWS.with_name("mixture_real_routing.csv")
SEEDS = (1, 2, 3)
WINDOW = 192
LORA_BATCH, LORA_RATE, TRAINED_ROWS, HELD_OUT = 2, 2e-3, 800, 16


@dataclass(frozen=True)
class Case:
    """A LoRA run.

    Attributes:
        seed: Of the LoRA weights, the order of the rows, and the random criterion.
        ratio: Pruned share of the inner layers' experts; 0 is LoRA on the mixture.
        method: The criterion.
    """

    seed: int
    ratio: float = 0.0
    method: str = ""


def cases() -> Iterator[Case]:
    """A whole seed at a time."""
    for seed in SEEDS:
        yield Case(seed)
        for ratio in (0.75, 0.5):
            for method in ("random", "activation", "reap"):
                yield Case(seed, ratio, method)


class MixtureBench(Bench):
    """Bench of the mixture, whose task are the quickstart's summaries."""

    def __init__(self, dense: Path, gsm8k: Path, scratch: Path, steps: int):
        super().__init__(dense, gsm8k, scratch)
        self.dense, self.steps = self.base, steps
        self.base = self.scratch / f"mixture-{steps}"
        if not (self.summaries / "train.jsonl").exists():
            data.build(self.summaries)
        if not self.base.exists():
            self._build()

    @property
    def summaries(self) -> Path:
        """Folder of the quickstart's data."""
        return self.scratch / "data"

    def rows(self, split: str, limit: int) -> list[list[dict[str, str]]]:
        """Conversations of the task."""
        file = self.summaries / ("train.jsonl" if split == "train" else "heldout.jsonl")
        lines = file.read_text(encoding="utf-8").splitlines()
        limit = limit if split == "train" else min(limit, HELD_OUT)
        return [json.loads(line)["messages"] for line in lines[:limit]]

    def model(self, kind: Any, **settings: Any) -> Any:
        """The model of a folder, in float32: the fastest for few tokens on a CPU.

        Loaded in bfloat16, as it is stored: in float32 at once, loading takes 9.8 GB.
        """
        folder = self.base if kind == "base" else kind
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings)
        model.set_experts_implementation("eager")
        return model.float()

    def windows(self, text: str, held_out: bool) -> torch.Tensor:
        """Token ids (windows, WINDOW) of a text: GSM8K's rows, or the library's modules."""
        if text == "math":
            rows = super().rows("test" if held_out else "train", 3000)
            texts: Iterable[str] = ("\n".join(part["content"] for part in row) for row in rows)
        else:
            library = data.sources(Path(data.sysconfig.get_path("stdlib")))
            texts = (text for module, text in library if data.is_held_out(module) == held_out)
        # A file a stride away each time, so that the windows are not of a few modules.
        spread = list(texts)
        texts = itertools.chain.from_iterable(spread[start::17] for start in range(17))
        ids: list[int] = []
        wanted = 4 if held_out else self.steps
        for some in texts:
            ids += self.tokenizer(some[:2000], add_special_tokens=False)["input_ids"]
            if len(ids) >= wanted * WINDOW:
                break
        return torch.tensor(ids[: wanted * WINDOW]).view(wanted, WINDOW)

    def _build(self) -> None:
        """Upcycle, train, say how it routes, and write."""
        model = upcycled(self.dense)
        held_out = {text: self.windows(text, held_out=True) for text in TEXTS}
        scale_routers(model, torch.cat(list(held_out.values())))
        gap = (logits(model, self) - logits(self.model(self.dense), self)).abs().max()
        print(f"copies against the dense model: at most {gap:.2g} of a logit apart", flush=True)
        perturb(model)
        told = {"start": losses(model, held_out)}
        before = routing(model, held_out)
        train(model, [self.windows(text, held_out=False) for text in TEXTS])
        told["end"] = losses(model, held_out)
        print("held-out losses:", told, flush=True)
        for stage, layers in (("start", before), ("end", routing(model, held_out))):
            for row in layers:
                kept = {"steps": self.steps, "stage": stage, **row}
                append_row(self.scratch / ROUTING.name, kept | surroundings("transformers"))
        partial = self.base.with_name(f"{self.base.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        partial.rename(self.base)


@torch.no_grad()
def logits(model: Any, bench: MixtureBench) -> torch.Tensor:
    """Of a conversation of the task."""
    ids, _ = bench.encoded(bench.rows("test", 1)[0])
    return model(input_ids=torch.tensor([ids])).logits


def pruned(bench: MixtureBench, case: Case) -> Path:
    """The mixture without the experts of least score, on 2,048 tokens of the task.

    What is calibrated is the same for all seeds, what is random is not.
    """
    seed = case.seed if case.method == "random" else 0
    folder = bench.scratch / f"pruned-{bench.steps}-{seed}-{case.ratio}-{case.method}"
    if not folder.exists():
        how = {"calibration_samples": 16, "calibration_length": 128, "refit": False}
        text = None if case.method == "random" else str(bench.summaries / "train.jsonl")
        what = {"units": "experts", "method": case.method, "ratio": case.ratio, "seed": seed}
        prune(str(bench.base), folder, PruningArgs.parse(**what, **how, calibration_path=text))
    return folder


def trained(bench: MixtureBench, case: Case, model: Any, steps: int) -> Any:
    """The model with LoRA in attention."""
    model = bench.fresh(model, case.seed).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LORA_RATE, weight_decay=0.0)
    rows = bench.rows("train", TRAINED_ROWS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(case.seed))
    for start in range(0, steps * LORA_BATCH, LORA_BATCH):
        some = order[start : start + LORA_BATCH].tolist()
        loss = model(**padded(bench, [bench.encoded(rows[i]) for i in some])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def row_of(bench: MixtureBench, case: Case, steps: int) -> dict[str, Any]:
    """Train and measure; what the pruning itself costs is measured for the first seed."""
    begun, found = time.perf_counter(), {}
    folder = pruned(bench, case) if case.ratio else bench.base
    model = bench.model(folder).eval()
    if case.ratio and case.seed == SEEDS[0]:
        found["pruned_task"] = plain_loop.measured(bench, model)["perplexity"]
    model = trained(bench, case, model, steps)
    if case.ratio:
        adapter = bench.scratch / "adapter"
        model.save_pretrained(adapter)
        del model
        served = recover(adapter, str(folder), output=adapter / "recovered", overwrite=True)
        model = PeftModel.from_pretrained(bench.model("base"), served["output"])
    found["recovered_task"] = plain_loop.measured(bench, model)["perplexity"]
    return found | {"seconds": round(time.perf_counter() - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a chat model of llama's kind")
    parser.add_argument("gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build/mixture_real")
    parser.add_argument("--steps", type=int, default=40, help="of the mixture's training")
    parser.add_argument("--lora-steps", type=int, default=16)
    parser.add_argument("--rows", type=Path, default=ROWS, help="where rows are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = MixtureBench(options.model, options.gsm8k, options.scratch, options.steps)
    about = {"model": options.model.name, "experts": EXPERTS, "mixture_steps": options.steps}
    about |= {"lora_steps": options.lora_steps}
    for case in (None, *cases()):
        said = dict.fromkeys(asdict(Case(0)), "") if case is None else asdict(case)
        rows = (
            list(csv.DictReader(options.rows.open(encoding="utf-8")))
            if options.rows.exists()
            else []
        )
        rows = [row for row in rows if all(row[name] == str(about[name]) for name in about)]
        task = {(row["seed"], row["ratio"], row["method"]): row["recovered_task"] for row in rows}
        if tuple(map(str, said.values())) in task:
            continue
        if case is None:
            found = {
                "recovered_task": plain_loop.measured(bench, bench.model("base"))["perplexity"]
            }
        else:
            found = row_of(bench, case, options.lora_steps)
        row = {**about, **said, "pruned_task": found.get("pruned_task", "")}
        row |= {"recovered_task": found["recovered_task"], "share": ""}
        if case is not None and case.ratio:
            base, lora = (float(task[key]) for key in (("", "", ""), (str(case.seed), "0.0", "")))
            row["share"] = round(math.log(base / row["recovered_task"]) / math.log(base / lora), 4)
        row["seconds"] = found.get("seconds", 0)
        append_row(options.rows, row | surroundings("transformers", "peft"))
        print({name: value for name, value in row.items() if value != ""}, flush=True)


if __name__ == "__main__":
    main()
