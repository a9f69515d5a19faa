"""How much of LoRA's gain a recovered adapter keeps on real pretrained models.

Every run is the plain loop of `plain_loop.py`, which gives Axolotl's adapters to the bit when it is
fed Axolotl's batches: LoRA (rank 8, 40 steps of 4 samples, frozen weights in bfloat16) on GSM8K. On
the base it is the yardstick; on pruned models the loss varies: `plain`, or `anchored` with so many
tokens named (see `axolotl_loram/training/anchored.py`). All are measured alike on the base with the
adapter recovered, and on the pruned model: perplexity of 40 held-out answers, and of other text.

share = ln(base / recovered) / ln(base / LoRA), both of the same seed.

    python benchmarks/real.py MODEL GSM8K   # rows that real.csv has are not run again
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plain_loop
import torch
import yaml
from measure import ROOT, append_row, surroundings
from peft import PeftModel
from plain_loop import BATCH, STEPS, Bench, padded, recovered
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

sys.path.insert(0, str(ROOT / "examples/quickstart"))
import data

from axolotl_loram.training.anchored import anchored_loss, offsets
from axolotl_loram.training.distil import Targets
from axolotl_loram.training.teacher import most_likely

ROWS = Path(__file__).with_suffix(".csv")
SEEDS = (1, 2, 3)
ALIGNED_STEPS = 80
ALIGNED_RATES = {"task": 1e-4, "other": 1e-4, "repair": 1e-3}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        seed: Of the LoRA weights and the order of the rows.
        ratio: Pruned share of the inner layers; 0 is LoRA on the base.
        method: How units are chosen.
        refit: Whether the rest is refitted.
        loss: "plain" or "anchored"; "ceiling" is LoRA on the base, confined to the rows of B and
            the columns of A that the pruned model's adapter has: all that recovery could give.
            "hidden-n" is anchored, and after every n-th layer the hidden states get the constant
            offset between the base's and the pruned model's, too.
        top_k: Tokens whose offsets are named; 0 is all of them.
        rate: Learning rate.
        aligned: What the pruned model was trained with before: "task", all its weights distilled
            towards the base on the training rows; "other", on source of the standard library;
            "repair", LoRA alone, distilled on the training rows and then frozen.
    """

    seed: int
    ratio: float = 0.0
    method: str = "activation"
    refit: bool = True
    loss: str = "plain"
    top_k: int = 0
    rate: float = 1e-3
    aligned: str = ""


def cases() -> Iterator[Case]:
    """The conclusions' first."""
    for seed in SEEDS:
        yield Case(seed)
        for ratio in (0.5, 0.75):
            yield Case(seed, ratio)
            yield Case(seed, ratio, loss="anchored")
    for top_k in (32, 8, 128):
        yield Case(1, 0.5, loss="anchored", top_k=top_k)
    for ratio in (0.5, 0.75):
        yield Case(1, ratio, loss="ceiling")
    for ratio in (0.5, 0.75):
        for every in (1, 5, 15):
            yield Case(1, ratio, loss=f"hidden-{every}", top_k=32)
    for aligned in ("task", "repair", "other"):
        for ratio in (0.5, 0.75):
            for loss, top_k in (("anchored", 32), ("plain", 0)):
                yield Case(1, ratio, loss=loss, top_k=top_k, aligned=aligned)
    for rate in (2e-3, 4e-3):
        yield Case(1, rate=rate)
        for ratio in (0.5, 0.75):
            yield Case(1, ratio, loss="anchored", top_k=32, rate=rate)
            yield Case(1, ratio, rate=rate)
    for method, refit in (("random", False), ("random", True), ("activation", False)):
        for loss in ("plain", "anchored"):
            yield Case(1, 0.5, method, refit, loss, 32 if loss == "anchored" else 0)
    for ratio in (0.25, 0.85):
        yield Case(1, ratio)
        yield Case(1, ratio, loss="anchored", top_k=32)


def pruned(bench: Bench, case: Case) -> Path:
    """The pruned model: 8,192 training tokens for scores and refit."""
    name = f"pruned-{case.ratio}-{case.method}-{'refit' if case.refit else 'plain'}"
    folder, file = bench.scratch / name, bench.scratch / "calibration.yml"
    if not folder.exists():
        file.write_text(yaml.safe_dump(bench.settings("calibration")), encoding="utf-8")
        amount = ["--calibration-samples", "32", "--calibration-length", "256"]
        how = ["--method", case.method, "--pruning-ratio", str(case.ratio)]
        how += ["--calibration", str(file), "--refit" if case.refit else "--no-refit"]
        bench.command("axolotl-loram", "prune", str(bench.base), str(folder), *how, *amount)
    return folder


