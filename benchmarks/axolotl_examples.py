"""Plans every LoRA and QLoRA example of a checkout of Axolotl, and counts what is answered.

    python benchmarks/axolotl_examples.py PATH/TO/axolotl

Each example is planned as it is and pruned by half (`axolotl-loram plan YAML [--pruning-ratio
0.5]`), with nothing changed but its base_model: a config.json of the family that the hub's name
stands for, at the sizes that transformers' config class has by default. Writes
benchmarks/axolotl_examples.csv: one row an example, "answered" or the sentence of the refusal.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.planner import plan
from axolotl_loram.memory.request import request

OUTPUT = Path(__file__).with_suffix(".csv")
FIELDS = ("example", "adapter", "family", "declared", "plain", "pruned", "not_counted")
NAMES = (
    ("llama-3.2-11b-vision", "mllama"),
    ("llama-4", "llama4"),
    (r"llama|yi-34b", "llama"),
    (r"cogito-v1-preview-qwen|qwen2-7b|deepcoder", "qwen2"),
    (r"qwen2\.5-vl", "qwen2_5_vl"),
    (r"qwen2-vl", "qwen2_vl"),
    (r"qwen3-next", "qwen3_next"),
    (r"qwen3\.5-.*a\d+b", "qwen3_5_moe"),
    (r"qwen3\.5", "qwen3_5"),
    (r"qwen3-.*a3b", "qwen3_moe"),
    (r"qwen3|plano", "qwen3"),
    (r"mimo", "mimo"),
    (r"qwen1\.5-moe", "qwen2_moe"),
    (r"qwen-7b", "qwen"),
    (r"mixtral", "mixtral"),
    (r"ministral-3-", "mistral3"),
    (r"mistral-small-3\.1|mistral-small-4|mistral-medium|magistral-small-2509", "mistral3"),
    (r"pixtral|llava", "llava"),
    (r"mistral-7b|ministral-8b|magistral|devstral", "mistral"),
    (r"voxtral", "voxtral"),
    (r"gemma-4", "gemma4"),
    (r"gemma-3n", "gemma3n"),
    (r"gemma-3-(1b|270m)", "gemma3_text"),
    (r"gemma-3", "gemma3"),
    (r"gemma-2", "gemma2"),
    (r"gemma", "gemma"),
    (r"phi-3", "phi3"),
    (r"phi-1", "phi"),
    (r"pythia", "gpt_neox"),
    (r"starcoder2", "starcoder2"),
    (r"command-r7b", "cohere2"),
    (r"olmo-3", "olmo3"),
    (r"gpt-oss", "gpt_oss"),
    (r"seed-oss", "seed_oss"),
    (r"deepseek-v4", "deepseek_v4"),
    (r"deepseek-v2", "deepseek_v2"),
    (r"glm-4-32b", "glm4"),
    (r"glm-4\.7-flash", "glm4_moe_lite"),
    (r"glm-4\.6v", "glm4v"),
    (r"glm-4\.5", "glm4_moe"),
    (r"glm-5", "glm_moe_dsa"),
    (r"falcon-h1", "falcon_h1"),
    (r"falcon", "falcon"),
    (r"jamba", "jamba"),
    (r"nemotron-3", "nemotron_h"),
    (r"nemotron", "nemotron"),
    (r"lfm2-8b", "lfm2_moe"),
    (r"lfm2-vl", "lfm2_vl"),
    (r"apertus", "apertus"),
    (r"afm-4", "arcee"),
    (r"trinity", "afmoe"),
    (r"cerebras-gpt", "gpt2"),
    (r"gpt-j", "gptj"),
    (r"replit", "mpt"),
    (r"stablelm", "stablelm"),
    (r"xgen", "llama"),
    (r"dbrx", "dbrx"),
    (r"hunyuan", "hunyuan_v1_dense"),
    (r"internvl", "internvl"),
    (r"kimi-linear", "kimi_linear"),
    (r"minimax-m2", "minimax_m2"),
    (r"paddleocr", "paddleocr_vl"),
    (r"smolvlm", "smolvlm"),
)
"""What a name on the hub, in small letters, matches → the family of its config.json; first wins."""


def family_of_name(name: str) -> str:
    """The model type of a model on the hub."""
    return next((family for part, family in NAMES if re.search(part, name.lower())), "unknown")


def config_of(family: str) -> dict[str, Any]:
    """A config at the family's default sizes; of one that transformers lacks, its name alone."""
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.for_model(family).to_dict())
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"model_type": family}


def examples(checkout: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """YAMLs that train LoRA or QLoRA."""
    for file in sorted(checkout.glob("examples/**/*.y*ml")):
        cfg = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(cfg, dict) and cfg.get("adapter") in ("lora", "qlora"):
            yield file, cfg


def planned(file: Path, options: dict[str, Any]) -> tuple[str, list[str]]:
    """Whether it is "answered", or the refusal; and what is named as not counted."""
    try:
        return "answered", list(plan(request(str(file), options=options)).get("not_counted", ()))
    except LoRAMError as error:
        return str(error), []


def rows(checkout: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """One row an example."""
    for file, cfg in examples(checkout):
        family = family_of_name(str(cfg["base_model"]))
        model = folder / family
        if not model.exists():
            model.mkdir()
            (model / "config.json").write_text(json.dumps(config_of(family), default=str))
        copy = folder / "example.yml"
        copy.write_text(
            yaml.safe_dump({**cfg, "base_model": str(model), "revision_of_model": None})
        )
        plain, missing = planned(copy, {})
        pruned, _ = planned(copy, {"ratio": 0.5})
        name = str(file.relative_to(checkout))
        said = (plain, pruned, "; ".join(missing))
        yield dict(
            zip(FIELDS, (name, cfg["adapter"], family, family in FAMILIES, *said), strict=True)
        )


def main(checkout: Path) -> None:
    """Write the table, and print what it comes to."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(checkout, Path(folder)))
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(found)
    print(f"{len(found)} examples")
    for way in ("plain", "pruned"):
        counts = Counter(
            "answered"
            if row[way] == "answered"
            else "refused"
            if row["declared"]
            else "family not declared"
            for row in found
        )
        print(way, dict(counts))
    for row in found:
        if row["declared"] and (row["plain"], row["pruned"]) != ("answered", "answered"):
            print(row["example"], row["family"], row["plain"], row["pruned"], sep=" | ")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
