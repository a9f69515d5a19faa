"""Writes the YAMLs of the paper's Tables 1 to 3, 7 and 8 (arXiv 2502.13533), one for each run.

    python tables.py OUT [--table 1 …] [--rates 1e-4 3e-4 1e-3] [--aligned 1600]

Every table has what its reviewers asked for beside LoRAM: LoRA on the same model, and on the small
one that the pruned one replaces, each at every learning rate. What the paper does not give is said
in README.md beside this file; nothing of it was run here, for want of such GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HUB = {
    "2-7b": "meta-llama/Llama-2-7b-hf",
    "2-13b": "meta-llama/Llama-2-13b-hf",
    "2-70b": "meta-llama/Llama-2-70b-hf",
    "3.1-8b": "meta-llama/Llama-3.1-8B",
    "3.1-70b": "meta-llama/Llama-3.1-70B",
}
RAND, STRU = {"method": "random"}, {"method": "taylor"}
SEMI = {"method": "sparsegpt", "sparsity": "4:8"}
UNST = {"method": "sparsegpt", "sparsity": 0.55}
OURS = {"method": "activation"}
OPENHERMES = {"path": "teknium/OpenHermes-2.5", "type": "chat_template"}
OPENHERMES |= {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}
GSM8K = {
    "path": "openai/gsm8k",
    "name": "main",
    "split": "train",
    "type": {
        "field_instruction": "question",
        "field_output": "answer",
        "format": "{instruction}\n",
    },
}
SEVEN = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
RATES = (1e-4, 3e-4, 1e-3)
ALIGNED = (100, 200, 400, 800, 1600)


@dataclass(frozen=True)
class Row:
    """One run of a table: LoRA where `pruning` is empty."""

    table: str
    name: str
    base: str
    pruning: dict[str, Any] = field(default_factory=dict)
    four_bit: bool = False
    data: dict[str, Any] = field(default_factory=lambda: OPENHERMES)
    cost: bool = False


ROWS = [
    *(Row("1", f"lora-{size}", size) for size in ("2-13b", "2-7b")),
    Row("1", "rand", "2-13b", {**RAND, "ratio": 0.65}),
    Row("1", "stru", "2-13b", {**STRU, "ratio": 0.65}),
    Row("1", "semi", "2-13b", SEMI),
    Row("1", "unst", "2-13b", UNST),
    Row("1", "ours", "2-13b", {**OURS, "ratio": 0.65}),
    *(
        row
        for table in ("2", "3")
        for row in (
            Row(table, "lora-2-13b", "2-13b"),
            Row(table, "qlora-2-70b", "2-70b", four_bit=True),
            *(
                Row(table, f"q{name}-{ratio}", "2-70b", {**how, "ratio": ratio}, four_bit=True)
                for name, how in (("rand", RAND), ("stru", STRU), ("ours", OURS))
                for ratio in (0.65, 0.75, 0.85, 0.95)
            ),
        )
    ),
    *(
        row
        for name, data in (("gsm8k", GSM8K), ("openhermes", OPENHERMES))
        for row in (
            Row("7", f"lora-3.1-8b-{name}", "3.1-8b", data=data),
            Row("7", f"qlora-3.1-70b-{name}", "3.1-70b", four_bit=True, data=data),
            Row("7", f"qstru-{name}", "3.1-70b", {**STRU, "ratio": 0.85}, True, data),
            Row("7", f"qours-{name}", "3.1-70b", {**OURS, "ratio": 0.85}, True, data),
        )
    ),
    *(Row("8", f"lora-{size}", size, cost=True) for size in ("2-13b", "2-7b")),
    Row("8", "stru", "2-13b", {**STRU, "ratio": 0.65}, cost=True),
]


def pruned_name(row: Row) -> str:
    """What `axolotl-loram prune` is to write for a row, to be aligned: base, criterion, ratio."""
    return f"{row.base}-{row.pruning['method']}-{row.pruning['ratio']}"


def settings(row: Row, rate: float, aligned: int | None) -> dict[str, Any]:
    """The Axolotl settings of a run: rank 8, 128 sequences of 512 tokens a step, 400 steps."""
    name = f"table{row.table}-{row.name}-{rate:g}"
    kind = ("q" if row.four_bit else "") + ("loram" if row.pruning else "lora")
    pruning = {**row.pruning, **({"quantize": "nf4"} if row.four_bit else {})}
    section: dict[str, Any] = {"pruning": pruning}
    if aligned and "ratio" in pruning:
        section = {"pruned_model_path": f"out/aligned-{pruned_name(row)}-{aligned}"}
    plugin = {"plugins": ["axolotl_loram.LoRAMPlugin"], "loram": section}
    samples = {"split": "train[:1024]"} if row.cost else {}
    return {
        "base_model": HUB[row.base],
        **(plugin if row.pruning else {}),
        "datasets": [{**row.data, **samples}],
        **({"chat_template": "alpaca"} if row.data is OPENHERMES else {}),
        "dataset_prepared_path": "prepared",
        "val_set_size": 0,
        "sequence_len": 512,
        "pad_to_sequence_len": True,
        "adapter": kind,
        **({"load_in_4bit": True} if row.four_bit else {}),
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_modules": SEVEN + (["lm_head"] if row.base.startswith("2-") else []),
        "output_dir": f"out/{name}",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 32,
        **({"num_epochs": 1} if row.cost else {"max_steps": 400}),
        "optimizer": "adamw_torch_fused",
        "learning_rate": rate,
        "lr_scheduler": "cosine",
        "logging_steps": 10,
        "bf16": True,
        "tf32": True,
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": not row.cost,
        "special_tokens": {
            "pad_token": "<unk>" if row.base.startswith("2-") else "<|finetune_right_pad_id|>"
        },
    }


def runs(
    tables: list[str], rates: list[float], aligned: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of each run and its settings; cost does not depend on the rate."""
    for row in ROWS:
        for rate in rates[:1] if row.cost else rates:
            if row.table in tables:
                yield f"table{row.table}-{row.name}-{rate:g}", settings(row, rate, aligned)


def alignments(tables: list[str], recipe: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of each alignment and its settings: ../publish/align.yml in 100 to 1,600 steps.

    At 13B, and of the 70B models at 0.85: what alignment costs.
    """
    for row in ROWS:
        if row.table in tables and row.pruning.get("ratio") == (
            0.65 if "13b" in row.base else 0.85
        ):
            for steps in ALIGNED:
                name = pruned_name(row)
                changes = {
                    "base_model": f"pruned-{name}",
                    "output_dir": f"out/aligned-{name}-{steps}",
                }
                yield f"align-{name}-{steps}", {**recipe, **changes, "max_steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write")
    tables = sorted({row.table for row in ROWS})
    parser.add_argument("--table", nargs="+", choices=tables, default=tables)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--aligned", type=int, choices=ALIGNED, help="train on aligned models")
    options = parser.parse_args()
    recipe = Path(__file__).resolve().parent.parent / "publish/align.yml"
    options.output.mkdir(parents=True, exist_ok=True)
    found = dict(runs(options.table, options.rates, options.aligned))
    found |= alignments(options.table, yaml.safe_load(recipe.read_text(encoding="utf-8")))
    for name, cfg in found.items():
        text = yaml.safe_dump(cfg, sort_keys=False)
        (options.output / f"{name}.yml").write_text(text, encoding="utf-8")
    print(f"{len(found)} files in {options.output}")


if __name__ == "__main__":
    main()
