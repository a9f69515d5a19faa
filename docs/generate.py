"""Writes what of docs/ and README follows from the code: `make docs`.

keys.md from the field descriptions of the schemas; the tables of families.md, gguf.md,
which-gpu.md, which-way.md, serving.md and README.md between their marks. tests/test_project.py
holds the files against `pages`.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from axolotl_loram.api import plan_memory
from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.model import parameter_count
from axolotl_loram.config import PROTECTED, FillArgs, PruningArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.config_shares import LAYERS
from axolotl_loram.memory.gpus import that_hold
from axolotl_loram.memory.predict import GIB, compare, pruned_config
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.tables import ways_markdown
from axolotl_loram.recovery.servers import RULES
from axolotl_loram.results.gguf import ARCHITECTURES, as_they_are, joint_thirds, rotary_pairs

DOCS = Path(__file__).resolve().parent
SCHEMAS = {
    "The `loram:` section": LoRAMConfig,
    "`loram: pruning:`, and the options of `axolotl-loram prune`": PruningArgs,
    "Options of `axolotl-loram recover`": FillArgs,
    "Settings of a run that `axolotl-loram plan` takes": TrainingArgs,
}
SIZES = {
    "llama-3.1-8b": "Llama 3.1 8B",
    "qwen2.5-32b": "Qwen2.5 32B",
    "llama-3.1-70b": "Llama 3.1 70B",
}
NAMES = {"lora": "LoRA", "qlora": "QLoRA", "loram": "LoRAM", "qloram": "QLoRAM"}
RATIOS = (0.5, 0.65, 0.75, 0.85)
END = "<!-- end -->"
INTRODUCTION = """# Keys

Made by `make docs` from the descriptions in `axolotl_loram/config*.py` and `memory/settings.py`.
A default that is empty depends on other settings; the text says how. On the command line `_` is
`-`, `ratio` is `--pruning-ratio`, and keys that end in `_path` lose that end."""


def kind_of(annotation: Any) -> str:
    """A type as people write it: `0.5`'s is number, a Literal's its values."""
    text = re.sub(
        r"typing\.|axolotl_loram\.\w+\.", "", str(getattr(annotation, "__name__", annotation))
    )
    if "Literal" in str(annotation):
        text = str(annotation)
        text = ", ".join(re.findall(r"'([^']+)'", text))
    for name, word in {
        "float": "number",
        "str": "text",
        "bool": "true or false",
        "int": "whole number",
    }.items():
        text = re.sub(rf"\b{name}\b", word, text)
    for name, word in {
        " | None": "",
        "dict[text, number]": "one for each kind",
        "tuple[text, ...] | text": "text",
    }.items():
        text = text.replace(name, word)
    return text.replace("<class '", "").replace("'>", "").replace(" | ", " or ")


def rows(schema: type[BaseModel]) -> Iterator[str]:
    """One row for each key that says what it is for."""
    for name, field in schema.model_fields.items():
        if field.description:
            default = field.default
            said = (
                "(needed)"
                if default is PydanticUndefined
                else ""
                if default is None
                else f"`{default}`"
            )
            said = said.replace("True", "true").replace("False", "false")
            kind = "the section below" if "PruningArgs" in str(field.annotation) else None
            text = field.description.replace("|", "\\|")
            yield f"| `{name}` | {kind or kind_of(field.annotation)} | {said} | {text} |"


def keys() -> str:
    """The whole of keys.md."""
    parts = [INTRODUCTION]
    for title, schema in SCHEMAS.items():
        table = "\n".join(
            ["| key | value | default | what it does |", "|---|---|---|---|", *rows(schema)]
        )
        parts += [f"## {title}", table]
    return "\n\n".join(parts) + "\n"


def gpus() -> str:
    """For each model and method: predicted peak, the smallest GPU that holds it."""
    lines = [
        "| model | trained as | whole layers removed: parameters | peak, GiB | smallest GPU "
        "| pruned inside layers: parameters | peak, GiB | smallest GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    settings = TrainingArgs(sequence_len=2048)
    for file, title in SIZES.items():
        config = load_config(str(DOCS / f"configs/{file}.json"))
        for ratio, method in itertools.product((0, *RATIOS), NAMES):
            if method.endswith("ram") != bool(ratio):
                continue
            said = f"{NAMES[method]} at {ratio}" if ratio else f"{NAMES[method]}, whole model"
            row = [title, said]
            for kinds in ((LAYERS,), None) if ratio else (None,):
                protected = (0, 0) if kinds else PROTECTED
                pruned = pruned_config(config, ratio, protected, kinds) if ratio else config
                peak = compare(config, pruned, settings, [method])[method].peak_bytes
                fits = (that_hold(peak) or ["none"])[0]
                row += [f"{parameter_count(pruned) / 1e9:.1f}B", f"{peak / GIB:.1f}", fits]
            lines.append(f"| {' | '.join(row if ratio else [*row, '', '', ''])} |")
    return "\n".join(lines)


def families() -> str:
    """The table of families."""
    sys.path.insert(0, str(DOCS.parent / "tests/support"))
    from families import table

    return table()


def architectures() -> str:
    """llama.cpp's name of each model type, and how it orders rows."""
    orders = {
        as_they_are: "as they are",
        rotary_pairs: "q and k: halves of each head interleaved",
        joint_thirds: "q, k and v apart",
    }
    lines = ["| model type | llama.cpp's architecture | its rows |", "|---|---|---|"]
    for name, (called, order) in ARCHITECTURES.items():
        lines.append(f"| `{name}` | `{called}` | {orders[order]} |")
    return "\n".join(lines)


def ways(*heads: str) -> str:
    """The ways to train Llama 3.1 70B on an RTX 4090, 2,048 tokens, 16 forward passes a step.

    The models that are pruned lose whole layers.
    """
    found = plan_memory(
        DOCS / "configs/llama-3.1-70b.json",
        compare=True,
        units="layers",
        sequence_len=2048,
        gradient_accumulation_steps=16,
    )
    return ways_markdown(found.as_dict(), heads)


def short_ways() -> str:
    """README's columns of them."""
    return ways("way", "GPU, GiB", "fits", "host, GiB", "PCIe, GB a step", "tokens/s ≤")


def rules() -> str:
    """What servers ask of an adapter, of whom it is asked, and where that was read."""
    lines = ["| what is asked | by whom, read in |", "|---|---|"]
    for rule in RULES:
        read = ", ".join(f"{server} (`{files}`)" for server, files in rule.read_in.items())
        lines.append(f"| {rule.name} | {read} |")
    return "\n".join(lines)


PARTS = {
    "families.md": families,
    "gguf.md": architectures,
    "which-gpu.md": gpus,
    "which-way.md": ways,
    "serving.md": rules,
    "../README.md": short_ways,
}


def with_part(text: str, made: str) -> str:
    """A page with what lies between its marks replaced."""
    before, opening, rest = re.split(r"(<!-- made by [^>]*-->)", text, maxsplit=1)
    return f"{before}{opening}\n{made}\n{END}{rest.partition(END)[2]}"


def pages() -> dict[str, str]:
    """File name from docs/ → its text as it should be."""
    made = {"keys.md": keys()}
    for name, part in PARTS.items():
        made[name] = with_part((DOCS / name).read_text(encoding="utf-8"), part())
    return made


if __name__ == "__main__":
    for file_name, text in pages().items():
        (DOCS / file_name).write_text(text, encoding="utf-8")
