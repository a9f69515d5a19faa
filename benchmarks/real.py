"""How much of LoRA's gain a recovered adapter keeps on real pretrained models.

Every run is the plain loop of `plain_loop.py`, which gives Axolotl's adapters to the bit when it is
fed Axolotl's batches: LoRA (rank 8, 40 steps of 4 samples, frozen weights in bfloat16) on GSM8K. On
the base it is the yardstick; on pruned models the loss varies: `plain`, or `anchored` with so many
tokens named (see `axolotl_loram/training/anchored.py`). All are measured alike on the base with the
adapter recovered, and on the pruned model: perplexity of 40 held-out answers, and of other text.

share = ln(base / recovered) / ln(base / LoRA), both of the same seed; LoRA at the best of the
rates that were there when the row was added.

    python benchmarks/real.py MODEL GSM8K   # rows that real.csv has are not run again
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plain_loop
import rivals
import rotation
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
NEURONS = {0.5: "neurons=0.611", 0.75: "kv_groups=0.34,neurons=0.861"}
"""In SmolLM2-135M the parameters that the key leaves, with 3 and 2 of the 3 KV groups."""
BOUNDARIES = {18: "kv_groups=0.34,neurons=0.704", 22: "kv_groups=0.67,neurons=0.837"}
"""Layers pruned, and how far, so that as much is left as by 0.5 and by 0.75."""
SPARSE = ("sparsegpt", "wanda")
ALIGNED_STEPS = 80
ALIGNED_RATES = {"task": 1e-4, "other": 1e-4, "repair": 1e-3}


@dataclass(frozen=True)
class Case:
    """A training run.

    Attributes:
        seed: Of the LoRA weights and the order of the rows.
        ratio: Pruned share of the inner layers, as `--pruning-ratio` or `--sparsity` takes it; 0
            is the base itself.
        method: How units are chosen. "dealt-n" is n prunings in turn (`rotation.py`). Rivals at
            the bytes of `activation` (`rivals.py`) are "layers", whole ones, "lowrank", the
            weights' best approximation of low rank, and "top", the base's upper layers, which read
            what its lower ones give ("top-n": at rank n).
        refit: Whether the rest is refitted.
        loss: "plain" or "anchored"; "ceiling" is LoRA on the base, confined to the rows of B and
            the columns of A that the pruned model's adapter has: all that recovery could give.
            "hidden-n" is anchored, and after every n-th layer the hidden states get the constant
            offset between the base's and the pruned model's, too. "boundary-n" has that once: n
            layers are pruned, the others are whole, so that there it is the base that learns.
        top_k: Tokens whose offsets are named; 0 is all of them.
        rate: Learning rate.
        aligned: What the pruned model was trained with before: "task", all its weights distilled
            towards the base on the training rows; "other", on source of the standard library;
            "repair", LoRA alone, distilled on the training rows and then frozen.
        steps: Of 4 samples.
        bits: Of the frozen linear weights: 4 is NF4, 3 and 2 are rounded by GPTQ (`rivals.py`).
        arithmetic: What is computed in; the weights are stored in bfloat16.
    """

    seed: int
    ratio: float | str = 0.0
    method: str = "activation"
    refit: bool = True
    loss: str = "plain"
    top_k: int = 0
    rate: float = 1e-3
    aligned: str = ""
    steps: int = STEPS
    bits: int = 16
    arithmetic: str = "float32"

    @property
    def is_lora(self) -> bool:
        """Whether it is LoRA on the base as it is: a yardstick."""
        return not self.ratio and self.bits == 16 and self.loss == "plain"


def cases() -> Iterator[Case]:
    """The conclusions' first."""
    old = partial(Case, arithmetic="bfloat16")
    for seed in SEEDS:
        yield old(seed)
        for ratio in (0.5, 0.75):
            yield old(seed, ratio)
            yield old(seed, ratio, loss="anchored")
    for top_k in (32, 8, 128):
        yield old(1, 0.5, loss="anchored", top_k=top_k)
    for ratio in (0.5, 0.75):
        yield old(1, ratio, loss="ceiling")
        for every in (1, 5, 15):
            yield old(1, ratio, loss=f"hidden-{every}", top_k=32)
    yield old(1, 0.5, loss="anchored", top_k=32, aligned="task")
    yield old(1, rate=2e-3)
    for ratio in (0.5, 0.75):
        yield old(1, ratio, loss="anchored", top_k=32, rate=2e-3)
    yield from new_cases()


