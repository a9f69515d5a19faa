"""Faults: a forked child in which one call that changes a file kills it, or fails."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files import targets

tqdm.set_lock(threading.RLock())  # tqdm's own is shared with children, also if one dies holding it
tqdm.monitor_interval = 0  # no second thread, which a fork leaves behind
GROWING = ("open", "write", "pwrite", "mkdir", "sendfile", "link", "symlink")
"""Calls that a full disk does not let through."""
CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "fsync")
OPEN = io.open
CALLS += ("pwrite", "sendfile", "truncate", "ftruncate", "chmod")


class Faults:
    """Counts what this process does to files, and lets one go wrong.

    Args:
        at: Which call, from 1; none by default.
        error: What it fails with; by default the process is killed.
    """

    def __init__(self, at: int = 0, error: int | None = None) -> None:
        self.at, self.error, self.count = at, error, 0
        self.reached = False
        self.synced: list[int] = []

    def install(self) -> None:
        """Put counting calls in the place of the real ones, until this process ends."""
        for name in CALLS:
            setattr(os, name, self._counting(name, getattr(os, name)))
        targets._exchange = self._counting("exchange", targets._exchange)
        real_open = os.open

        def low_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.step("open")
            return real_open(path, flags, *rest, **options)

        os.open = low_open
        io.open = builtins.open = self._open

    def _counting(self, name: str, real: Callable) -> Callable:
        def call(*given: Any, **options: Any) -> Any:
            self.step(name)
            if name == "fsync":
                self.synced.append(os.fstat(given[0]).st_ino)
            return real(*given, **options)

        return call

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any
    ) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int) or "opener" in options:
            return OPEN(file, mode, buffering, *text, **options)
        self.step("open")
        raw = _CountedFile(file, mode.replace("b", "").replace("t", ""))
        raw.faults = self
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)

    def step(self, what: str) -> None:
        """One call is about to be made."""
        if self.goes_wrong(what):
            self.go_wrong()

    def goes_wrong(self, what: str) -> bool:
        """Whether this call is to go wrong; a disk that is full stays so."""
        if self.error == errno.ENOSPC and what not in GROWING:
            return False
        self.count += 1
        hit = self.count == self.at or (self.error == errno.ENOSPC and 0 < self.at < self.count)
        self.reached |= hit
        return hit

    def go_wrong(self) -> None:
        """Be killed, or fail."""
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


class _CountedFile(io.FileIO):
    faults: Faults

    def write(self, data: Any) -> int:
        if self.faults.goes_wrong("write"):
            super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            self.faults.go_wrong()
        return super().write(data)


@dataclass
class Outcome:
    """How a child ended.

    Attributes:
        ended: "done", "refused" (LoRAMError), "failed" (anything else) or "killed".
        told: The error's message.
        logged: Warnings.
        reached: Whether the call that was to go wrong came.
        synced: Inodes that it brought to the disk.
    """

    ended: str
    told: str = ""
    logged: list[str] = field(default_factory=list)
    reached: bool = True
    synced: list[int] = field(default_factory=list)


class Child:
    """A forked process that does something and tells how it went."""

    def __init__(self, action: Callable[[], Any], faults: Faults | None = None, **limits: int):
        self.readable, writable = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writable)
            return
        try:
            outcome = _attempt(action, faults or Faults(), limits)
            os.write(writable, json.dumps(asdict(outcome)).encode())
        finally:
            os._exit(0)

    def wait(self) -> Outcome:
        """How it went."""
        with OPEN(self.readable, "rb") as told:
            text = told.read()
        os.waitpid(self.pid, 0)
        return Outcome(**json.loads(text)) if text else Outcome("killed")

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _attempt(action: Callable[[], Any], faults: Faults, limits: dict[str, int]) -> Outcome:
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().handlers = [handler]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if limits:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)
    if faults.at:
        faults.install()
    ended, told = "done", ""
    try:
        action()
    except LoRAMError as error:
        ended, told = "refused", str(error)
    except BaseException:
        ended, told = "failed", traceback.format_exc()
    return Outcome(ended, told, logged, faults.reached, faults.synced)
