"""Expert pruning: LoRA trained on a mixture that lost experts, served on the whole one.

The base is a small Mixtral (8 layers of 8 experts, 2 for each token), trained on the toy base's
text as the toy base is. For each criterion × ratio × seed: remove experts (of all but the
first and last two layers), train the same LoRA on attention and experts, recover it, measure the
base with it.
Perplexities are of held-out docstrings (task) and of held-out source (text).

    python benchmarks/experts.py    # rows that experts.csv has already are not run again
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import time
from pathlib import Path

import criteria  # the same LoRA, data and measure as for the dense base
import torch
from criteria import BUILD, LENGTH, base, data, load, perplexities, train
from measure import append_row, surroundings
from peft import PeftModel
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging as transformers_logging

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.counts import summary
from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import recover

MIXTURE = BUILD / "mixture"
ROWS = Path(__file__).with_suffix(".csv")
CASES = [
    {"method": method, "units": units, "ratio": ratio, "seed": seed}
    for seed in (0, 1)
    for units, ratio, methods in (
        ("experts", 0.5, ("random", "magnitude", "activation", "taylor")),
        ("experts", 0.75, ("random", "activation", "taylor")),
        ("expert_neurons", 0.5, ("random", "magnitude")),
    )
    for method in methods
]
LORA = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
NAMES = ("method", "units", "ratio", "seed")


def build(steps: int) -> None:
    """Train the mixture once."""
    if MIXTURE.exists():
        return
    dense = AutoTokenizer.from_pretrained(BUILD / "base")
    settings = base.Settings(steps=steps, layers=8)
    torch.manual_seed(settings.seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(dense),
            hidden_size=settings.hidden,
            intermediate_size=128,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            num_local_experts=8,
            num_experts_per_tok=2,
            output_router_logits=True,  # the balancing loss, while the base is trained
            max_position_embeddings=512,
            pad_token_id=dense.pad_token_id,
        )
    )
    rows = (BUILD / "data/pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [base.json.loads(row)["text"] for row in rows]
    base.train_model(model, base._token_stream(texts, dense), settings)
    model.config.output_router_logits = False
    partial = MIXTURE.with_name("mixture.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    dense.save_pretrained(partial)
    partial.rename(MIXTURE)


def run(case: dict, tokenizer, steps: int) -> dict[str, object]:
    """One row."""
    settings = PruningArgs(
        method=case["method"],
        units=case["units"],
        ratio=case["ratio"],
        seed=case["seed"],
        refit=False,
        calibration_path=str(BUILD / "data/pretrain.jsonl"),
        calibration_samples=128,
        calibration_length=LENGTH,
    )
    with tempfile.TemporaryDirectory() as scratch:
        pruned, adapter = Path(scratch, "pruned"), Path(scratch, "adapter")
        start = time.perf_counter()
        counted = prune(str(MIXTURE), pruned, settings)["parameters"]
        took = time.perf_counter() - start
        figures = perplexities(load(pruned), tokenizer, "pruned")
        trained = train(load(pruned), tokenizer, case["seed"], steps, **LORA)
        figures |= perplexities(trained, tokenizer, "pruned_lora")
        trained.save_pretrained(adapter)
        served = PeftModel.from_pretrained(load(MIXTURE), recover(adapter, str(pruned))["output"])
        figures |= perplexities(served.eval(), tokenizer, "recovered")
    parameters = {name: counted[name] for name in ("base_parameters", "pruned_parameters")}
    return {**parameters, **figures, "prune_seconds": round(took, 2)}


def reference(seed: int, tokenizer, steps: int) -> dict[str, object]:
    """The mixture itself, and plain LoRA on it, in the columns of a row."""
    figures = perplexities(load(MIXTURE), tokenizer, "pruned")
    model = train(load(MIXTURE), tokenizer, seed, steps, **LORA)
    figures |= perplexities(model, tokenizer, "pruned_lora")
    figures |= {
        name.replace("pruned_lora", "recovered"): v for name, v in figures.items() if "lora" in name
    }
    config = load_config(str(MIXTURE))
    size = summary(config, {})["base_parameters"]
    return {"base_parameters": size, "pruned_parameters": size, **figures, "prune_seconds": 0}


def key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in NAMES)


def rows() -> list[dict]:
    return list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=criteria.STEPS, help="LoRA steps")
    parser.add_argument("--limit", type=int, help="run at most so many rows")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    data.build(BUILD / "data")
    base.build(BUILD / "data/pretrain.jsonl", BUILD / "base")
    build(options.base_steps)
    tokenizer = AutoTokenizer.from_pretrained(MIXTURE)
    plain = [dict(zip(NAMES, ("none (plain LoRA)", "", 0, seed), strict=True)) for seed in (0, 1)]
    todo = [*plain[:1], *CASES[: len(CASES) // 2], *plain[1:], *CASES[len(CASES) // 2 :]]
    for number, case in enumerate(todo[: options.limit], start=1):
        if key(case) in {key(row) for row in rows()}:
            continue
        start = time.perf_counter()
        measured = run if case["ratio"] else lambda c, t, s: reference(c["seed"], t, s)
        row = {**case, "base_steps": options.base_steps, "lora_steps": options.steps}
        append_row(ROWS, {**row, **measured(case, tokenizer, options.steps), **surroundings()})
        print(
            f"{number}/{len(todo)} {key(case)}: {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
