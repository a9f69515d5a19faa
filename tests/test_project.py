"""The project's own promises: its imports, its YAML, its README."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from axolotl.utils.dict import DictDefault
from families import ALSO, FAMILIES, TRAINED, table

from axolotl_loram.config_loram import LoRAMArgs
from axolotl_loram.training.support import check_supported

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "axolotl_loram").glob("[a-z]*.py"))
YAML_FILES = sorted(ROOT.glob("examples/**/*.yml"))


def imported_modules(file: Path) -> set[str]:
    """Modules of this package, and axolotl, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module != "axolotl_loram"
                else [f"axolotl_loram.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, module = name.partition(".")
            if package == "axolotl_loram" and module not in ("", "__version__"):
                found.add(module.split(".")[0])
            elif package == "axolotl":
                found.add("axolotl")
    return found


def allowed_imports() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|$", text, re.MULTILINE)
    names = {name for name, _ in rows}
    table = {}
    for name, cell in rows:
        if cell.startswith("all but "):
            table[name] = names - {cell.removeprefix("all but "), name}
        else:
            table[name] = set() if cell == "–" else set(cell.split(", "))
    return table


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_modules_import_only_what_the_table_allows(file):
    allowed = allowed_imports()[file.stem]
    if file.stem in ("plugin", "axolotl_data"):
        allowed = allowed | {"axolotl"}
    assert imported_modules(file) <= allowed
    assert {"recover"} & imported_modules(file) == set() or file.stem != "prune"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
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
