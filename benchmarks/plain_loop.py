"""Why `axolotl train` and a plain loop of transformers and PEFT differ: one thing at a time.

LoRA (rank 8, 40 steps of 4 samples) of a chat model on GSM8K, by `axolotl train` and by a loop of
thirty lines, on the base and on a pruned one. Every run starts with the same LoRA weights unless it
says otherwise; a loop can take the very batches that Axolotl trained on (`recorder.py` keeps them).
All are measured alike: negative log likelihood of 40 held-out answers, summed apart for their text,
the `<|im_end|>` that ends them, and the line break that the chat template puts after it.

`difference` is the largest between the adapter's weights and those of the run named in `compared`.

    python benchmarks/plain_loop.py MODEL GSM8K   # rows that plain_loop.csv has are not run again
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import ROOT, append_row, surroundings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import axolotl_loram.heterogeneous  # noqa: F401  (to load pruned models)

ROWS = Path(__file__).with_suffix(".csv")
STEPS, BATCH, RATE, LENGTH, TRAINED_ROWS, HELD_OUT = 40, 4, 1e-3, 512, 640, 40
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
END = "<|im_end|>"
PARTS = ("text", "end", "line_break")
"""Of an answer: its text, END, and what the template writes after it."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: What its row says is different.
        trainer: "axolotl" or "loop".
        model: "base" or "pruned".
        settings: Axolotl's, other than the common ones.
        start: Whether it starts with the common LoRA weights.
        batches: For a loop: the Axolotl run whose batches it takes; none: its own.
        labels: For a loop: which PARTS of the answers it trains on; none: as Axolotl did.
        schedule: For a loop: transformers' name, and warmup steps.
        dtype: For a loop: of the frozen weights, under autocast unless it is float32.
        by_sample: For a loop: a step's loss is the mean over samples, not over tokens.
        compared: The run whose adapter it is held against.
    """

    name: str
    trainer: str = "loop"
    model: str = "base"
    settings: dict[str, Any] = field(default_factory=dict)
    start: bool = True
    batches: str = ""
    labels: tuple[str, ...] = ()
    schedule: tuple[str, int] = ("constant", 0)
    dtype: str = "float32"
    by_sample: bool = False
    compared: str = ""


def runs() -> Iterator[Run]:
    """In an order in which each finds what it needs."""
    own, mended = "axolotl", f"axolotl, eot_tokens: [{END}]"
    eot = {"eot_tokens": [END]}
    yield Run(own, "axolotl")
    yield Run("loop, Axolotl's batches and labels", batches=own, compared=own)
    full = Run("loop, Axolotl's batches, whole answers", batches=own, labels=PARTS)
    yield full
    yield Run(mended, "axolotl", settings=eot)
    few = Run("loop, whole answers, bfloat16", batches=own, labels=PARTS, dtype="bfloat16")
    yield replace(few, compared=full.name)
    for name, change in {
        "own batches": {"batches": ""},
        "own start": {"start": False},
        "mean over samples": {"by_sample": True},
        "cosine, 2 warmup steps": {"schedule": ("cosine", 2)},
    }.items():
        yield replace(few, name=f"{few.name}, {name}", compared=few.name, **change)
    pruned = {"model": "pruned"}
    yield Run(own, "axolotl", **pruned)
    yield Run("loop, Axolotl's batches and labels", batches=own, compared=own, **pruned)
    yield Run(mended, "axolotl", settings=eot, **pruned)


class Bench:
    """Files of a scratch folder, made when they are asked for.

    Args:
        model: Folder of a chat model whose template ends a turn with END and a line break.
        gsm8k: Folder with train.jsonl and test.jsonl.
        scratch: Where everything goes.
    """

    def __init__(self, model: Path, gsm8k: Path, scratch: Path):
        self.base, self.gsm8k, self.scratch = model.resolve(), gsm8k, scratch.resolve()
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.end = self.tokenizer.convert_tokens_to_ids(END)

    def data(self) -> Path:
        """The training rows in the shape that `type: chat_template` reads."""
        file = self.scratch / "train.jsonl"
        lines = [json.dumps({"messages": row}) for row in self.rows("train", TRAINED_ROWS)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    def rows(self, split: str, limit: int) -> list[list[dict[str, str]]]:
        """Question and answer as messages, without the calculator's marks."""
        lines = (self.gsm8k / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines[:limit]]
        return [
            [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": re.sub(r"<<.*?>>", "", row["answer"])},
            ]
            for row in read
        ]

    def encoded(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """Token ids of a conversation, and how many of them are before the answer."""
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = self.tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=False
        )
        ids, before = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, prompt)
        )
        assert ids[: len(before)] == before and ids[-2] == self.end, "the template has another end"
        return ids, len(before)

    def model(self, kind: str, **settings) -> Any:
        """The base or the pruned model, in float32 if nothing else is said."""
        folder = self.base if kind == "base" else self.pruned()
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})

    def pruned(self) -> Path:
        """Half of each inner layer, by `activation`, with the refit, on 8,192 training tokens."""
        folder, file = self.scratch / "pruned", self.scratch / "calibration.yml"
        if not folder.exists():
            file.write_text(yaml.safe_dump(self.settings("calibration")), encoding="utf-8")
            amount = ["--calibration-samples", "32", "--calibration-length", "256"]
            how = ["--method", "activation", "--pruning-ratio", "0.5", "--calibration", str(file)]
            self.command("axolotl-loram", "prune", str(self.base), str(folder), *how, *amount)
        return folder

    def start(self, kind: str) -> Path:
        """An adapter that was not trained."""
        folder = self.scratch / f"start-{kind}"
        if not folder.exists():
            self.fresh(self.model(kind), 0).save_pretrained(folder)
        return folder

    def fresh(self, model: Any, seed: int, **settings) -> PeftModel:
        """New LoRA weights in all linear layers, with PEFT's further settings."""
        torch.manual_seed(seed)
        how = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **LORA, **settings}
        return get_peft_model(model, LoraConfig(**how))

    def settings(self, name: str) -> dict[str, Any]:
        """What all of Axolotl's runs have in common."""
        return {
            "base_model": str(self.base),
            "datasets": [{"path": str(self.data()), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": str(self.scratch / "prepared"),
            "dataset_num_proc": 1,
            "output_dir": str(self.scratch / name),
            "adapter": "lora",
            **{f"lora_{key.removeprefix('lora_')}": value for key, value in LORA.items()},
            "lora_target_linear": True,
            **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")},
            "sequence_len": LENGTH,
            "micro_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "optimizer": "adamw_torch",
            "learning_rate": RATE,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            **dict.fromkeys(("bf16", "fp16", "tf32", "sample_packing"), False),
            "attn_implementation": "sdpa",
            "save_strategy": "no",
            "seed": 42,
        }

    def command(self, *command: str, **environment: str) -> None:
        """Run one of the console scripts."""
        paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
        everything = {**os.environ, **quiet, **environment, "PYTHONPATH": paths}
        program = str(Path(sys.executable).with_name(command[0]))
        done = subprocess.run(
            [program, *command[1:]], env=everything, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stdout[-2000:]}{done.stderr[-4000:]}")


def folder_of(bench: Bench, model: str, name: str) -> Path:
    """Where a run's files are."""
    return bench.scratch / (re.sub(r"\W+", "-", name).strip("-") + f"-{model}")


def adapter_of(bench: Bench, model: str, name: str) -> Path:
    """A run's adapter as trained, with Axolotl's batches; LoRAM has it in a folder inside."""
    folder = folder_of(bench, model, name)
    return next(folder.rglob("batches.pt"), folder / "adapter").parent


def trained_by_axolotl(bench: Bench, run: Run) -> Path:
    """A run of the command, with the plugin only where it is needed: on the pruned model."""
    folder = folder_of(bench, run.model, run.name)
    loram = {"loram": {"pruned_model_path": str(bench.pruned())}} if run.model == "pruned" else {}
    plugins = ["axolotl_loram.LoRAMPlugin"] * bool(loram) + ["recorder.RecorderPlugin"]
    settings = {**bench.settings(folder.name), "plugins": plugins, **loram, **run.settings}
    file = bench.scratch / f"{folder.name}.yml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    start = {"RECORDER_START": str(bench.start(run.model))} if run.start else {}
    bench.command("axolotl", "train", str(file), "--launcher", "python", **start)
    return adapter_of(bench, run.model, run.name)


def trained_by_loop(bench: Bench, run: Run) -> Path:
    """The plain loop: what everybody writes."""
    model = bench.model(run.model, dtype=getattr(torch, run.dtype), attn_implementation="sdpa")
    if run.start:
        model = PeftModel.from_pretrained(model, bench.start(run.model), is_trainable=True)
    else:
        model = bench.fresh(model, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    name, warmup = run.schedule
    schedule = get_scheduler(name, optimizer, warmup, STEPS)
    model.train()
    for batch in batches_of(bench, run):
        loss_of(model, batch, run).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    folder = folder_of(bench, run.model, run.name)
    model.save_pretrained(folder)
    return folder


def loss_of(model: Any, batch: dict[str, torch.Tensor], run: Run) -> torch.Tensor:
    """Mean over a step's labelled tokens, or over its samples' means."""
    with torch.autocast("cpu", torch.bfloat16, enabled=run.dtype != "float32"):
        if not run.by_sample:
            return model(**batch).loss
        rows = [{name: value[[i]] for name, value in batch.items()} for i in range(BATCH)]
        return sum(model(**row).loss for row in rows) / BATCH


def batches_of(bench: Bench, run: Run) -> Iterable[dict[str, torch.Tensor]]:
    """The loop's own batches (the first rows, in order), or Axolotl's with other labels."""
    if not run.batches:
        rows = [bench.encoded(row) for row in bench.rows("train", STEPS * BATCH)]
        return [padded(bench, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    batches = torch.load(adapter_of(bench, run.model, run.batches) / "batches.pt")
    return [relabelled(bench, batch, run.labels) for batch in batches] if run.labels else batches


def padded(bench: Bench, rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """Rows of one length, labelled from the answer on, END and line break included."""
    length = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), bench.end),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
    }
    for i, (ids, before) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, before : len(ids)] = torch.tensor(ids[before:])
    return batch


def relabelled(
    bench: Bench, batch: dict[str, torch.Tensor], parts: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The same tokens, labelled up to the last of the parts."""
    labels = batch["labels"].clone()
    for ids, seen, row in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True):
        first, stop = int((row != -100).nonzero()[0]), int(seen.sum()) - len(PARTS) + len(parts)
        assert ids[int(seen.sum()) - 2] == bench.end, "the row was cut"
        row[first:stop] = ids[first:stop]
    return {**batch, "labels": labels}


@torch.no_grad()
def measured(bench: Bench, model: Any) -> dict[str, float]:
    """Perplexity of the held-out answers, whole and their text alone; nats of each END."""
    nats, tokens = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
    model.eval()
    for messages in bench.rows("test", HELD_OUT):
        ids, before = bench.encoded(messages)
        logs = model(input_ids=torch.tensor([ids])).logits[0, before - 1 : -1].float()
        lost = -logs.log_softmax(-1).gather(1, torch.tensor(ids[before:])[:, None])[:, 0]
        for part, some in zip(PARTS, (lost[:-2], lost[-2:-1], lost[-1:]), strict=True):
            nats[part] += some.double().sum().item()
            tokens[part] += len(some)
    return {
        "perplexity": round(math.exp(sum(nats.values()) / sum(tokens.values())), 4),
        "text_perplexity": round(math.exp(nats["text"] / tokens["text"]), 4),
        "nats_of_end": round(nats["end"] / tokens["end"], 4),
        "nats_of_line_break": round(nats["line_break"] / tokens["line_break"], 4),
    }


def labelled(batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """How many tokens have a label."""
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


def difference(one: Path, other: Path) -> float:
    """The largest between two adapters' weights."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys(), "other modules have LoRA"
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def recovered(bench: Bench, adapter: Path) -> Path:
    """The adapter for the base."""
    target = adapter.parent / f"{adapter.name}-recovered"
    bench.command("axolotl-loram", "recover", str(adapter), "--output", str(target), "--overwrite")
    return target


def row_of(bench: Bench, run: Run) -> dict[str, object]:
    """Train and measure."""
    begun = time.perf_counter()
    adapter = {"axolotl": trained_by_axolotl, "loop": trained_by_loop}[run.trainer](bench, run)
    seconds, gap = time.perf_counter() - begun, ""
    kept = adapter / "batches.pt"
    seen = torch.load(kept) if kept.exists() else batches_of(bench, run)
    if run.compared:
        gap = f"{difference(adapter, adapter_of(bench, run.model, run.compared)):.2g}"
    found = measured(bench, PeftModel.from_pretrained(bench.model(run.model), adapter))
    if run.model == "pruned":
        whole = PeftModel.from_pretrained(bench.model("base"), recovered(bench, adapter))
        found |= {f"recovered_{name}": value for name, value in measured(bench, whole).items()}
    told = {"labels": labelled(seen), "compared": run.compared, "difference": gap}
    return {**told, **found, "seconds": round(seconds)}


def add(bench: Bench, run: Run, found: dict[str, object]) -> None:
    """A row with the same columns for all."""
    names = ("perplexity", "text_perplexity", "nats_of_end", "nats_of_line_break")
    columns = ("labels", "compared", "difference", *names, *(f"recovered_{n}" for n in names))
    row = {"model": run.model, "run": run.name, "eos_token": bench.tokenizer.eos_token}
    row |= {name: found.get(name, "") for name in (*columns, "seconds")}
    append_row(ROWS, {**row, **surroundings("transformers", "peft", "axolotl", "accelerate")})
    print({name: value for name, value in row.items() if value != ""}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build/plain_loop")
    parser.add_argument("--only", default="", help="runs whose name and model have this regex")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, options.gsm8k, options.scratch)
    lines = csv.DictReader(ROWS.open(encoding="utf-8")) if ROWS.exists() else []
    there = {(line["model"], line["run"]) for line in lines}
    for run in (Run("untrained"), Run("untrained", model="pruned"), *runs()):
        if (run.model, run.name) in there or not re.search(options.only, f"{run.model} {run.name}"):
            continue
        if run.name == "untrained":
            add(bench, run, dict(measured(bench, bench.model(run.model))))
        else:
            add(bench, run, row_of(bench, run))


if __name__ == "__main__":
    main()