def aligned(bench: RealBench, case: Case) -> Path:
    """The pruned model, distilled towards the base where the case says so."""
    start = pruned(bench, case)
    if not case.aligned:
        return start
    folder = start.with_name(f"{start.name}-{case.aligned}")
    if folder.exists():
        return folder
    base, model = bench.model("base").eval(), bench.model(start)
    if case.aligned == "repair":
        model = bench.fresh(model, 0)
    else:
        model.get_input_embeddings().requires_grad_(False)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, ALIGNED_RATES[case.aligned], weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, ALIGNED_STEPS // 10, ALIGNED_STEPS)
    for step, batch in enumerate(alignment_batches(bench, case.aligned)):
        seen = batch["attention_mask"].bool()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = base(**inputs).logits[seen].float().log_softmax(-1)
            found = model(**inputs).logits[seen].float().log_softmax(-1)
            loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"{folder.name} step {step}: {loss.item():.3f}", flush=True)
    model = model.merge_and_unload() if case.aligned == "repair" else model
    found = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    partial = folder.with_name(f"{folder.name}-partial")
    shutil.copytree(start, partial)
    stored = load_file(start / "model.safetensors")
    save_file(
        {name: found[name] for name in stored}, partial / "model.safetensors", {"format": "pt"}
    )
    partial.rename(folder)
    return folder


def alignment_batches(bench: RealBench, kind: str) -> Iterator[dict[str, torch.Tensor]]:
    """Training rows from the end of the file backwards, or windows of source."""
    if kind != "other":
        rows = bench.rows("train", plain_loop.TRAINED_ROWS)[::-1]
        encoded = [bench.encoded(row) for row in rows[: ALIGNED_STEPS * BATCH]]
    else:
        lines = source(bench, "train.jsonl").read_text(encoding="utf-8").splitlines()
        said = [message["content"] for line in lines for message in json.loads(line)["messages"]]
        ids = bench.tokenizer("\n".join(said))["input_ids"]
        starts = range(0, ALIGNED_STEPS * BATCH * 256, 256)
        assert starts[-1] + 256 <= len(ids), "too little source"
        encoded = [(ids[start : start + 256], 0) for start in starts]
    for start in range(0, len(encoded), BATCH):
        yield padded(bench, encoded[start : start + BATCH])


class RealBench(Bench):
    """Bench with pruned models of several ratios, for templates that end in a line break."""

    def __init__(self, model: Path, gsm8k: Path, scratch: Path):
        super().__init__(model, gsm8k, scratch)
        ids = self.tokenizer.apply_chat_template(self.rows("train", 1)[0], return_dict=False)
        self.end = ids[-2]

    def model(self, kind: Any, **settings) -> Any:
        """The model of a folder, in bfloat16; for measuring, in float32."""
        from transformers import AutoModelForCausalLM

        folder = self.base if kind == "base" else kind
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})


def trained(bench: RealBench, case: Case) -> Path:
    """The adapter of a case as trained."""
    folder = bench.scratch / "-".join(map(str, asdict(case).values()))
    if folder.exists():
        return folder
    on_base = not case.ratio or case.loss == "ceiling"
    kind = "base" if on_base else aligned(bench, case)
    narrow = bench.model(kind, dtype=torch.bfloat16)
    anchored = case.loss == "anchored" or case.loss.startswith("hidden")
    base = bench.model("base", dtype=torch.bfloat16).eval() if anchored else None
    model = bench.fresh(narrow, case.seed).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, case.rate, weight_decay=0.0)
    masks = kept_of(bench, case, model) if case.loss == "ceiling" else None
    for step, batch in enumerate(batches(bench, case.seed)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, base, batch, case)
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


def kept_of(bench: RealBench, case: Case, model: Any) -> dict[str, torch.Tensor]:
    """1 where an adapter of the pruned model has a weight, by the names in a LoRA of the base.

    The LoRA of the base is confined to that at once.
    """
    folder = bench.scratch / f"ones-{case.ratio}"
    if not folder.exists():
        ones = bench.fresh(bench.model(pruned(bench, case)), 0)
        for name, weight in ones.named_parameters():
            if "lora_" in name:
                torch.nn.init.ones_(weight)
        ones.save_pretrained(folder)
    stored = load_file(recovered(bench, folder) / "adapter_model.safetensors")
    masks = {name.replace(".weight", ".default.weight"): ones for name, ones in stored.items()}
    confine(model, masks)
    return masks


