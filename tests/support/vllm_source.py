"""vLLM's own reading of LoRA adapters, from its sources, without its compiled parts.

VLLM_SOURCE names a folder that its wheel was unpacked into. The modules that read adapters are run
as they are; what they import of the rest of vLLM, which no adapter on a CPU reaches, is empty.
"""

import ast
import os
import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

SOURCE = Path(os.environ.get("VLLM_SOURCE", "/nowhere")) / "vllm"
THERE = (SOURCE / "lora/peft_helper.py").is_file()
READERS = ("lora.peft_helper", "lora.utils", "lora.lora_weights", "lora.lora_model")


@contextmanager
def vllm():
    """In the block, the modules that read adapters can be imported; yields them by name."""
    sys.modules["vllm"] = package = ModuleType("vllm")
    package.__path__ = []
    sys.meta_path.insert(0, finder := _Empty())
    try:
        yield {name: _run(name) for name in READERS}
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]


class _Empty:
    """Finds every module of vLLM that is not there yet, with any name in it."""

    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self) if name.startswith("vllm.") else None

    def create_module(self, spec):
        made = MagicMock(__spec__=spec, __path__=[], PIN_MEMORY=False)
        made.__name__ = spec.name
        return made

    def exec_module(self, module):
        pass


def _run(name):
    spec = spec_from_file_location(f"vllm.{name}", SOURCE / f"{name.replace('.', '/')}.py")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def literal(file, name):
    """What a name is set to at the top of one of vLLM's files; of a Literal, its values."""
    tree = ast.parse((SOURCE / file).read_text())
    values = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    value = next(values)
    return ast.literal_eval(value.slice if isinstance(value, ast.Subscript) else value)


def attribute(architecture, name):
    """What the class of an architecture says as `name`, its bases after it; None if nothing."""
    registry = (SOURCE / "model_executor/models/registry.py").read_text()
    marked = next(
        node
        for node in ast.walk(ast.parse(registry))
        if isinstance(node, ast.Dict)
        and any(isinstance(key, ast.Constant) and key.value == architecture for key in node.keys)
    )
    keys = [key.value if isinstance(key, ast.Constant) else None for key in marked.keys]
    module, cls = ast.literal_eval(marked.values[keys.index(architecture)])
    return _attribute(module, cls, name)


def _attribute(module, cls, name):
    folder = SOURCE / "model_executor/models" / module.replace(".", "/")
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    found = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    if cls not in found:
        imports = (node for node in nodes if isinstance(node, ast.ImportFrom) and node.module)
        where = (node.module for node in imports if cls in [alias.name for alias in node.names])
        other = next(where, "").removeprefix("vllm.model_executor.models.")
        return _attribute(other, cls, name) if (folder.parent / f"{other}.py").exists() else None
    for node in found[cls].body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if target is not None and ast.unparse(target) == name and node.value is not None:
            return ast.literal_eval(node.value)
    said = (_attribute(module, ast.unparse(base), name) for base in found[cls].bases)
    return next((value for value in said if value is not None), None)
