"""The project's own promises: its imports, its YAML, its documents."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import packages_distributions
from inspect import signature
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from families import ALSO, FAMILIES, TRAINED, table
from packaging.utils import canonicalize_name
from test_supply import requirements

from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.training.support import check_supported

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    file
    for file in (ROOT / "axolotl_loram").rglob("*.py")
    if file.stem not in ("__init__", "heterogeneous")
)
FLOORS = [
    *("errors", "criteria", "config", "tables"),
    *("files", "architecture", "memory", "models", "text"),
    *("pruning", "recovery", "results", "training", "propose"),
    "api",
    *("cli", "plugin"),
]
"""A module imports what is on its own floor, or on one before it."""
HOSTED = ("axolotl_loram.plugin", "axolotl_loram.text.axolotl_text")
"""The modules that import axolotl."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
YAML_FILES = sorted(ROOT.glob("examples/**/*.yml"))


def imports_of(file: Path) -> Iterator[str]:
    """What a file imports, anywhere, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module.removesuffix("axolotl_loram") != node.module
            names = [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from names


def floor_of(module: str) -> int:
    """On which floor a module of this package is: its package's place in FLOORS, or its own."""
    name = module.split(".")[1]
    return FLOORS.index(name.partition("_")[0] if name not in FLOORS else name)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_packages_import_only_what_is_below_them(file):
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    found = set(imports_of(file)) - {"axolotl_loram.__version__"}
    ours = {name for name in found if name.startswith("axolotl_loram")}
    assert not [name for name in ours if floor_of(name) > floor_of(module)]
    if any(name.split(".")[0] == "axolotl" for name in found):
        assert module in HOSTED
    if module.startswith("axolotl_loram.pruning."):
        assert not [name for name in ours if name.startswith("axolotl_loram.recovery")]


def test_what_is_imported_is_declared():
    """Not left to what others happen to bring."""
    provided, declared = packages_distributions(), set(map(canonicalize_name, requirements()))
    found = {name.split(".")[0] for file in MODULES for name in imports_of(file)}
    foreign = found - sys.stdlib_module_names - {"axolotl_loram", "conversion"}  # of a checkout
    lacking = {
        name
        for name in foreign
        if not declared.intersection(map(canonicalize_name, provided.get(name, [name])))
    }
    assert not lacking


def test_no_modules_import_one_another_in_a_circle():
    """Those that are imported where a module begins; Python itself lets some circles through."""
    graph = {}
    for file in MODULES:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        graph[module] = {name for name in imports_of(file) if name.startswith("axolotl_loram.")}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_stay_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_shipped_yaml_is_accepted(file):
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "loram" in settings:
        assert settings["plugins"] == ["axolotl_loram.LoRAMPlugin"]
        check_supported(DictDefault(settings))
        LoRAMArgs(loram=settings["loram"])


def test_the_quickstart_compares_equals():
    """The two runs differ in the plugin, its section and the output alone."""
    lora, loram = (
        yaml.safe_load((ROOT / f"examples/quickstart/{name}.yml").read_text(encoding="utf-8"))
        for name in ("lora", "loram")
    )
    differing = {key for key in lora.keys() | loram.keys() if lora.get(key) != loram.get(key)}
    assert differing == {"plugins", "loram", "output_dir"}


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_of_the_documents_is_accepted(page):
    blocks = [yaml.safe_load(block) for block in blocks_of(page, "yaml")]
    assert page.name != "README.md" or any("loram" in block for block in blocks)
    for block in blocks:
        if "loram" in block:
            LoRAMArgs(loram=block["loram"])
            aligns = block["loram"].get("stage") == "align"
            check_supported(DictDefault(block if aligns else {"adapter": "lora", **block}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documents_exist(page):
    from axolotl_loram.cli import main

    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?<![/\w])axolotl-loram ([a-z]+)((?: [^\n`]*)?)", text):
        options = {
            option for p in main.commands[name].params for option in p.opts + p.secondary_opts
        }
        assert set(re.findall(r"(?<!\S)(--[\w-]+)", rest.partition("#")[0])) <= options
    scripts = re.findall(r"python ((?:benchmarks|docs|examples)/[\w/]+\.py)", text)
    assert not [script for script in scripts if not (ROOT / script).exists()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([\w-]+)", text, re.MULTILINE))
    assert named <= targets
    assert page.name != "README.md" or {"quickstart", "test"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_documents_names_what_there_is(page):
    """Imports resolve; of `axolotl_loram as al`, every name and every keyword is there."""
    for block in blocks_of(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), page.name, "exec"), {})
        if (ROOT / "axolotl_loram/api.py").exists():
            check_calls(tree)


def check_calls(tree: ast.AST) -> None:
    """Hold the calls of `al.…` in a block against the functions of the Python API."""
    import axolotl_loram as al

    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "al":
            keywords = {keyword.arg: None for keyword in node.keywords}
            signature(getattr(al, called.attr)).bind(*node.args, **keywords)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documents_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if "://" not in link]
    assert not [file for file in files if file and not (page.parent / file).exists()]


@pytest.mark.parametrize(("page", "most"), [("README.md", 10_240), ("CONTRIBUTING.md", 7_000)])
def test_the_first_pages_stay_short(page, most):
    assert (ROOT / page).stat().st_size <= most


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert pages and not [name for name in pages if f"](docs/{name})" not in text]


def test_what_is_made_from_the_code_is_up_to_date(monkeypatch):
    """`make docs` writes it: the keys, the tables of families and of GPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    for name, text in import_module("generate").pages().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run `make docs`"
    assert table() in (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert set(TRAINED) <= set(FAMILIES) and set(ALSO) <= set(FAMILIES)


def test_promises_name_tests_that_exist():
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]
