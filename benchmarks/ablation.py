"""What of LoRAM matters: one factor at a time around a recipe, on the toy base.

The recipe: units by `activation`, scored and refitted on the fine-tuning text, 100 steps of
alignment by distillation from the base on its own pre-training text, the same LoRA as everywhere,
and recovery that fits B on the fine-tuning text. Beside it: LoRA on the base, LoRA on a small model
of the pruned size (trained from scratch as the base was), and each factor changed alone. Every
trained adapter is measured on the pruned model ("none": without recovery) and recovered in several
ways on the base. Perplexities are of held-out docstrings (task) and held-out source (text);
`choice` is the share of held-out functions whose docstring has less loss per byte than each of
three pieces of code of its length, by lm-eval: 0.25 is chance. (Docstrings of other functions, or
with a word of another, no model of this size tells apart, LoRA or not.)

    python benchmarks/ablation.py            # rows that ablation.csv has already are not run again
    python benchmarks/ablation.py --summary  # table and plot from the rows
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from measure import append_row, surroundings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import toy_base as base
import toy_data as data
from ablation_cases import ROWS, Case, cases, key, plot, recoveries, rows, show, summarize
from criteria import BUILD, LENGTH, STEPS, load, perplexities, train
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from axolotl_loram.config import FillArgs, PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.fitted import recover_fitted
from axolotl_loram.recovery.recover import recover
from axolotl_loram.text.calibration import load_calibration

MADE = BUILD.parent / "ablation"
MAIN = (*cases()[:3], cases()[6])
"""Those of which the choice is measured, with any seed."""
FILES = {"fine-tuning": BUILD / "data/train.jsonl", "pre-training": BUILD / "data/pretrain.jsonl"}
CHOICES, CHOICE_ROWS = 4, 200
TASK = """task: docstring_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""


def model_of(case: Case) -> Path:
    """The folder of the model that a case trains on, made if need be."""
    if case.model == "base":
        return BUILD / "base"
    if case.model == "small":
        folder = MADE / "small"
        base.build(FILES["pre-training"], folder, base.Settings(layers=7))
        tokenizers = [(model / "tokenizer.json").read_bytes() for model in (folder, BUILD / "base")]
        assert tokenizers[0] == tokenizers[1], "perplexities would not compare"
        return folder
    folder = MADE / replace(case, four_bit=False).name
    if not folder.exists():
        pruned = MADE / replace(case, four_bit=False, align="none", align_on="", align_steps=0).name
        if not pruned.exists():
            prune(str(BUILD / "base"), pruned, pruning(case))
        if case.align != "none":
            align(pruned, folder, case)
    return folder


def pruning(case: Case) -> PruningArgs:
    """How a case prunes."""
    return PruningArgs(
        method=case.method,
        ratio=case.ratio,
        refit=case.refit,
        seed=case.seed,
        calibration_path=str(FILES[case.calibration]) if case.calibration else None,
        calibration_samples=128,
        calibration_length=LENGTH,
    )


