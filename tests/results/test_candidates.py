"""Code in a model's folder is never run, unless the YAML says so to Axolotl; pickles never are."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import write_yaml
from test_recover import train_on

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.cli import main
from axolotl_loram.errors import LoRAMError
from axolotl_loram.results.candidates import load_model, with_adapter
from axolotl_loram.text.axolotl_text import load_yaml, vocabulary

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class TrapConfig(LlamaConfig): pass
class TrapModel(LlamaForCausalLM): pass
class TrapTokenizer(PreTrainedTokenizerFast): pass
"""


class Payload:
    """What a pickle may do."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code was run"


@pytest.fixture
def trap(make_model, tmp_path, marker):
    """Puts code, and pickles of weights, into a copy of a folder, named wherever it can be."""

    def set_in(folder):
        (folder / "trap.py").write_text(CODE.format(marker=str(marker)))
        named = {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapModel"}
        for file, auto_map in (
            ("config.json", named),
            ("tokenizer_config.json", {"AutoTokenizer": [None, "trap.TrapTokenizer"]}),
            ("adapter_config.json", named),
        ):
            if (folder / file).exists():
                settings = json.loads((folder / file).read_text())
                (folder / file).write_text(json.dumps(settings | {"auto_map": auto_map}))
        for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin"):
            (folder / name).write_bytes(pickle.dumps(Payload(marker)))
        return folder

    shutil.copytree(make_model(), tmp_path / "base")
    return set_in


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_no_command_runs_code_from_a_folder(trap, tmp_path, text_file, marker):
    base, pruned, adapter = trap(tmp_path / "base"), tmp_path / "pruned", tmp_path / "adapter"
    text = ("--calibration", text_file, "--calibration-samples", 4, "--calibration-length", 16)
    assert run("plan", base, "--pruning-ratio", 0.5).exit_code == 0
    made = run("prune", base, pruned, "--pruning-ratio", 0.5, "--method", "activation", *text)
    assert made.exit_code == 0, made.stderr
    assert not {*pruned.glob("*.py"), *pruned.glob("*.bin"), *pruned.glob("*.pt")}
    assert "auto_map" not in json.loads((pruned / "config.json").read_text())
    train_on(pruned, adapter)
    record = {"kind": "trained-adapter", "plan": PruningPlan.load(pruned).digest}
    (adapter / "loram.json").write_text(json.dumps(record | {"base": {"id": str(base)}}))
    trap(pruned), trap(adapter)
    found = run("inspect", pruned, "--verify")
    for stray in ("trap.py", "pytorch_model.bin", "config.json has SHA-256"):
        assert stray in found.stderr
    assert run("inspect", adapter, "--verify").exit_code == 0
    for filled in ((), ("--fill", "fitted", *text)):
        done = run("recover", adapter, "--output", tmp_path / f"to{len(filled)}", *filled)
        assert done.exit_code == 0, done.stderr
    assert "trap.py is not in" in run("publish", pruned, "some-org/x", "--dry-run").stderr
    assert not marker.exists()
    trap(tmp_path / "to0")
    for folder in (base, pruned):
        with with_adapter(load_model(str(folder)), tmp_path / "to0" if folder == base else adapter):
            pass
    assert not marker.exists()


def test_only_axolotls_setting_has_code_run(trap, tmp_path, text_file, marker):
    base = trap(tmp_path / "base")
    data = [{"path": str(text_file), "ds_type": "json", "type": "completion"}]
    training = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.1}
    settings = {"base_model": str(base), "datasets": data, "sequence_len": 64, **training}
    settings |= {"num_epochs": 1, "adapter": "lora", "lora_r": 2, "lora_target_linear": True}
    vocabulary(load_yaml(write_yaml(tmp_path / "a.yml", settings)))
    assert not marker.exists()
    trusting = write_yaml(tmp_path / "b.yml", {**settings, "trust_remote_code": True})
    vocabulary(load_yaml(trusting))
    assert marker.exists()  # so the trap works


def test_weights_that_are_pickles_alone_are_refused(trap, tmp_path, marker):
    base = trap(tmp_path / "base")
    (base / "model.safetensors").unlink()
    for arguments in (("prune", base, tmp_path / "out", "--pruning-ratio", 0.5),):
        result = run(*arguments)
        assert result.exit_code == 1 and "saved as safetensors" in result.stderr
    with pytest.raises(LoRAMError):
        load_model(str(base))
    assert not marker.exists()