@torch.no_grad()
def confine(model: Any, masks: dict[str, torch.Tensor]) -> None:
    """Zero what is masked out."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.mul_(masks[name])


def batches(bench: Bench, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows in an order of the seed's."""
    rows = bench.rows("train", plain_loop.TRAINED_ROWS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    encoded = [bench.encoded(rows[i]) for i in order[: STEPS * BATCH]]
    return [padded(bench, encoded[i : i + BATCH]) for i in range(0, len(encoded), BATCH)]


def loss_of(model: Any, base: Any, batch: dict[str, torch.Tensor], case: Case) -> torch.Tensor:
    """Mean over a step's labelled tokens."""
    labels = batch["labels"][:, 1:]
    places = labels != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = labels[places]
    if base is None:
        logits = model(**inputs).logits[:, :-1][places]
        return torch.nn.functional.cross_entropy(logits.float(), labels)
    every = int(case.loss.partition("-")[2] or 0)
    with torch.no_grad(), model.disable_adapter():
        full = base(**inputs, output_hidden_states=bool(every))
        with Hidden(model, every, full.hidden_states) as hidden:
            before = model(**inputs).logits[:, :-1][places]
        theirs = full.logits[:, :-1][places]
        said = most_likely(theirs, case.top_k or theirs.shape[-1], labels)
        anchor = offsets(Targets(said[0].long(), *said[1:]), before)
    with hidden:
        logits = model(**inputs).logits[:, :-1][places]
    return anchored_loss(logits, anchor) / len(labels)


class Hidden:
    """Inside, the pruned model's hidden states after every n-th layer are moved by an offset.

    The first time they are replaced by the base's, which gives the offsets; the next time those
    are added. The last layer's is left alone: hidden_states has it after the norm.
    """

    def __init__(self, model: Any, every: int, states: Any):
        layers = model.get_base_model().model.layers
        chosen = range(every - 1, len(layers) - 1, every) if every else ()
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


def source(bench: Bench, name: str) -> Path:
    """A file of the quickstart's, of source of the standard library."""
    file = bench.scratch / "source" / name
    if not file.exists():
        data.build(file.parent)
    return file


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
    if not case.ratio or case.loss == "ceiling":
        whole = PeftModel.from_pretrained(bench.model("base"), adapter)
        return {**measured(bench, whole, "recovered"), "seconds": round(seconds)}
    narrow = PeftModel.from_pretrained(bench.model(aligned(bench, case)), adapter)
    found = measured(bench, narrow, "pruned")
    whole = PeftModel.from_pretrained(bench.model("base"), recovered(bench, adapter))
    return {**found, **measured(bench, whole, "recovered"), "seconds": round(seconds)}


def add(bench: Bench, case: Case | None, found: dict[str, Any], rows: list[dict]) -> None:
    """A row with the same columns for all; the share, where its yardsticks are there."""
    key = ("seed", "ratio", "loss", "rate")
    task = {tuple(row[name] for name in key): row["recovered_task"] for row in rows}
    base = task.get(("", "", "", ""))
    lora = task.get((str(case.seed), "0.0", "plain", "0.001")) if case else None
    row: dict[str, Any] = {"model": bench.base.name, "task": "gsm8k"}
    row |= dict.fromkeys(asdict(Case(0)), "") if case is None else asdict(case)
    columns = ("pruned_task", "pruned_other", "recovered_task", "recovered_other")
    row |= {name: found.get(name, "") for name in columns}
    row["share"] = ""
    if base and lora:
        gains = (math.log(float(base) / float(x)) for x in (found["recovered_task"], lora))
        row["share"] = round(next(gains) / next(gains), 4)
    append_row(ROWS, row | {"seconds": found["seconds"]} | surroundings("transformers", "peft"))
    print({name: value for name, value in row.items() if value != ""}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build")
    parser.add_argument("--only", default="", help="runs whose description has this regex")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scratch = options.scratch / f"real-{options.model.name}"
    bench = RealBench(options.model, options.gsm8k, scratch)
    for case in (None, *cases()):
        rows = list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []
        rows = [row for row in rows if row["model"] == bench.base.name]
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