def new_cases() -> Iterator[Case]:
    """In float32, which is the faster where a CPU's bfloat16 is not; LoRA at three rates first."""
    anchored = partial(Case, loss="anchored", top_k=32, rate=2e-3)
    yield Case(1, rate=2e-3)
    for ratio in (0.5, 0.75, NEURONS[0.5], NEURONS[0.75]):
        yield anchored(1, ratio)
    for rate in (1e-3, 4e-3):
        yield Case(1, rate=rate)
    for ratio in (0.5, 0.75, 0.85):
        yield Case(1, ratio, "top", rate=2e-3)
    for rate in (1e-3, 5e-4):
        for ratio in (0.75, 0.5):
            yield Case(1, ratio, "top", rate=rate)
    yield Case(1, 0.75, "top-32", rate=2e-3)
    yield Case(1, 0.75, "top", rate=4e-3)
    for places in BOUNDARIES:
        yield Case(1, BOUNDARIES[places], loss=f"boundary-{places}", top_k=32, rate=2e-3)
    for bits in (2, 3):
        yield anchored(1, bits=bits)
    for ratio in (0.5, 0.75):
        for method in ("layers", "lowrank"):
            yield anchored(1, ratio, method)
        yield anchored(1, ratio, rate=4e-3)
        yield Case(1, ratio, rate=2e-3)
    for ratio, hands in ((0.5, 3), (0.75, 7), (0.5, 2)):
        yield anchored(1, ratio, f"dealt-{hands}")
    for ratio in (0.25, 0.85):
        yield anchored(1, ratio)
        yield Case(1, ratio, rate=2e-3)
    for method, refit in (("random", True), ("magnitude", True), ("taylor", True)):
        yield anchored(1, 0.5, method, refit)
    for method in ("random", "activation"):
        yield anchored(1, 0.5, method, False)
    for bits in (4, 3):
        yield anchored(1, 0.5, bits=bits)
    for ratio in (0.5, 0.75):
        for loss in ("anchored", "plain"):
            yield Case(1, ratio, loss=loss, top_k=32, rate=2e-3, aligned="repair")
    for sparsity in (0.5, "2:4"):
        for loss in ("anchored", "plain"):
            yield Case(1, sparsity, "sparsegpt", loss=loss, top_k=32, rate=2e-3)
    for seed in SEEDS[1:]:
        yield Case(seed, rate=2e-3)
        for ratio in (0.5, 0.75, 0.85):
            yield Case(seed, ratio, "top", rate=2e-3)
        for ratio in (0.5, 0.75):
            yield anchored(seed, ratio)


def pruned(bench: Bench, case: Case) -> Path:
    """The pruned model: 8,192 training tokens for scores and refit."""
    if not case.ratio or case.method.startswith("top"):
        return bench.base
    name = f"pruned-{case.ratio}-{case.method}-{'refit' if case.refit else 'plain'}"
    folder = bench.scratch / name
    if folder.exists():
        return folder
    if case.method in ("layers", "lowrank"):
        parts = rivals.shares(bench.base, pruned(bench, Case(1, case.ratio)))
        model, ids = bench.model("base"), calibration(bench)
        if case.method == "layers":
            rivals.fewer_layers(bench.base, folder, model, ids, parts)
        else:
            changes = {n: rivals.low_rank(share) for n, share in parts.items() if share < 1}
            rivals.changed(bench.base, folder, model, ids, changes)
        return folder
    share = "--sparsity" if case.method in SPARSE else "--pruning-ratio"
    how = ["--method", case.method, share, str(case.ratio)]
    if case.method not in SPARSE:
        how += ["--refit" if case.refit else "--no-refit"]
    if case.loss.startswith("boundary"):
        name += f"-{case.loss}"
        upper = bench.model("base").config.num_hidden_layers - int(case.loss.partition("-")[2])
        how += ["--protect-first", "0", "--protect-last", str(upper)]
    return prune(bench, name, *how)


def prune(bench: RealBench, name: str, *how: str) -> Path:
    """By the command, with 8,192 training tokens for scores and refit."""
    folder, file = bench.scratch / name, bench.scratch / "calibration.yml"
    if not folder.exists():
        file.write_text(yaml.safe_dump(bench.settings("calibration")), encoding="utf-8")
        text = ["--calibration", str(file), "--calibration-samples", "32"]
        text += ["--calibration-length", "256"]
        bench.command("axolotl-loram", "prune", str(bench.base), str(folder), *how, *text)
    return folder


def calibration(bench: RealBench) -> torch.Tensor:
    """8,192 training tokens, (windows, length)."""
    ids = [token for row in bench.rows("train", 160) for token in bench.encoded(row)[0]]
    return torch.tensor(ids[: rivals.WINDOWS * rivals.LENGTH]).view(rivals.WINDOWS, -1)


