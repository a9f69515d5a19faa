"""The README's commands as printed, in their order, in a shell that knows nothing."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_yaml

from axolotl_loram.config import PruningArgs
from axolotl_loram.pruning.prune import prune

README = Path(__file__).resolve().parents[2] / "README.md"
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/tmp")} | {
    name: value
    for name, value in os.environ.items()
    if name.startswith(("HF_", "AXOLOTL_DO", "PY"))
}


def commands(first: str) -> list[str]:
    """The block of indented commands in the README that begins with `first`."""
    blocks = README.read_text(encoding="utf-8").split("\n\n")
    (found,) = [block for block in blocks if block.lstrip().startswith(first)]
    return [line.strip().partition("#")[0].strip() for line in found.splitlines()]


def shell(lines: list[str], folder: Path, **options) -> subprocess.CompletedProcess:
    script = "\n".join(["set -e", *lines])
    command = ["bash", "--noprofile", "--norc", "-c", script]
    return subprocess.run(command, cwd=folder, env=BARE, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_train_merge_infer_evaluate_in_a_fresh_shell(make_model, settings, tmp_path):
    prune(str(make_model()), tmp_path / "pruned", PruningArgs(ratio=0.5))
    section = {"pruned_model_path": str(tmp_path / "pruned")}
    write_yaml(tmp_path / "loram.yml", settings(make_model(), adapter="loram", loram=section))
    _, activate, install = commands("python3 -m venv")
    assert install.startswith("pip install")  # done: the environment that runs this test
    activate = activate.replace(".venv", shlex.quote(str(Path(sys.executable).parent.parent)))
    lines = commands("axolotl train loram.yml  ")
    assert [line.split()[1] for line in lines] == ["train", "merge-lora", "inference", "evaluate"]
    done = shell([activate, *lines], tmp_path, input="def loads(s):\n")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/merged/config.json").exists()
    assert (tmp_path / "out/eval_summary.csv").exists()
