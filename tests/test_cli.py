import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import run_command
from test_model import LLAMA_31_70B
from test_recover import train_on

from axolotl_loram.cli import main


def loram(*arguments, check=True, **options):
    return run_command("axolotl-loram", *arguments, check=check, **options)


def test_help_is_fast_and_imports_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    loram("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0 < took < 1  # of processor time: others may be running
    command = [sys.executable, "-X", "importtime", "-m", "axolotl_loram.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: axolotl-loram" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "axolotl_loram.config" in imported
    assert not {"torch", "transformers", "axolotl", "numpy"} & imported


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself(command):
    shown = CliRunner().invoke(main, [command, "--help"]).stdout
    assert "Usage:" in shown and "Undefined" not in shown


def test_the_same_commands_are_axolotls():
    assert "recover" in run_command("axolotl", "loram", "--help").stdout


def test_plan_reads_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_70B))
    result = loram("plan", tmp_path / "config.json", "--pruning-ratio", "0.85", "--json")
    counted = json.loads(result.stdout)
    assert counted["pruned_parameters"] == 17_849_982_976
    assert round(counted["nominal_qloram_reduction"], 2) == 15.81
    human = loram("plan", tmp_path, "--pruning-ratio", "0.85").stdout
    assert "17,849,982,976" in human


def test_prune_train_recover_by_command_line(make_model, tmp_path):
    base, pruned = make_model(), tmp_path / "pruned"
    result = loram(
        "prune", base, pruned, "--method", "magnitude", "--pruning-ratio", "0.5", "--json"
    )
    assert json.loads(result.stdout)["pruned_layers"] == 2
    assert "pruning: 100%" in result.stderr
    train_on(pruned, tmp_path / "adapter")
    result = loram("recover", tmp_path / "adapter", "--output", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["base"] == str(base)
    bytes_of_old = tmp_path / os.fsdecode(b"caf\xe9")
    told = CliRunner().invoke(
        main, ["recover", str(tmp_path / "adapter"), "--output", str(bytes_of_old)]
    )
    assert told.exit_code == 0 and b"caf\xe9" in told.stdout_bytes
    shown = json.loads(loram("inspect", pruned, "--json").stdout)
    assert (shown["kind"], shown["pruned_layers"]) == ("pruned-model", 2)
    assert json.loads(loram("inspect", tmp_path / "out", "--json").stdout)["kind"] == (
        "recovered-adapter"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("plan", "./nowhere", "--pruning-ratio", "0.5"), 1, "no such model"),
        (("plan", "some-org/nowhere", "--pruning-ratio", "0.5"), 1, "no such model"),
        (("plan", "{base}", "--pruning-ratio", "1.5"), 2, "between 0 and 1"),
        (("plan", "{base}", "--pruning-ratio", "0"), 2, "between 0 and 1"),
        (("plan", "{base}", "--pruning-ratio", "neurons=2"), 2, "found 2 for neurons"),
        (
            ("plan", "{base}", "--pruning-ratio", "half"),
            2,
            "between 0 and 1 (both excluded), found",
        ),
        (("plan", "{base}", "--pruning-ratio", "neurons=.5,neurons=.4"), 2, "name each kind once"),
        (
            ("plan", "{base}", "--pruning-ratio", "neurons=.5", "--units", "kv_groups"),
            *(2, "expected units (kv_groups) or a ratio for each kind of unit, found both"),
        ),
        (("plan", "{base}"), 2, "expected a pruning ratio, found none"),
        (("plan", "{heads}", "--pruning-ratio", "0.9"), 1, "KV group"),
        (("plan", "{mamba}", "--pruning-ratio", "0.5"), 1, "unknown architecture"),
        (("prune", "{base}", "{out}", "--method", "guess"), 2, "--method"),
        (("prune", "{base}", "{out}", "--pruning-ratio", "0.5", "--seed", "-1"), 2, "seed"),
        (("recover", "{base}"), 1, "expected a PEFT adapter"),
        (("inspect", "{base}", "--verify"), 1, "loram.json"),
        (("inspect", "{empty}"), 1, "config.json, adapter_config.json or loram.json"),
        (("inspect", "{mamba}"), 1, "no such model"),
    ],
)
def test_errors_are_one_line(arguments, status, message, make_model, tmp_path):
    (tmp_path / "mamba.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "empty").mkdir()
    places = {
        "base": make_model(),
        "heads": make_model(num_key_value_heads=4),
        "mamba": tmp_path / "mamba.json",
        "out": tmp_path / "out",
        "empty": tmp_path / "empty",
    }
    result = loram(*(argument.format(**places) for argument in arguments), check=False)
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback():
    result = loram("--debug", "plan", "./nowhere", "--pruning-ratio", "0.5", check=False)
    assert "Traceback" in result.stderr


def loram_with_room(size, *arguments):
    """A whole process that cannot write files above a size, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [Path(sys.executable).with_name("axolotl-loram"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)


def test_a_full_disk_leaves_no_output_and_is_gone_on_from(make_model, tmp_path):
    arguments = ("prune", make_model(), tmp_path / "work/out", "--pruning-ratio", "0.5")
    (tmp_path / "work").mkdir()
    result = loram_with_room(50_000, *arguments)
    assert result.returncode == 1
    assert "make room" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "work/out").exists()
    assert "going on with" in loram(*arguments).stderr
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def test_a_full_disk_keeps_the_old_adapter_or_none(make_model, tmp_path):
    loram("prune", make_model(), tmp_path / "pruned", "--pruning-ratio", "0.5")
    train_on(tmp_path / "pruned", tmp_path / "adapter")
    arguments = ("recover", tmp_path / "adapter", "--output", tmp_path / "out", "--overwrite")
    loram(*arguments)
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    result = loram_with_room(10_000, *arguments)
    assert result.returncode == 1 and "make room" in result.stderr
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "adapter", "out"}


def test_a_read_only_place_is_one_line(make_model, tmp_path):
    target = "/proc/loram-out"
    result = loram("prune", make_model(), target, "--pruning-ratio", "0.5", check=False)
    assert result.returncode == 1 and "expected to be able to write in /proc" in result.stderr


def test_pruning_and_recovery_import_no_torch(make_model, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "axolotl_loram.cli", "prune"]
    command += [str(make_model()), str(tmp_path / "pruned"), "--pruning-ratio", "0.5"]
    command += ["--method", "magnitude"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "axolotl_loram.pruning.prune" in imported and not {"torch", "transformers"} & imported
    train_on(tmp_path / "pruned", tmp_path / "adapter")
    assert torch.__version__  # this process has it; the command must not
    command = [sys.executable, "-X", "importtime", "-m", "axolotl_loram.cli"]
    command += ["recover", str(tmp_path / "adapter")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "axolotl_loram.recovery.recover" in imported and "torch" not in imported
