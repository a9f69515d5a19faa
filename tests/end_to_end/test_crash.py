"""Whenever a run is killed, fails or finds the disk full, nothing is lost and nothing is torn."""

import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import targets
from axolotl_loram.files.atomic import (
    check_vacant,
    new_file,
    new_folder,
    updated_folder,
)
from axolotl_loram.files.resumable import resumable

SCRIPT = Path(__file__).parents[2] / "benchmarks/crash.py"
OPERATIONS = 12


def campaign(*options: object) -> dict:
    """What `benchmarks/crash.py` found: each operation's counts; failures are shown."""
    command = [sys.executable, str(SCRIPT), "--json", *map(str, options)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads(found.stdout)
    assert result["failures"] == []
    return result["counts"]


EVERY_THIRD = [3, pytest.param(1, marks=pytest.mark.matrix)]


@pytest.mark.parametrize("step", EVERY_THIRD)
def test_killed_at_any_call_that_changes_a_file(step):
    counts = campaign("--faults", "kill", "--step", step, "--quick")
    assert len(counts) >= OPERATIONS and min(each["kill"] for each in counts.values()) > 12 // step


@pytest.mark.parametrize("step", EVERY_THIRD)
def test_failing_calls_are_told(step):
    """Of ENOSPC `test_full_disks_are_told` makes real ones."""
    faults = ("EIO",) if step > 1 else ("ENOSPC", "EIO")
    counts = campaign("--faults", *faults, "--step", step, "--quick")
    assert len(counts) >= OPERATIONS and min(each["EIO"] for each in counts.values()) > 12 // step


@pytest.mark.parametrize("step", EVERY_THIRD)
def test_full_disks_are_told(step):
    """Full after any number of pages, or every third."""
    counts = campaign("--faults", "full", "read-only", "--step", step, "--quick")
    if os.getuid() == 0:
        assert all(each["full"] and each["read-only"] for each in counts.values())


def test_killed_at_random_and_two_at_once():
    """How many of 36 strike depends on the machine's timing: some must, and none does harm."""
    counts = campaign("--faults", "random", "pairs", "--count", 3, "--quick")
    for fault in ("random", "pairs"):
        assert sum(each[fault] for each in counts.values()) > 0


@contextmanager
def a_folder(target):
    with new_folder(target, overwrite=True) as folder:
        yield
        (folder / "made").touch()


@contextmanager
def a_job(target):
    with resumable(target, {"job": 1}, overwrite=True) as work:
        yield
        (work.result / "made").touch()


@contextmanager
def another_job(target):
    with resumable(target, {"job": 2}, overwrite=True) as work:
        yield
        (work.result / "made").touch()


@contextmanager
def an_update(target):
    with updated_folder(target, "made") as folder:
        yield
        (folder / "made").touch()


WRITERS = [a_folder, a_job, another_job, an_update]


@pytest.mark.parametrize("second", [a_folder, a_job])
@pytest.mark.parametrize("first", [a_folder, a_job, another_job])
def test_one_at_a_time(first, second, tmp_path):
    """Also jobs that are unlike, which would go on in different folders."""
    with first(tmp_path / "out"):
        with pytest.raises(LoRAMError, match="another process"), second(tmp_path / "out"):
            pass
        with pytest.raises(LoRAMError, match="another process"):
            check_vacant(tmp_path / "out", overwrite=True)
    with second(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "made"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("write", WRITERS)
def test_links_are_written_through(write, there, tmp_path):
    if there:
        (tmp_path / "far/real").mkdir(parents=True)
        (tmp_path / "far/real/old").touch()
    (tmp_path / "out").symlink_to("far/real")
    with write(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_symlink() and (tmp_path / "far/real/made").exists()
    assert (tmp_path / "far/real/old").exists() == (there and write is an_update)
    names = {path.name for path in tmp_path.rglob("*")}
    assert names <= {"out", "far", "real", "made", "old"}


def test_a_linked_file_is_written_through(tmp_path):
    (tmp_path / "page.html").symlink_to("far.html")
    with new_file(tmp_path / "page.html") as file:
        file.write_text("new")
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "far.html").read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_what_was_moved_aside_is_put_back(tmp_path, caplog):
    """A kill between two renames, where names cannot be exchanged."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old/weights").touch()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.lock").write_text("7")
    with pytest.raises(LoRAMError, match="found files in it"):
        check_vacant(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]
    assert "was interrupted: it is as it was" in caplog.text


def test_work_outlives_a_kill_until_its_target_is_there(tmp_path):
    """Other jobs on other targets are left alone, whatever they are called."""
    mine, others = tmp_path / ".out.0123456789abcdef", tmp_path / ".out.v2.0123456789abcdef"
    for folder in (mine, others):
        folder.mkdir()
    (tmp_path / ".out.lock").write_text("-")
    check_vacant(tmp_path / "out")
    assert mine.exists()
    with a_folder(tmp_path / "out"):
        assert mine.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", others.name}


def test_file_systems_without_locks_are_written(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(targets.fcntl, "flock", flock)
    with a_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mounted_folders_are_refused_before_the_work():
    with pytest.raises(LoRAMError, match="choose a folder in it"):
        check_vacant(Path("/proc"), overwrite=True)


def test_an_interrupt_says_what_there_is(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with a_folder(tmp_path / "out"):
        pass
    with pytest.raises(KeyboardInterrupt), a_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert "interrupted in writing" in caplog.text and "it is as it was" in caplog.text
