"""Whole-process figures of commands, and CSV rows that say where they were taken."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command, as the kernel accounts them."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed: {complaint.decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def surroundings(*packages: str) -> dict[str, str]:
    """Hardware, versions (of further packages too) and commit, for a CSV row."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "hardware": f"{os.cpu_count()} × {models[0] if models else platform.processor()}",
        "versions": " ".join(
            [f"python {platform.python_version()}"]
            + [_named(package) for package in ("torch", "numpy", "safetensors", *packages)]
        ),
        "commit": commit,
    }


def _named(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def append_row(file: Path, row: dict[str, object]) -> None:
    """Add a row, with the header first if the file is new."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
