"""The models that the runs of `real.py` train on: pruned, aligned, rounded; each made once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_loop
import rivals
import torch
import yaml
from axolotl.utils.chat_templates import get_chat_template
from measure import ROOT
from plain_loop import BATCH, Bench, padded
from real_cases import Case
from transformers import AutoModelForCausalLM, get_scheduler

sys.path.insert(0, str(ROOT / "examples/quickstart"))
import data

SPARSE = ("sparsegpt", "wanda")
ALIGNED_STEPS = 80
ALIGNED_RATES = {"task": 1e-4, "other": 1e-4, "next": 1e-4, "repair": 1e-3}


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
    method, _, tokens = case.method.partition("-")
    how = ["--method", method, share, str(case.ratio)]
    if tokens:
        how += ["--calibration-samples", str(int(tokens) // rivals.LENGTH)]
    if case.method not in SPARSE:
        how += ["--refit" if case.refit else "--no-refit"]
    if case.loss.startswith("boundary"):
        name += f"-{case.loss}"
        upper = bench.model("base").config.num_hidden_layers - int(case.loss.partition("-")[2])
        how += ["--protect-first", "0", "--protect-last", str(upper)]
    return prune(bench, name, *how)


def upper(bench: Bench, case: Case) -> list[int]:
    """The base's last layers, as many as the pruned model of the same ratio has bytes for."""
    parts = rivals.shares(bench.base, pruned(bench, Case(1, case.ratio)))
    return list(parts)[-round(sum(parts.values())) :]


def prune(bench: RealBench, name: str, *how: str) -> Path:
    """By the command, with 8,192 training tokens for scores and refit."""
    folder, file = bench.scratch / name, bench.scratch / "calibration.yml"
    if not folder.exists():
        file.write_text(yaml.safe_dump(bench.settings("calibration")), encoding="utf-8")
        text = ["--calibration", str(file), "--calibration-samples", "32"]
        text += ["--calibration-length", "256"]
        bench.command("axolotl-loram", "prune", str(bench.base), str(folder), *text, *how)
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
    top = case.method.startswith("top")
    folder = bench.scratch / f"{start.name}{f'-top-{case.ratio}' * top}-{case.bits}-bits"
    if not folder.exists():
        model = bench.model(start)
        layers = upper(bench, case) if top else range(len(model.base_model.layers))
        changes = dict.fromkeys(layers, rivals.rounded(case.bits))
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
            if case.aligned == "next":
                labels = inputs["input_ids"].masked_fill(~seen, -100)
                loss = model(**inputs, labels=labels).loss
            else:
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
        self.task, self.template = task, {}
        if self.tokenizer.chat_template is None:  # GGUF files of Gemma 3 have none
            self.tokenizer.chat_template = get_chat_template("gemma")
            self.template = {"chat_template": "gemma"}
        ids = self.tokenizer.apply_chat_template(self.rows("train", 1)[0], return_dict=False)
        self.end = ids[-2]

    def settings(self, name: str) -> dict[str, Any]:
        """With the chat template, where the tokenizer has none."""
        return {**super().settings(name), **self.template}

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
        folder = self.base if kind == "base" else kind
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})


def source(bench: Bench, name: str) -> Path:
    """A file of the quickstart's, of source of the standard library."""
    file = bench.scratch / "source" / name
    if not file.exists():
        data.build(file.parent)
    return file
