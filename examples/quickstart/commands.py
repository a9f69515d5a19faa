"""Running installed commands in forks of one process, so that Axolotl is imported once, not often.

A fork runs the command's own entry point, as its script in `bin` does. What it and its libraries
say goes to a log; the terminal shows the last progress bar of that log.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",  # its threads would not survive a fork
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looks for GPUs without starting CUDA before a fork
}
IMPORTED = (
    "axolotl.cli.train",
    "axolotl.cli.merge_lora",
    "axolotl_loram.plugin",
    "axolotl_loram.results.evaluate",
    "axolotl_loram.results.report",
)


def warm_up(log: Path) -> float:
    """Import what the commands import; seconds. No thread may start here: forks would lack it."""
    say("Importing Axolotl", log)
    started = time.monotonic()
    os.environ |= ENVIRONMENT
    with _said_to(log):
        for name in IMPORTED:
            importlib.import_module(name)
    return _done(started)


def run(what: str, log: Path, program: str | Callable[[], object], *arguments: str | Path) -> float:
    """Run a command (or a function) in a fork and wait for it; seconds. A failure ends this too."""
    words = [str(program), *map(str, arguments)] if isinstance(program, str) else []
    say(what, log, *words)
    started = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=_run, args=(log, program, words))
    child.start()
    while child.is_alive():
        child.join(0.5)
        _show_progress(log, time.monotonic() - started)
    took = _done(started)
    if child.exitcode:
        sys.exit(f"\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}")
    return took


def say(what: str, log: Path | None = None, *command: str) -> None:
    """Announce a step on the terminal."""
    print(f"\n== {what}", file=sys.stderr)
    if command:
        print(f"   {' '.join(command)}", file=sys.stderr)
    if log:
        print(f"   log: {log}", file=sys.stderr, flush=True)


def _run(log: Path, program: str | Callable[[], object], words: list[str]) -> None:
    """In the fork: all output into the log, and the program's entry point."""
    with _said_to(log):
        try:
            if not isinstance(program, str):
                program()
                return
            sys.argv = words
            (entry,) = entry_points(group="console_scripts", name=program)
            entry.load()()
        except SystemExit as ended:
            if ended.code and not isinstance(ended.code, int):
                print(ended.code, file=sys.stderr)
            sys.exit(int(bool(ended.code)))
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


@contextmanager
def _said_to(log: Path) -> Iterator[None]:
    """Send this process's output and errors, those of C libraries too, into a file."""
    kept = [(stream, os.dup(stream.fileno())) for stream in (sys.stdout, sys.stderr)]
    with log.open("wb") as file:
        for stream, _ in kept:
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        try:
            yield
        finally:
            for stream, before in kept:
                stream.flush()
                os.dup2(before, stream.fileno())
                os.close(before)


def _show_progress(log: Path, seconds: float) -> None:
    """Repeat the last progress bar of a log on the terminal."""
    if sys.stderr.isatty():
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        bars = re.findall(r"([\d.]+/[\d.]+ \[[^\]]+\])", text)
        print(f"\r   {seconds:4.0f} s  {bars[-1] if bars else '':60}", end="", file=sys.stderr)


def _done(started: float) -> float:
    took = time.monotonic() - started
    clear = "\r" if sys.stderr.isatty() else ""
    print(f"{clear}   done in {took:.0f} s{' ' * 60 * bool(clear)}", file=sys.stderr, flush=True)
    return round(took, 1)
