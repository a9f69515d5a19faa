"""Build the quickstart's data from the source files of the Python standard library.

The task: given the head of a function, write the first line of its docstring. Every machine that
runs this already has the text, so nothing is downloaded. Whole top-level modules are held out: no
text of theirs reaches the base model, the tokenizer or the LoRA.
"""

import ast
import json
import random
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    "__phello__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
MACHINE_PREFIXES = ("_sysconfigdata", "config-")  # written when this Python was built
HELD_OUT_SHARE = 8  # one top-level module in 8 is held out
COMPLETION_CHARACTERS = (10, 100)  # shorter lines say nothing, longer ones are not summaries
PROMPT_CHARACTERS = 300
SOURCE_CHUNK_LINES = 12
SOURCE_CHUNKS = 400
BOS, EOS, QUOTES = "<|bos|>", "<|eos|>", '"""'


def build(folder: Path) -> None:
    """Write the four files of the quickstart into `folder`, the same bytes on every call.

    - `train.jsonl`, `heldout.jsonl`: prompts and docstring lines (`type: input_output` rows);
    - `pretrain.jsonl`: source files of the training modules (`text` rows), for the base model;
    - `heldout_source.jsonl`: plain source of the held-out modules, the text the LoRA is not
      trained for, as `input_output` rows without a prompt.
    """
    sources = list(_sources(Path(sysconfig.get_path("stdlib"))))
    training = [text for module, text in sources if not is_held_out(module)]
    held_out = [text for module, text in sources if is_held_out(module)]
    train_rows = _task_rows(training)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "pretrain.jsonl", [{"text": text} for text in training])
    _write(folder / "train.jsonl", train_rows)
    _write(folder / "heldout.jsonl", _without(_task_rows(held_out), train_rows))
    _write(folder / "heldout_source.jsonl", _source_rows(held_out))


def is_held_out(module: str) -> bool:
    """Decide by a hash of the name, so that it does not depend on the other modules there are."""
    return zlib.crc32(module.encode()) % HELD_OUT_SHARE == 0


def row(prompt: str, completion: str) -> dict:
    """Build one row; `input_output` adds no special tokens, so they are part of the text."""
    return {
        "segments": [
            {"label": False, "text": BOS + prompt},
            {"label": True, "text": completion + EOS},
        ]
    }


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """Yield the top-level module and the text of each source file, in the order of their paths."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(MACHINE_PREFIXES):
            try:
                yield parts[0].removesuffix(".py"), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _task_rows(texts: list[str]) -> list[dict]:
    """Return the rows of all documented functions, each once, in the order of the texts."""
    pairs = dict.fromkeys(pair for text in texts for pair in _documented(text))
    return [row(prompt, completion) for prompt, completion in pairs]


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) for each documented function and method in a source text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    for owner in ast.walk(tree):
        if isinstance(owner, ast.Module | ast.ClassDef):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _pair(node, owner)


def _pair(
    node: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.Module | ast.ClassDef
) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) for one function if its docstring has a usable first line."""
    lines = (ast.get_docstring(node) or "").splitlines()
    line = lines[0].strip() if lines else ""
    prompt = _head(node, owner)
    shortest, longest = COMPLETION_CHARACTERS
    if shortest <= len(line) <= longest and len(prompt) <= PROMPT_CHARACTERS and QUOTES not in line:
        yield prompt, line + QUOTES


def _head(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.Module | ast.ClassDef) -> str:
    """Return the text up to the docstring: the class line of a method, the `def` line, quotes."""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    head = f"{keyword} {node.name}({ast.unparse(node.args)}):\n    {QUOTES}"
    if isinstance(owner, ast.ClassDef):
        return f"class {owner.name}:\n" + textwrap.indent(head, "    ")
    return head


def _without(rows: list[dict], seen: list[dict]) -> list[dict]:
    """Drop rows that also occur in `seen`: copied functions would measure memory, not skill."""
    known = {json.dumps(item) for item in seen}
    return [item for item in rows if json.dumps(item) not in known]


def _source_rows(texts: list[str]) -> list[dict]:
    """Return a fixed random sample of short runs of source lines."""
    chunks = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines) - SOURCE_CHUNK_LINES, SOURCE_CHUNK_LINES):
            chunks.append("".join(lines[start : start + SOURCE_CHUNK_LINES]))
    sample = random.Random(0).sample(chunks, min(SOURCE_CHUNKS, len(chunks)))
    return [row("", chunk) for chunk in sample]


def _write(path: Path, rows: list[dict]) -> None:
    """Write JSON lines through a temporary file, so that a file that exists is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    build(Path("build/quickstart/data"))