def align(pruned: Path, folder: Path, case: Case) -> None:
    """Train all of a pruned model but its lm_head: towards the base's outputs, or the text."""
    steps, batch, rate = case.align_steps, 8, 1e-3
    settings = PruningArgs(
        ratio=0.5,
        seed=case.seed,
        calibration_path=str(FILES[case.align_on]),
        calibration_samples=steps * batch,
        calibration_length=LENGTH,
    )
    tokens = torch.from_numpy(load_calibration(settings, BUILD / "base").tokens)
    teacher, model = load(BUILD / "base").eval(), load(pruned).train()
    model.lm_head.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        texts = tokens[torch.arange(step * batch, (step + 1) * batch) % len(tokens)]
        output = model(input_ids=texts, labels=texts)
        loss = output.loss
        if case.align == "distillation":
            with torch.no_grad():
                wanted = teacher(input_ids=texts).logits.log_softmax(-1)
            found = output.logits.log_softmax(-1)
            loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.copytree(pruned, partial, ignore=shutil.ignore_patterns("adapter*"), dirs_exist_ok=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def adapter_of(case: Case, tokenizer, steps: int) -> Path:
    """The trained adapter of a case, made if need be."""
    folder = MADE / f"adapter-{case.name}"
    if not folder.exists():
        settings = {}
        if case.four_bit:
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
        model = AutoModelForCausalLM.from_pretrained(model_of(case), **settings)
        train(model, tokenizer, case.seed, steps).save_pretrained(folder)
    return folder


def measured(case: Case, recovery: str, tokenizer, steps: int) -> dict[str, object]:
    """The figures of one adapter, recovered in one way."""
    adapter, start = adapter_of(case, tokenizer, steps), time.perf_counter()
    if recovery == "none":
        model, target = load(model_of(case)), adapter
    else:
        model, target = load(BUILD / "base"), MADE / f"recovered-{case.name}"
        fill, _, scale = recovery.partition(" × ")
        if fill == "zeros":
            recover(adapter, str(model_of(case)), target, overwrite=True)
        else:
            recover_fitted(adapter, fitting(case), str(model_of(case)), target, True)
    seconds = time.perf_counter() - start
    model = PeftModel.from_pretrained(model, target)
    if " × " in recovery:
        scale_lora(model, float(scale))
    found: dict[str, object] = dict(perplexities(model, tokenizer, "after"))
    told = case.model != "pruned" or (
        recovery in ("none", "zeros", "fitted") and replace(case, seed=0) in MAIN
    )
    found["choice"] = choice(model, tokenizer) if told else ""
    return {**found, "recovery_seconds": round(seconds, 2)}


def fitting(case: Case) -> FillArgs:
    """How B is fitted."""
    samples = {"calibration_samples": 16, "calibration_length": LENGTH}
    text = str(FILES["fine-tuning"])
    return FillArgs(fill="fitted", seed=case.seed, calibration_path=text, **samples)


def scale_lora(model, scale: float) -> None:
    """Multiply every update."""
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: s * scale for name, s in module.scaling.items()}


def choice(model, tokenizer) -> float:
    """Share of held-out functions whose docstring has the least loss per byte of the choices."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32, max_length=512)
    tasks = TaskManager(include_path=str(choice_task().parent), include_defaults=False)
    found = simple_evaluate(lm, tasks=["docstring_choice"], task_manager=tasks, bootstrap_iters=0)
    return round(found["results"]["docstring_choice"]["acc_norm,none"], 4)


def choice_task() -> Path:
    """The YAML of the task, and its rows beside it."""
    file, yaml = MADE / "choice/rows.jsonl", MADE / "choice/docstring_choice.yaml"
    lines = (BUILD / "data/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [[part["text"] for part in json.loads(line)["segments"]] for line in lines]
    drawn = random.Random(0)
    rows = []
    for prompt, right in drawn.sample(pairs, CHOICE_ROWS):
        options = [right]
        while len(options) < CHOICES:
            code = drawn.choice(pairs)[0]
            start = drawn.randrange(max(1, len(code) - len(right)))
            piece = code[start : start + len(right)]
            options += [piece] if piece not in options else []
        drawn.shuffle(options)
        rows.append({"prompt": prompt, "choices": options, "answer": options.index(right)})
    yaml.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yaml.write_text(TASK.format(file=file), encoding="utf-8")
    return yaml


def untuned(case: Case, tokenizer) -> dict[str, object]:
    """What the model of a case is before LoRA."""
    model = load(model_of(case))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = perplexities(model, tokenizer, "before")
    chosen = choice(model, tokenizer) if case.model != "pruned" and case.seed == 0 else ""
    return {"parameters": parameters, **before, "choice_before": chosen}


def execute(case: Case, tokenizer, steps: int) -> None:
    """The rows of a case that are not there yet."""
    there = {key(row) for row in rows()}
    todo = [how for how in recoveries(case) if key({**asdict(case), "recovery": how}) not in there]
    before = untuned(case, tokenizer) if todo else {}
    for recovery in todo:
        start = time.perf_counter()
        found = measured(case, recovery, tokenizer, steps)
        row = {**asdict(case), "recovery": recovery, "lora_steps": steps, **before, **found}
        append_row(ROWS, {**row, **surroundings("transformers", "peft", "lm_eval")})
        print(f"{case.name} {recovery}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="only the table and the plot")
    parser.add_argument("--steps", type=int, default=STEPS, help="LoRA steps")
    parser.add_argument("--limit", type=int, help="run at most so many cases")
    options = parser.parse_args()
    if not options.summary:
        torch.set_num_threads(1)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        data.build(BUILD / "data")
        base.build(BUILD / "data/pretrain.jsonl", BUILD / "base")
        MADE.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(BUILD / "base")
        for case in cases()[: options.limit]:
            execute(case, tokenizer, options.steps)
    table = summarize()
    show(table)
    plot(table, ROWS.with_suffix(".png"))


if __name__ == "__main__":
    main()
