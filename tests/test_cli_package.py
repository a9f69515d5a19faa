"""`examples` and `schema`, from a wheel that is really built, without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from test_project import PAGES, YAML_FILES, blocks_of

from axolotl_loram.config_loram import LoRAMConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("examples", "deepspeed_configs")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The files of a wheel, unpacked, and nothing of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("axolotl_loram", *SHIPPED):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    (source / "examples/quickstart/__pycache__").mkdir(exist_ok=True)
    (source / "examples/quickstart/__pycache__/data.cpython-311.pyc").write_bytes(b"")
    wheels = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, "-c", BUILD, wheels], cwd=source, check=True)
    (wheel,) = wheels.iterdir()
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    shutil.rmtree(source)
    return folder


def run(installed, folder, *arguments, code=0, **environment):
    command = [sys.executable, "-X", "importtime", "-m", "axolotl_loram.cli", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(installed), **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "axolotl_loram.config_loram" in imported
    assert not {"torch", "transformers", "axolotl", "numpy"} & imported
    return done


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for name in SHIPPED
        for file in (folder / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_a_wheel_brings_the_examples(installed, tmp_path):
    done = run(installed, tmp_path, "examples")
    written = contents(tmp_path / "loram-examples")
    assert written == contents(ROOT) and len(written) > 15
    assert done.stdout.split() == [f"loram-examples/{name}" for name in sorted(written)]
    assert {file.name for file in tmp_path.rglob("*")} & {"__pycache__"} == set()
    asked = run(installed, tmp_path, "examples", "other", "--json")
    assert json.loads(asked.stdout) == {"output": "other", "files": sorted(written)}


def test_what_is_there_is_not_overwritten(installed, tmp_path):
    (tmp_path / "mine.yml").write_text("mine")
    refused = run(installed, tmp_path, "examples", ".", code=1)
    said = [line for line in refused.stderr.splitlines() if line.startswith("Error")]
    assert len(said) == 1 and "expected . to be new or empty" in said[0]
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yml"]


def test_the_schema_is_the_sections(installed, tmp_path):
    """The same text in any process; it takes what the schema takes, and no unknown key."""
    jsonschema = pytest.importorskip("jsonschema")
    one, two = (
        run(installed, tmp_path, "schema", PYTHONHASHSEED=seed).stdout for seed in ("1", "2")
    )
    assert one == two
    schema = json.loads(one)
    assert list(schema["$defs"]["LoRAMConfig"]["properties"]) == list(LoRAMConfig.model_fields)
    check = jsonschema.Draft202012Validator(schema)
    texts = [file.read_text(encoding="utf-8") for file in YAML_FILES]
    texts += [block for page in PAGES for block in blocks_of(page, "yaml")]
    parsed = [cfg for cfg in map(yaml.safe_load, texts) if "loram" in cfg]
    assert len(parsed) > 8
    for cfg in parsed:
        check.validate(cfg)
    for wrong in ({"prunning": {}}, {"pruning": {"ratoi": 0.5}}, {"anchor": "yes"}):
        assert not check.is_valid({"loram": wrong}), wrong
