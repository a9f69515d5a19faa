"""The text of the toy base: source files of the Python standard library.

The task: given the head of a function, write the first line of its docstring. Whole top-level
modules are held out: no text of theirs reaches the base model, the tokenizer or the LoRA.
"""

import ast
import random
import sys
import sysconfig
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples/quickstart"))

from data import (
    QUOTES,
    Function,
    Owner,
    is_held_out,
    source_chunks,
    sources,
    summarized,
    without,
    write,
)

PROMPT_CHARACTERS = 300
SOURCE_CHUNK_LINES = 12
SOURCE_CHUNKS = 400
BOS, EOS = "<|bos|>", "<|eos|>"


def build(folder: Path) -> None:
    """Write the four files into `folder`, the same bytes on every call.

    - `train.jsonl`, `heldout.jsonl`: prompts and docstring lines (`type: input_output` rows);
    - `pretrain.jsonl`: source files of the training modules (`text` rows), for the base model;
    - `heldout_source.jsonl`: plain source of the held-out modules, the text the LoRA is not
      trained for, as `input_output` rows without a prompt.
    """
    library = list(sources(Path(sysconfig.get_path("stdlib"))))
    training = [text for module, text in library if not is_held_out(module)]
    held_out = [text for module, text in library if is_held_out(module)]
    train_rows = _task_rows(training)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "pretrain.jsonl", [{"text": text} for text in training])
    write(folder / "train.jsonl", train_rows)
    write(folder / "heldout.jsonl", without(_task_rows(held_out), train_rows))
    write(folder / "heldout_source.jsonl", _source_rows(held_out))


def row(prompt: str, completion: str) -> dict:
    """Build one row; `input_output` adds no special tokens, so they are part of the text."""
    return {
        "segments": [
            {"label": False, "text": BOS + prompt},
            {"label": True, "text": completion + EOS},
        ]
    }


def _task_rows(texts: list[str]) -> list[dict]:
    """Return the rows of all documented functions, each once, in the order of the texts."""
    found = (function for text in texts for function in summarized(text))
    pairs = dict.fromkeys((_head(node, owner), line + QUOTES) for node, owner, line in found)
    return [row(prompt, line) for prompt, line in pairs if len(prompt) <= PROMPT_CHARACTERS]


def _head(node: Function, owner: Owner) -> str:
    """Return the text up to the docstring: the class line of a method, the `def` line, quotes."""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    head = f"{keyword} {node.name}({ast.unparse(node.args)}):\n    {QUOTES}"
    if isinstance(owner, ast.ClassDef):
        return f"class {owner.name}:\n" + textwrap.indent(head, "    ")
    return head


def _source_rows(texts: list[str]) -> list[dict]:
    """Return a fixed random sample of short runs of source lines."""
    chunks = source_chunks(texts, SOURCE_CHUNK_LINES)
    sample = random.Random(0).sample(chunks, min(SOURCE_CHUNKS, len(chunks)))
    return [row("", chunk) for chunk in sample]


if __name__ == "__main__":
    build(Path("build/toy/data"))
