"""Pruning that is interrupted goes on where it was, and gives the same model."""

import os
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
from calibrated import text_tokens
from conftest import run_command, start_command

import axolotl_loram.heterogeneous  # noqa: F401
from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.resumable import resumable
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.pruning.prune import Job, prune
from axolotl_loram.text.calibration import Calibration

TEXT = Calibration(text_tokens(samples=16, length=64), "a test", 0)
JOBS = {
    "magnitude": PruningArgs(ratio=0.5, method="magnitude"),
    "taylor": PruningArgs(ratio=0.5, method="taylor"),
    "fluctuation": PruningArgs(ratio=0.5, method="fluctuation", allocation="global"),
    "sparsegpt": PruningArgs(sparsity="2:4", method="sparsegpt"),
    "rounding": PruningArgs(ratio=0.5, method="random", quantize="nf4-gptq", device="cpu"),
    "sparse magnitude": PruningArgs(sparsity=0.5, method="magnitude"),
}


class Interruption:
    """A progress that is interrupted at its n-th report."""

    def __init__(self, at: float = float("inf")):
        self.reports, self.at = 0, at

    def __call__(self, total, what="", unit="B"):
        return self.report

    def report(self, done):
        self.reports += 1
        if self.reports == self.at:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, bytes]:
    names = [*folder.glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in names}


def calibration_of(settings):
    return TEXT if settings.resolve().needs_calibration else None


@pytest.mark.parametrize("name", JOBS)
def test_interrupted_anywhere_it_goes_on(name, make_model, tmp_path):
    base, settings = str(make_model(num_hidden_layers=8)), JOBS[name]
    whole = Interruption()
    record = prune(
        base, tmp_path / "a", settings, progress=whole, calibration=calibration_of(settings)
    )
    points = sorted({1, 2, *range(3, whole.reports, max(1, whole.reports // 4)), whole.reports})
    for point in points:
        target = tmp_path / f"b{point}"
        with pytest.raises(KeyboardInterrupt):
            prune(
                base,
                target,
                settings,
                progress=Interruption(point),
                calibration=calibration_of(settings),
            )
        assert not target.exists()
        prune(base, target, settings, calibration=calibration_of(settings))
        assert weights(target) == weights(tmp_path / "a")
        again = (target / "loram.json").read_text()
        assert again == (tmp_path / "a/loram.json").read_text() and record["plan"] in again
    assert {path.name for path in tmp_path.iterdir()} == {"a", *(f"b{point}" for point in points)}


@pytest.mark.parametrize("name", ["taylor", "fluctuation", "sparsegpt"])
@pytest.mark.parametrize("share", [0.5, 0.6])
def test_what_was_done_is_not_done_again(name, share, make_model, tmp_path, monkeypatch):
    base, settings = str(make_model(num_hidden_layers=8)), JOBS[name]
    loads = []
    original = LayerStream.layer
    monkeypatch.setattr(
        LayerStream, "layer", lambda stream, i: (loads.append(i), original(stream, i))[1]
    )
    whole = Interruption()
    prune(base, tmp_path / "a", settings, progress=whole, calibration=TEXT)
    needed = len(loads)
    loads.clear()
    at = int(whole.reports * share)
    with pytest.raises(KeyboardInterrupt):
        prune(base, tmp_path / "b", settings, progress=Interruption(at), calibration=TEXT)
    before = len(loads)
    prune(base, tmp_path / "b", settings, calibration=TEXT)
    assert before >= needed / 4 and len(loads) <= needed + 1


def test_another_job_does_not_go_on_with_it(make_model, tmp_path):
    base = str(make_model())
    with pytest.raises(KeyboardInterrupt):
        prune(base, tmp_path / "a", JOBS["taylor"], progress=Interruption(3), calibration=TEXT)
    other = PruningArgs(ratio=0.5, method="taylor", seed=1)
    prune(base, tmp_path / "a", other, calibration=TEXT)
    prune(base, tmp_path / "b", other, calibration=TEXT)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        prune(base, tmp_path / "c", other, progress=Interruption(40), calibration=TEXT)
    unlike = Calibration(TEXT.tokens[:, ::-1].copy(), "a test", 0)
    for name in ("c", "d"):
        prune(base, tmp_path / name, other, calibration=unlike)
    assert weights(tmp_path / "c") == weights(tmp_path / "d") != weights(tmp_path / "b")


def test_hidden_states_of_another_device_are_not_gone_on_with(make_model):
    """They are in another precision there."""
    checkpoint, config = Checkpoint(make_model()), load_config(str(make_model()))
    sketch = PruningPlan(config, {})
    identities = [
        Job(
            checkpoint, sketch, PruningArgs(ratio=0.5, device=device).resolve(), calibration
        ).identity
        for calibration in (TEXT, None)
        for device in ("cpu", "cuda")
    ]
    assert identities[0] != identities[1] and identities[2] == identities[3]


def test_a_killed_process_goes_on(make_model, text_file, tmp_path):
    """A real SIGKILL while the command runs, then the same command."""
    base = make_model(num_hidden_layers=24)
    options = ["--method", "taylor", "--pruning-ratio", "0.5", "--calibration", text_file]
    options += ["--calibration-samples", "32", "--calibration-length", "64"]
    command = ["axolotl-loram", "prune", base, tmp_path / "work/out", *options]
    (tmp_path / "work").mkdir()
    process = start_command(*command, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("work/.out.*/scores-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not (tmp_path / "work/out").exists()
    done = run_command(*command)
    assert "going on with the interrupted work" in done.stderr
    assert (tmp_path / "work/out/loram.json").exists()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def test_two_at_once_are_told(make_model, tmp_path):
    with resumable(tmp_path / "out", {"job": 1}) as work:
        (work.result / "file").write_text("")
        with (
            pytest.raises(LoRAMError, match="another process"),
            resumable(tmp_path / "out", {"job": 1}),
        ):
            pass
    assert (tmp_path / "out/file").exists()


@pytest.mark.parametrize("name", JOBS)
def test_too_little_disk_is_said_before_the_work(name, make_model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 1000))
    monkeypatch.setattr(LayerStream, "__init__", None)
    with pytest.raises(LoRAMError, match=r"expected \S+ GiB free for .* found 9.31e-07 GiB"):
        settings = JOBS[name]
        calibration = calibration_of(settings)
        prune(str(make_model()), tmp_path / "out", settings, calibration=calibration)
    assert not list(tmp_path.iterdir())
