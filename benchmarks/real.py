"""How much of LoRA's gain a recovered adapter keeps on real pretrained models.

Every run is the plain loop of `plain_loop.py`, which gives Axolotl's adapters to the bit when it is
fed Axolotl's batches: LoRA (rank 8, 40 steps of 4 samples, frozen weights in bfloat16) on GSM8K. On
the base it is the yardstick; on pruned models the loss varies: `plain`, or `anchored` with so many
tokens named (see `axolotl_loram/training/anchored.py`). All are measured alike on the base with the
adapter recovered, and on the pruned model: perplexity of 40 held-out answers, and of other text.

share = ln(base / recovered) / ln(base / LoRA), both of the same seed; LoRA at the best of the
rates that were there when the row was added.

    python benchmarks/real.py MODEL GSM8K   # rows that real.csv has are not run again
    python benchmarks/real.py --summary     # shares of LoRA of the same seed and rate
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import plain_loop
import rivals
import torch
import yaml
from measure import ROOT, append_row, surroundings
from peft import PeftModel
from plain_loop import BATCH, Bench, padded, recovered
from real_cases import Case, cases
from real_models import RealBench, frozen, pruned, source, upper
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "examples/quickstart"))

from axolotl_loram.training.anchored import anchored_loss, offsets
from axolotl_loram.training.distil import Targets
from axolotl_loram.training.teacher import most_likely

ROWS = Path(__file__).with_suffix(".csv")
NAMED = ("model", "task", *(name for name in asdict(Case(0)) if name != "seed"))
"""What tells runs apart but for their seed."""


def trained(bench: RealBench, case: Case) -> Path:
    """The adapter of a case as trained."""
    case = replace(case, loss=case.loss.removesuffix("-fitted"))
    folder = bench.scratch / "-".join(map(str, asdict(case).values()))
    if folder.exists():
        return folder
    start = bench.base if case.loss == "ceiling" else frozen(bench, case)
    model = fresh(bench, start, case)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, case.rate, weight_decay=0.0)
    masks = None
    if case.loss == "ceiling":
        masks = masks_of(ones_of(bench, pruned(bench, case)))
        confine(model, masks)
    anchors = said(bench, case)
    for step, batch in enumerate(batches(bench, case)):
        with autocast(case):
            loss = loss_of(model, next(anchors), batch, case)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masks:
            confine(model, masks)
        if step % 10 == 0:
            print(f"{case} step {step}: {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    return folder


def fresh(bench: RealBench, folder: Path, case: Case) -> PeftModel:
    """A model with new LoRA weights, to be trained."""
    model = bench.model(folder, dtype=getattr(torch, case.arithmetic))
    kind, _, rank = case.method.partition("-")
    if kind != "top":
        return bench.fresh(model, case.seed).train()
    names = [name.rpartition(".")[2] for name in rivals.linears(model.base_model.layers[0])]
    how = {"layers_to_transform": upper(bench, case), "target_modules": names}
    how |= {"r": int(rank), "lora_alpha": 2 * int(rank)} if rank else {}
    return bench.fresh(model, case.seed, **how).train()


def ones_of(bench: RealBench, model: Path) -> Path:
    """An adapter of a pruned model that is all 1, recovered: where the base's has weights."""
    folder = bench.scratch / f"ones-{model.name}"
    if not folder.exists():
        ones = bench.fresh(bench.model(model), 0)
        for name, weight in ones.named_parameters():
            if "lora_" in name:
                torch.nn.init.ones_(weight)
        ones.save_pretrained(folder)
    return recovered(bench, folder)


def masks_of(ones: Path) -> dict[str, torch.Tensor]:
    """1 where an adapter of the pruned model has a weight, by the names in a LoRA of the base."""
    stored = load_file(ones / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): there for name, there in stored.items()}


@torch.no_grad()
def confine(model: Any, masks: dict[str, torch.Tensor]) -> None:
    """Zero what is masked out."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.mul_(masks[name])


def autocast(case: Case) -> torch.autocast:
    """With weights in bfloat16, as in training; or nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=case.arithmetic == "bfloat16")


def batches(bench: Bench, case: Case) -> list[dict[str, torch.Tensor]]:
    """Rows in an order of the seed's."""
    rows = bench.rows("train", plain_loop.TRAINED_ROWS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(case.seed))
    encoded = [bench.encoded(rows[i]) for i in order[: case.steps * BATCH]]
    return [padded(bench, encoded[i : i + BATCH]) for i in range(0, len(encoded), BATCH)]


@dataclass(frozen=True)
class Said:
    """What the base says of a batch's labelled places; with hidden states, where asked for."""

    targets: Targets
    states: Any = None