def frozen(bench: RealBench, case: Case) -> Path:
    """What is trained on: pruned, aligned and rounded, as the case says."""
    start = aligned(bench, case)
    if case.bits == 16:
        return start
    folder = bench.scratch / f"{start.name}-{case.bits}-bits"
    if not folder.exists():
        model = bench.model(start)
        changes = dict.fromkeys(range(len(model.base_model.layers)), rivals.rounded(case.bits))
        rivals.changed(start, folder, model, calibration(bench), changes)
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
    rivals.rewritten(start, folder, model.state_dict())
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

    def __init__(self, model: Path, gsm8k: Path, scratch: Path, task: str = "gsm8k"):
        super().__init__(model, gsm8k, scratch)
        self.task = task
        ids = self.tokenizer.apply_chat_template(self.rows("train", 1)[0], return_dict=False)
        self.end = ids[-2]

    def rows(self, split: str, limit: int) -> list[list[dict[str, str]]]:
        """Of the task: GSM8K, or the quickstart's functions and the first lines of docstrings."""
        if self.task == "gsm8k":
            return super().rows(split, limit)
        file = source(self, {"train": "train.jsonl", "test": "heldout.jsonl"}[split])
        lines = file.read_text(encoding="utf-8").splitlines()
        every = max(len(lines) // limit, 1)  # the files are in the order of the modules
        return [json.loads(line)["messages"] for line in lines[::every][:limit]]

    def model(self, kind: Any, **settings) -> Any:
        """The model of a folder, in bfloat16; for measuring, in float32."""
        from transformers import AutoModelForCausalLM

        folder = self.base if kind == "base" else kind
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})


def trained(bench: RealBench, case: Case) -> Path:
    """The adapter of a case as trained; one that rotated is the base's."""
    folder = bench.scratch / "-".join(map(str, asdict(case).values()))
    if folder.exists():
        return folder
    hands = hands_of(bench, case)
    start = bench.base if hands or case.loss == "ceiling" else frozen(bench, case)
    model = fresh(bench, start, case)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, case.rate, weight_decay=0.0)
    turns, masks = None, None
    if hands:
        narrow = [fresh(bench, hand, case) for hand in hands]
        turns = rotation.Rotation(model, narrow, [ones_of(bench, hand) for hand in hands])
    elif case.loss == "ceiling":
        masks = masks_of(ones_of(bench, pruned(bench, case)))
        confine(model, masks)
    anchors = said(bench, case)
    for step, batch in enumerate(batches(bench, case)):
        turn = step % len(hands or [0])
        with autocast(case):
            used = turns.lend(turn) if turns else model
            loss = loss_of(used, next(anchors), batch, case)
        loss.backward()
        if turns:
            turns.collect(turn)
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
    parts = rivals.shares(bench.base, pruned(bench, Case(1, case.ratio)))
    upper = list(parts)[-round(sum(parts.values())) :]
    names = rivals.linears(model.base_model.layers[0])
    how = {"layers_to_transform": upper, "target_modules": [n.rpartition(".")[2] for n in names]}
    how |= {"r": int(rank), "lora_alpha": 2 * int(rank)} if rank else {}
    return bench.fresh(model, case.seed, **how).train()


def hands_of(bench: RealBench, case: Case) -> list[Path]:
    """The pruned models that a "dealt" case is trained on in turn; of others, none."""
    kind, _, count = case.method.partition("-")
    if kind != "dealt":
        return []
    folder = bench.scratch / f"hands-{case.ratio}-{case.method}"
    if not folder.exists():
        rotation.deal(bench.model("base"), calibration(bench), case.ratio, int(count), folder)
    hands = sorted(folder.iterdir())
    return [
        prune(bench, f"{folder.name}-{hand.name}", "--indices", str(hand), "--refit")
        for hand in hands
    ]


def ones_of(bench: RealBench, model: Path) -> Path:
    """An adapter of a pruned model that is all 1, recovered: where the base's has weights."""
    folder = bench.scratch / f"ones-{model.name}"
    if not folder.exists():
        ones = bench.fresh(bench.model(model), 0)
        rotation.fill_ones(ones)
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
    found: dict[str, float] = {}
    if not (
        case.is_lora
        or case.loss == "ceiling"
        or case.method.startswith("top")
        or hands_of(bench, case)
    ):
        start = frozen(bench, case)
        found = measured(bench, PeftModel.from_pretrained(bench.model(start), adapter), "pruned")
        if case.ratio and case.method not in ("layers", "lowrank"):
            adapter = recovered(bench, adapter)
        else:
            adapter = rivals.restored(adapter, start)
    whole = PeftModel.from_pretrained(bench.model("base"), adapter)
    return {**found, **measured(bench, whole, "recovered"), "seconds": round(seconds)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build")
    parser.add_argument("--task", choices=("gsm8k", "docstrings"), default="gsm8k")
    parser.add_argument("--only", default="", help="runs whose description has this regex")
    options = parser.parse_args()
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
