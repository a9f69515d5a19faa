"""Artefacts of earlier versions open: tests/support/golden has some of every schema version."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from golden import HERE
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_loram.architecture.plan import SCHEMA_VERSION, PruningPlan
from axolotl_loram.architecture.record import Record
from axolotl_loram.cli import main
from axolotl_loram.errors import LoRAMError
from axolotl_loram.recovery.recover import recover

TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(params=sorted(folder.name for folder in HERE.iterdir()))
def golden(request, tmp_path, monkeypatch):
    """A copy of the artefacts of one version, in the current folder."""
    shutil.copytree(HERE / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_this_schema_version_has_its_artefacts():
    found = [json.loads(file.read_text()) for file in HERE.glob("*/pruned/loram.json")]
    assert SCHEMA_VERSION in {record["schema_version"] for record in found}


def test_every_artefact_passes_its_checks(golden):
    for name in ("pruned", "recovered", "fitted"):
        result = CliRunner().invoke(main, ["inspect", name, "--verify", "--base", "base"])
        assert result.exit_code == 0, (name, result.output)
        assert re.search(r"^ok +base ", result.output, re.MULTILINE), result.output
    plan = PruningPlan.load(Path("pruned"))
    assert plan.counts == {layer: {"neurons": 12, "kv_groups": 1} for layer in (1, 2)}


def test_an_adapter_is_recovered_to_the_same_bits(golden):
    recover(Path("adapter"), output=Path("again"))
    first, again = (
        load_file(f"{name}/adapter_model.safetensors") for name in ("recovered", "again")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("adapter", ["recovered", "fitted"])
def test_the_base_runs_with_the_adapter(golden, adapter):
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    with torch.no_grad():
        before = base(TOKENS).logits
        after = PeftModel.from_pretrained(base, adapter)(TOKENS).logits
    assert after.isfinite().all() and not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", ["pruned", "recovered"])
def test_newer_versions_are_refused_by_number(golden, name):
    file = Path(name, "loram.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(LoRAMError, match=f"found {SCHEMA_VERSION + 1}: upgrade"):
        Record.load(Path(name))
    result = CliRunner().invoke(main, ["inspect", name, "--verify"])
    assert result.exit_code == 1
