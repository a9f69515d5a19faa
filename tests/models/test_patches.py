"""Every change of foreign code is listed, with its reason; those of `register` are undone."""

import ast
import json
from pathlib import Path

from conftest import run_command, write_yaml

import axolotl_loram
from axolotl_loram.architecture.plan import SCHEMA_VERSION
from axolotl_loram.models import patches, patches_peft

ROOT = Path(axolotl_loram.__file__).parent
REFUSED = """
import sys
from axolotl.cli import merge_lora
from axolotl.cli.config import load_cfg
before = merge_lora.merge_lora_sharded_efficient
seen = []
from axolotl_loram.plugin import LoRAMPlugin
register = LoRAMPlugin.register
def watched(self, cfg):
    register(self, cfg)
    seen.append(merge_lora.merge_lora_sharded_efficient)
LoRAMPlugin.register = watched
try:
    load_cfg(sys.argv[1], merge_lora=True)
except ValueError as error:
    assert "learning_rate" in str(error), error
else:
    raise SystemExit("not refused")
assert seen[0] is not before and merge_lora.merge_lora_sharded_efficient is before
from axolotl.telemetry.manager import FIELDS_TO_REDACT
assert {"exception", "stack_trace"} <= FIELDS_TO_REDACT  # the error itself is sent after this
"""


def test_a_refused_configuration_leaves_axolotl_as_it_was(make_model, settings, tmp_path):
    record = {"schema_version": SCHEMA_VERSION, "kind": "recovered-adapter"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/loram.json").write_text(json.dumps(record))
    section = {"pruned_model_path": "somewhere"}
    yaml_file = write_yaml(
        tmp_path / "bad.yml", settings(make_model(), loram=section, learning_rate="none")
    )
    (tmp_path / "refused.py").write_text(REFUSED)
    run_command(tmp_path / "refused.py", yaml_file)


def test_every_patch_says_why_and_until_when():
    ends = dict(patches.PATCHES)
    for module in (patches, patches_peft):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
        for name in public - {"undo"}:
            assert ends.pop(name) and getattr(module, name).__doc__, name
    assert not ends


def test_no_other_module_changes_what_it_imports():
    """Assigning to an imported name's attributes, and `setattr` on one, are of `patches` alone."""
    for file in ROOT.rglob("*.py"):
        if (
            file.name.startswith("patches") or file.parent.name == "llama_cpp"
        ):  # those: another process
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            for owner in _changed_by(node):
                while isinstance(owner, ast.Attribute):
                    owner = owner.value
                name = owner.id if isinstance(owner, ast.Name) else None
                assert name not in imported, (file.name, node.lineno, name)


def _changed_by(node):
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.value for target in targets if isinstance(target, ast.Attribute)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
        return node.args[:1]
    return []
