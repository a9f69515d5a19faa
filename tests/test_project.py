"""The project's own promises: its imports, its YAML, its README."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from families import ALSO, FAMILIES, TRAINED, table

from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.training.support import check_supported

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    file
    for file in (ROOT / "axolotl_loram").rglob("*.py")
    if file.stem not in ("__init__", "heterogeneous")
)
FLOORS = [
    *("errors", "config", "tables"),
    *("files", "architecture", "memory", "models", "text"),
    *("pruning", "recovery", "results", "training", "propose"),
    "api",
    *("cli", "plugin"),
]
"""A module imports what is on its own floor, or on one before it."""
HOSTED = ("axolotl_loram.plugin", "axolotl_loram.text.axolotl_text")
"""The modules that import axolotl."""
YAML_FILES = sorted(ROOT.glob("examples/**/*.yml"))


def imports_of(file: Path) -> Iterator[str]:
    """What a file imports of this package and of axolotl, anywhere, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module.removesuffix("axolotl_loram") != node.module
            names = [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in ("axolotl_loram", "axolotl"))


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


def test_readme_yaml_is_accepted():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert any("loram" in block for block in blocks)
    for block in blocks:
        if "loram" in block:
            LoRAMArgs(loram=block["loram"])
            aligns = block["loram"].get("stage") == "align"
            check_supported(DictDefault(block if aligns else {"adapter": "lora", **block}))


def test_readme_commands_exist():
    from axolotl_loram.cli import main

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = re.findall(r"axolotl-loram (\w+)((?: [^\n`]*)?)", text)
    assert used
    for name, rest in used:
        options = {option for p in main.commands[name].params for option in p.opts}
        assert set(re.findall(r"(--[\w-]+)", rest)) <= options
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([\w-]+)", text, re.MULTILINE))
    assert {"quickstart", "test"} <= named <= targets


def test_the_readme_has_the_table_of_families():
    """`make families` prints it."""
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(TRAINED) <= set(FAMILIES) and set(ALSO) <= set(FAMILIES)


def test_promises_name_tests_that_exist():
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]