def said(bench: RealBench, case: Case) -> Iterator[Said | None]:
    """The base's answers for each batch; without hidden states they are kept for other runs."""
    every = case.loss.startswith(("hidden", "boundary"))
    if not every and case.loss != "anchored":
        yield from [None] * case.steps
        return
    name = f"said-{case.seed}-{case.steps}-{case.top_k}-{case.arithmetic}.safetensors"
    file = bench.scratch / name
    if file.exists() and not every:
        kept = load_file(file)
        for step in range(case.steps):
            yield Said(Targets(*(kept[f"{step}.{part}"] for part in ("ids", "logprobs", "rest"))))
        return
    base, kept = bench.model("base", dtype=getattr(torch, case.arithmetic)).eval(), {}
    for step, batch in enumerate(batches(bench, case)):
        with torch.no_grad(), autocast(case):
            logits, labels, states = at_labels(base, batch, output_hidden_states=every)
            found = most_likely(logits, case.top_k or logits.shape[-1], labels)
        targets = Targets(found[0].long(), *found[1:])
        kept |= {f"{step}.{name}": tensor for name, tensor in vars(targets).items()}
        yield Said(targets, states)
        if not case.top_k or every:
            kept.clear()
    if kept:
        save_file(kept, file)


def at_labels(model: Any, batch: dict[str, torch.Tensor], **settings) -> tuple[Any, Any, Any]:
    """Logits (places, vocabulary) before each labelled token, its labels, and hidden states."""
    labels = batch["labels"][:, 1:]
    places = labels != -100
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = whole.base_model(**inputs, **settings)
    logits = whole.get_output_embeddings()(found.last_hidden_state[:, :-1][places])
    return logits, labels[places], found.hidden_states


def loss_of(
    model: Any, said: Said | None, batch: dict[str, torch.Tensor], case: Case
) -> torch.Tensor:
    """Mean over a step's labelled tokens."""
    if said is None:
        logits, labels, _ = at_labels(model, batch)
        return torch.nn.functional.cross_entropy(logits.float(), labels)
    with torch.no_grad(), model.disable_adapter():
        with Hidden(model, case.loss, said.states) as hidden:
            before, labels, _ = at_labels(model, batch)
        anchor = offsets(said.targets, before)
    with hidden:
        logits, _, _ = at_labels(model, batch)
    return anchored_loss(logits, anchor) / len(labels)


