"""Build the quickstart's data from the source files of the Python standard library.

The task: given a function, write the first line of its docstring, as people write it. Every machine
that runs this already has the text, so nothing is downloaded. Whole top-level modules are held out.
"""

import ast
import copy
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
LINE_CHARACTERS = (10, 100)  # shorter lines say nothing, longer ones are not summaries
FUNCTION_CHARACTERS = 250
SOURCE_CHUNK_LINES = 12
HELD_OUT_FUNCTIONS, HELD_OUT_CHUNKS = 64, 16
QUOTES = '"""'
QUESTION = "Sum up this Python function in one line.\n\n{}"
Function = ast.FunctionDef | ast.AsyncFunctionDef
Owner = ast.Module | ast.ClassDef


def build(folder: Path) -> None:
    """Write the three files of the quickstart into `folder`, the same bytes on every call.

    - `train.jsonl`, `heldout.jsonl`: chats, a function and its docstring's line (`messages` rows);
    - `heldout_source.jsonl`: plain source of the held-out modules, the text the LoRA is not
      trained for (`text` rows).
    """
    library = list(sources(Path(sysconfig.get_path("stdlib"))))
    held_out = [text for module, text in library if is_held_out(module)]
    train_rows = _chats([text for module, text in library if not is_held_out(module)])
    unseen = without(_chats(held_out), train_rows)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", train_rows)
    write(folder / "heldout.jsonl", _sample(unseen, HELD_OUT_FUNCTIONS))
    chunks = source_chunks(held_out, SOURCE_CHUNK_LINES)
    write(folder / "heldout_source.jsonl", [{"text": c} for c in _sample(chunks, HELD_OUT_CHUNKS)])


def is_held_out(module: str) -> bool:
    """Decide by a hash of the name, so that it does not depend on the other modules there are."""
    return zlib.crc32(module.encode()) % HELD_OUT_SHARE == 0


def sources(library: Path) -> Iterator[tuple[str, str]]:
    """Yield the top-level module and the text of each source file, in the order of their paths."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(MACHINE_PREFIXES):
            try:
                yield parts[0].removesuffix(".py"), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def summarized(text: str) -> Iterator[tuple[Function, Owner, str]]:
    """Yield each function and method of a source text whose docstring begins with a summary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    shortest, longest = LINE_CHARACTERS
    for owner in ast.walk(tree):
        if isinstance(owner, Owner):
            for node in owner.body:
                if isinstance(node, Function):
                    line = (ast.get_docstring(node) or "").split("\n")[0].strip()
                    if shortest <= len(line) <= longest and QUOTES not in line:
                        yield node, owner, line


def without(rows: list[dict], seen: list[dict]) -> list[dict]:
    """Drop rows that also occur in `seen`: copied functions would measure memory, not skill."""
    known = {json.dumps(item) for item in seen}
    return [item for item in rows if json.dumps(item) not in known]


def source_chunks(texts: list[str], size: int) -> list[str]:
    """Return all runs of `size` source lines."""
    chunks = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        starts = range(0, len(lines) - size, size)
        chunks += ["".join(lines[start : start + size]) for start in starts]
    return chunks


def write(path: Path, rows: list[dict]) -> None:
    """Write JSON lines through a temporary file, so that a file that exists is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    partial.replace(path)


def _chats(texts: list[str]) -> list[dict]:
    """Return a row for each function that is short and summed up in a sentence, each once."""
    found = (function for text in texts for function in summarized(text))
    pairs = dict.fromkeys(
        (_code(node, owner), line) for node, owner, line in found if line.endswith(".")
    )
    return [_chat(code, line) for code, line in pairs if len(code) <= FUNCTION_CHARACTERS]


def _code(node: Function, owner: Owner) -> str:
    """Return a function without its docstring, a method below the first line of its class."""
    bare = copy.copy(node)
    bare.body = node.body[1:] or [ast.Expr(ast.Constant(...))]
    code = ast.unparse(bare)
    if isinstance(owner, ast.ClassDef):
        return f"class {owner.name}:\n{textwrap.indent(code, '    ')}"
    return code


def _chat(code: str, line: str) -> dict:
    """Return a row of Axolotl's `chat_template`."""
    asked = {"role": "user", "content": QUESTION.format(code)}
    return {"messages": [asked, {"role": "assistant", "content": line}]}


def _sample(items: list, count: int) -> list:
    """Return a fixed random sample."""
    return random.Random(0).sample(items, min(count, len(items)))


if __name__ == "__main__":
    build(Path("build/quickstart/data"))
