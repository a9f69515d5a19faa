"""The shape of this repository: `python docs/shape.py` prints its column of docs/decisions.md."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent


def lines_of(file: Path) -> int:
    """Lines of a file, empty ones too."""
    return len(file.read_text(encoding="utf-8").splitlines())


def functions_of(file: Path) -> list[int]:
    """Lines of every function of a file, from `def` to its end."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in found]


def main() -> None:
    """Count and print."""
    files = sorted((ROOT / "axolotl_loram").rglob("*.py"))
    modules = [file for file in files if file.name != "__init__.py"]
    packages = {file.parent for file in files if file.parent.parent.name == "axolotl_loram"}
    top = [file for file in modules if file.parent.name == "axolotl_loram"]
    sizes = [lines_of(file) for file in modules]
    functions = [count for file in modules for count in functions_of(file)]
    tests = sum(lines_of(file) for file in (ROOT / "tests").rglob("*.py"))
    shown = {
        "layout": f"{len(packages)} packages + {len(top)} files",
        "files": len(modules),
        "lines of Python": sum(sizes),
        "file median / longest": f"{median(sizes):g} / {max(sizes)}",
        "function median / longest": f"{median(functions):g} / {max(functions)}",
        "tests / code": round(tests / sum(sizes), 2),
        "README, bytes": (ROOT / "README.md").stat().st_size,
        "CONTRIBUTING, bytes": (ROOT / "CONTRIBUTING.md").stat().st_size,
    }
    for name, value in shown.items():
        print(f"{name:28}{value}")


if __name__ == "__main__":
    main()