class Hidden:
    """Inside, the pruned model's hidden states are moved by an offset, after layers as `loss` says.

    The first time they are replaced by the base's, which gives the offsets; the next time those
    are added. The last layer's is left alone: hidden_states has it after the norm.
    """

    def __init__(self, model: Any, loss: str, states: Any):
        layers, (kind, _, number) = model.get_base_model().model.layers, loss.partition("-")
        every = int(number) if kind == "hidden" else len(layers)
        chosen = (
            [int(number) - 1] if kind == "boundary" else range(every - 1, len(layers) - 1, every)
        )
        self.layers = {index: layers[index] for index in chosen}
        self.states, self.offsets, self.handles = states, {}, []

    def __enter__(self) -> Hidden:
        for index, layer in self.layers.items():
            self.handles.append(layer.register_forward_hook(partial(self.move, index)))
        return self

    def __exit__(self, *error: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def move(self, index: int, layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """What the layer gives instead."""
        if index in self.offsets:
            return output + self.offsets[index]
        wanted = self.states[index + 1]
        self.offsets[index] = wanted - output
        return wanted


@torch.no_grad()
def other_text(bench: Bench, model: Any) -> float:
    """Perplexity of source of the standard library, which no run is trained on."""
    nats, tokens = 0.0, 0
    for line in source(bench, "heldout_source.jsonl").read_text(encoding="utf-8").splitlines():
        ids = bench.tokenizer(yaml.safe_load(line)["text"], return_tensors="pt")["input_ids"]
        nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


def measured(bench: Bench, model: Any, where: str) -> dict[str, float]:
    """Both perplexities, by name."""
    task = plain_loop.measured(bench, model)["perplexity"]
    return {f"{where}_task": task, f"{where}_other": round(other_text(bench, model), 4)}


def row_of(bench: RealBench, case: Case) -> dict[str, Any]:
    """Train and measure."""
    begun = time.perf_counter()
    adapter = trained(bench, case)
    seconds = time.perf_counter() - begun
    found: dict[str, float] = {}
    if not (case.is_lora or case.loss == "ceiling" or case.method.startswith("top")):
        start = frozen(bench, case)
        found = measured(bench, PeftModel.from_pretrained(bench.model(start), adapter), "pruned")
    whole = PeftModel.from_pretrained(bench.model("base"), adapter_for_base(bench, case, adapter))
    return {**found, **measured(bench, whole, "recovered"), "seconds": round(seconds)}


def adapter_for_base(bench: RealBench, case: Case, adapter: Path) -> Path:
    """What a trained adapter is on the base."""
    if case.is_lora or case.loss == "ceiling" or case.method.startswith("top"):
        return adapter
    if case.loss.endswith("-fitted"):
        return fitted(bench, adapter)
    if case.ratio and case.method not in ("layers", "lowrank"):
        return recovered(bench, adapter)
    return rivals.restored(adapter, frozen(bench, case))


def fitted(bench: RealBench, adapter: Path) -> Path:
    """The adapter for the base, with what pruning removed fitted on 8,192 training tokens."""
    target = adapter.with_name(f"{adapter.name}-fitted")
    if not target.exists():
        text = ["--calibration", str(bench.scratch / "calibration.yml")]
        text += ["--calibration-samples", "32", "--calibration-length", "256"]
        how = ["--output", str(target), "--fill", "fitted"]
        bench.command("axolotl-loram", "recover", str(adapter), *how, *text)
    return target


def add(bench: Bench, case: Case | None, found: dict[str, Any], rows: list[dict]) -> None:
    """A row with the same columns for all; the share, where its yardsticks are there."""
    base = next((row["recovered_task"] for row in rows if not row["seed"]), None)
    same = ("seed", "steps", "arithmetic")
    yardstick = {"ratio": "0.0", "loss": "plain", "bits": "16"}
    yardstick |= {name: str(getattr(case, name)) for name in same} if case else {}
    loras = [row for row in rows if case and yardstick.items() <= row.items()]
    lora = min((float(row["recovered_task"]) for row in loras), default=None)
    row: dict[str, Any] = {"model": bench.base.name, "task": bench.task}
    row |= dict.fromkeys(asdict(Case(0)), "") if case is None else asdict(case)
    columns = ("pruned_task", "pruned_other", "recovered_task", "recovered_other")
    row |= {name: found.get(name, "") for name in columns}
    row["share"] = ""
    if base and lora:
        gains = (math.log(float(base) / x) for x in (found["recovered_task"], lora))
        row["share"] = round(next(gains) / next(gains), 4)
    append_row(ROWS, row | {"seconds": found["seconds"]} | surroundings("transformers", "peft"))
    print({name: value for name, value in row.items() if value != ""}, flush=True)


def summarize(rows: list[dict[str, str]]) -> Iterator[str]:
    """Mean share of LoRA of the same seed and rate, its standard error, and the shares by seed."""
    gains: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["seed"]:
            base = next(r for r in rows if not r["seed"] and all(r[n] == row[n] for n in NAMED[:2]))
            gain = math.log(float(base["recovered_task"]) / float(row["recovered_task"]))
            gains.setdefault(tuple(row[n] for n in NAMED), {})[row["seed"]] = gain
    lora = {"ratio": "0.0", "method": "activation", "refit": "True", "loss": "plain"}
    lora |= {"top_k": "0", "aligned": "", "bits": "16"}
    for key, of_seed in gains.items():
        whole = gains.get(tuple(lora.get(n, value) for n, value in zip(NAMED, key, strict=True)))
        shares = [gain / whole[s] for s, gain in of_seed.items() if whole and s in whole]
        if shares:
            error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None
            mean = f"{statistics.mean(shares):.3f}" + (f" ± {error:.3f}" if error else "")
            yield f"{' '.join(key)}: {mean} ({', '.join(f'{share:.3f}' for share in shares)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder of a chat model")
    parser.add_argument("gsm8k", type=Path, nargs="?", help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--summary", action="store_true", help="only tell what the rows say")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build")
    parser.add_argument("--task", choices=("gsm8k", "docstrings"), default="gsm8k")
    parser.add_argument("--only", default="", help="runs whose description has this regex")
    options = parser.parse_args()
    if options.summary:
        print(*summarize(list(csv.DictReader(ROWS.open(encoding="utf-8")))), sep="\n")
        return
    if options.gsm8k is None:
        parser.error("expected the folders of a model and of GSM8K, or --summary")
    torch.set_num_threads(1)
    scratch = options.scratch / f"real-{options.model.name}"
    scratch = scratch if options.task == "gsm8k" else scratch / options.task
    bench = RealBench(options.model, options.gsm8k, scratch, options.task)
    for case in (None, *cases()):
        rows = list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []
        here = {"model": bench.base.name, "task": bench.task}.items()
        rows = [row for row in rows if here <= row.items()]
        there = {tuple(row[name] for name in asdict(Case(0))) for row in rows}
        key = [""] * len(asdict(Case(0))) if case is None else map(str, asdict(case).values())
        if tuple(key) in there or not re.search(options.only, str(case)):
            continue
        if case is None:
            found = measured(bench, bench.model("base"), "recovered")
            add(bench, case, {**found, "seconds": 0}, rows)
        else:
            add(bench, case, row_of(bench, case), rows)


if __name__ == "__main__":
    main()
