"""Crashes: whatever an operation does to files, it is killed there, or that fails.

An operation runs in a forked child, in which each call that changes a file is counted; at the n-th
the child kills itself (a write is cut in half), or the call fails. `sweep` does so for every n and
looks at what is left. Operations that import torch come last: without it, a process forks faster.
`benchmarks/crash.py` runs all sweeps, and real kills at random moments.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import hostile
from tqdm import tqdm

from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LONGEST, LoRAMError
from axolotl_loram.files import targets
from axolotl_loram.files.tensors import MODEL_FILE, Checkpoint, write_safetensors
from axolotl_loram.pruning.prune import prune
from axolotl_loram.recovery.recover import default_output, recover
from axolotl_loram.results.publish import Publication

tqdm.set_lock(threading.RLock())  # tqdm's own is shared with children, also if one dies holding it
tqdm.monitor_interval = 0  # no second thread, which a fork leaves behind
PAGE = os.sysconf("SC_PAGE_SIZE")
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


Snapshot = dict[str, bytes | None]
"""Path below a folder → content; None for a folder."""


def snapshot(folder: Path) -> Snapshot:
    """All that is in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass
class Operation:
    """Something that writes a target.

    Attributes:
        run: Does it, in a folder of its own.
        target: The folder or file there that it writes.
        prepare: Puts into that folder what is there before.
        again: What happens before the same command is given once more.
        last: Without this file, the target means nothing; None: the target comes and goes whole.
        gap: Whether the target is away for a moment, where names cannot be exchanged.
        others: Names in the target that are not its business.
        replaces: Whether a complete target may be replaced.
    """

    run: Callable[[Path], Any]
    target: str
    prepare: Callable[[Path], Any] = lambda place: None
    again: Callable[[Path], Any] = lambda place: None
    last: str | None = None
    gap: bool = False
    others: Collection[str] = ()
    replaces: bool = True

    def view(self, place: Path) -> Snapshot | None:
        """What a reader finds; None for nothing."""
        target = place / self.target
        if target.is_file():
            return {"": target.read_bytes()}
        if not target.exists() or (self.last and not (target / self.last).exists()):
            return None
        found = snapshot(target)
        top = {name: name.split("/")[0] for name in found}
        return {
            name: content
            for name, content in found.items()
            if top[name] not in self.others and not (self.last and top[name].startswith("."))
        }


class Stage:
    """A place in which an operation is tried again and again, always from the same start."""

    def __init__(self, operation: Operation, place: Path) -> None:
        self.operation, self.place = operation, place
        self.set()
        self.old = operation.view(place)
        operation.run(place)  # in this process, so that children need to import nothing
        self.set()
        started = time.perf_counter()
        outcome = Child(lambda: operation.run(place)).wait()
        self.seconds = time.perf_counter() - started
        assert outcome.ended == "done", outcome
        self.new, self.whole = operation.view(place), snapshot(place)
        assert self.old != self.new is not None

    def set(self) -> None:
        """Everything as it is before."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.operation.prepare(self.place)

    def start(self, faults: Faults | None = None, **limits: int) -> Child:
        """The operation, in a child."""
        return Child(lambda: self.operation.run(self.place), faults, **limits)

    def state(self) -> str:
        """What the target is now: "none", "old", "new", "between" (no `last`) or "torn"."""
        found = self.operation.view(self.place)
        if found == self.new:
            return "new"
        if found == self.old:
            return "none" if found is None else "old"
        gap = self.operation.last or self.operation.gap
        return "between" if found is None and gap else "torn"

    def unsynced(self, outcome: Outcome) -> Iterator[str]:
        """What a power cut could take from a run that was not disturbed."""
        target = (self.place / self.operation.target).resolve()
        kept = self.old or {}  # what an update leaves alone
        changed = {n for n, content in (self.new or {}).items() if kept.get(n, "") != content}
        for name in ("." if self.operation.last else "..", *sorted(changed)):
            if (target / name).stat().st_ino not in outcome.synced:
                yield f"{name} may not have reached the disk"

    def faults_of(self, outcome: Outcome) -> Iterator[str]:
        """What is wrong after a run that something happened to; then the same command is given."""
        state = self.state()
        if state == "torn":
            yield f"the target is torn ({outcome.ended})"
        if outcome.ended == "failed":
            yield f"a traceback: {outcome.told.splitlines()[-1]}"
        if outcome.ended == "done" and state != "new":
            yield f"succeeded, but the target is {state}"
        if outcome.ended == "refused":
            yield from _badly_told(outcome.told, state)
        self.operation.again(self.place)
        second = self.start().wait()
        refused_as_it_should = (
            state == "new" and not self.operation.replaces and second.ended == "refused"
        )
        if second.ended != "done" and not refused_as_it_should:
            yield f"from {state}, the next run {second.ended}: {second.told[-300:]}"
        elif self.state() != "new":
            yield f"from {state}, the next run's result is another: {self.state()}"
        else:
            left = snapshot(self.place).keys() ^ self.whole.keys()
            if left:
                yield f"from {state}, the next run leaves {sorted(left)[:3]}"


NOT_BEGUN = ("expected to be able to write in", "GiB free")
TOLD = {
    "none": ("there is still none", "the next run puts them in their place", *NOT_BEGUN),
    "old": ("it is as it was", "the next run puts them in their place", *NOT_BEGUN),
    "new": ("the new one is complete", "new or empty"),
    "between": ("the next run puts",),
}
"""State of the target → what a message may say of it."""


def _badly_told(told: str, state: str) -> Iterator[str]:
    if "\n" in told or len(told) >= LONGEST:
        yield f"talked long: {told}"
    if not any(words in told for words in TOLD.get(state, ())):
        yield f"does not say that the target is {state}: {told}"


def sweep(
    operation: Operation, place: Path, error: int | None = None, step: int = 1
) -> tuple[int, list[str]]:
    """Let each call in turn go wrong, or each `step`-th.

    Returns:
        How many went wrong, and what of that was not as it should be.
    """
    stage, wrong = Stage(operation, place), []
    for count, at in enumerate(range(1, 100_000, step)):
        stage.set()
        outcome = stage.start(Faults(at, error)).wait()
        if not outcome.reached:
            assert outcome.ended == "done" and stage.state() == "new", outcome
            return count, wrong + list(stage.unsynced(outcome))
        wrong += [f"call {at}: {fault}" for fault in stage.faults_of(outcome)]
    raise AssertionError("an operation without an end")


def at_random(
    operation: Operation, place: Path, count: int, chance: random.Random
) -> tuple[int, list[str]]:
    """Kill it at random moments; how many kills came before its end, and what is wrong."""
    stage, wrong, kills = Stage(operation, place), [], 0
    for number in range(count):
        stage.set()
        child = stage.start()
        time.sleep(chance.random() * stage.seconds * 1.1)
        child.kill()
        outcome = child.wait()
        kills += outcome.ended == "killed"
        wrong += [f"kill {number}: {fault}" for fault in stage.faults_of(outcome)]
    return kills, wrong


def at_once(
    operation: Operation, place: Path, count: int, chance: random.Random
) -> tuple[int, list[str]]:
    """Two processes on one target; how many were refused, and what is wrong."""
    stage, wrong, refused = Stage(operation, place), [], 0
    for number in range(count):
        stage.set()
        first = stage.start()
        time.sleep(chance.random() * stage.seconds)
        both = [child.wait() for child in (stage.start(), first)]
        ended = [outcome.ended for outcome in both]
        refused += ended.count("refused")
        if "done" not in ended or "failed" in ended or stage.state() != "new":
            wrong.append(f"pair {number}: {stage.state()}, {[each.told[-300:] for each in both]}")
        elif snapshot(stage.place).keys() != stage.whole.keys():
            wrong.append(f"pair {number}: left something beside")
    return refused, wrong


def own_mounts() -> bool:
    """Give this process mounts of its own, which end with it; whether it may have such."""
    libc, user = ctypes.CDLL(None, use_errno=True), os.getuid()
    ids = {"uid_map": f"0 {user} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    new_mounts, new_users, everything_private = 0x20000, 0x10000000, 0x44000
    if libc.unshare(new_mounts if user == 0 else new_mounts | new_users):
        return False
    for name, line in ids.items() if user else ():
        Path("/proc/self", name).write_text(line)
    return libc.mount(b"none", b"/", None, everything_private, None) == 0


@contextmanager
def small_disk(room: Path) -> Iterator[Callable[[str], None]]:
    """A disk of its own at `room`; gives a function that changes its options, such as its size."""
    room.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", room], check=True)
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", room], check=True)
    finally:
        subprocess.run(["umount", room], check=True)


def full_disk(operation: Operation, room: Path, step: int = 1) -> tuple[int, list[str]]:
    """Disks that are full after any number of pages; how many were, and what is wrong."""
    wrong: list[str] = []
    with small_disk(room) as change:
        stage = Stage(operation, room / "place")
        for count, pages in enumerate(range(0, 10_000, step)):
            stage.set()
            used = shutil.disk_usage(room).used
            change(f"size={used + pages * PAGE}" if used + pages else "size=1")
            outcome = stage.start().wait()
            change("size=100%")
            wrong += [f"{pages} pages: {fault}" for fault in stage.faults_of(outcome)]
            if outcome.ended == "done":
                return count, wrong
    raise AssertionError("an operation without an end")


def read_only(operation: Operation, room: Path) -> tuple[int, list[str]]:
    """A disk that cannot be written: refused, and nothing is another."""
    with small_disk(room) as change:
        stage = Stage(operation, room / "place")
        stage.set()
        before = snapshot(stage.place)
        change("ro")
        outcome = stage.start().wait()
        wrong = [] if outcome.ended == "refused" else [f"{outcome.ended} on a read-only disk"]
        wrong += [] if snapshot(stage.place) == before else ["changed a read-only disk"]
        change("rw")
        return 1, wrong + list(stage.faults_of(outcome))


@dataclass
class Scene:
    """What operations start from: artefacts that they only read, and what each changes."""

    whole: hostile.Artefacts
    other: Path
    recovered: Path

    @classmethod
    def make(cls, folder: Path) -> Scene:
        """Make them below a new folder."""
        with ProcessPoolExecutor(1) as other:  # it imports torch
            whole = other.submit(hostile.Artefacts.make, folder / "whole", "llama").result()
        for place in (whole.base, whole.adapter):
            hostile.write_tokenizer(place)
            (place / "tokenizer_config.json").write_text('{"a": 1}')
        other = folder / "other"
        prune(str(whole.base), other, PruningArgs(ratio=0.25, protect_first=1, protect_last=1))
        (other / "notes.txt").write_text("what somebody put there")
        recover(whole.adapter, str(whole.pruned), folder / "recovered")
        return cls(whole, other, folder / "recovered")

    def operations(self, plugin: bool = False) -> dict[str, Operation]:
        """All of them by name; with the plugin, runs end in its hook (half a minute to import)."""
        end_training = self._end_by_plugin if plugin else self._end_training
        end_alignment = self._end_alignment_by_plugin if plugin else self._end_alignment
        base, pruned, adapter = self.whole.base, self.whole.pruned, self.whole.adapter
        half = PruningArgs(ratio=0.5, protect_first=1, protect_last=1)
        sparse = PruningArgs(sparsity=0.5, method="magnitude")

        def old(place: Path) -> None:
            shutil.copytree(self.other, place / "out")

        def own_adapter(place: Path) -> None:
            shutil.copytree(adapter, place / "adapter")

        def old_recovered(place: Path) -> None:
            own_adapter(place)
            shutil.copytree(self.other, default_output(place / "adapter"))

        def old_behind_link(place: Path) -> None:
            shutil.copytree(self.other, place / "elsewhere")
            (place / "out").symlink_to("elsewhere")

        def recover_without_exchange(place: Path) -> None:
            with patch.object(targets, "_exchange", return_value=False):
                recover(place / "adapter", overwrite=True)

        def run_folder(place: Path) -> None:
            shutil.copytree(adapter, place / "out/pruned")

        def run_folder_again(place: Path) -> None:
            run_folder(place)
            recover(place / "out/pruned", str(pruned), place / "out", update=True, card="before")
            (place / "out/tokenizer.model").write_text("an earlier run's")

        return {
            "prune": Operation(
                lambda place: prune(str(base), place / "out", half), "out", replaces=False
            ),
            "prune --overwrite": Operation(
                lambda place: prune(str(base), place / "out", half, overwrite=True), "out", old
            ),
            "recover": Operation(
                lambda place: recover(adapter, output=place / "out"), "out", replaces=False
            ),
            "recover --overwrite": Operation(
                lambda place: recover(place / "adapter", overwrite=True),
                "recovered-adapter",
                old_recovered,
            ),
            "recover --overwrite through a link": Operation(
                lambda place: recover(adapter, output=place / "out", overwrite=True),
                "out",
                old_behind_link,
            ),
            "recover --overwrite without exchange": Operation(
                recover_without_exchange, "recovered-adapter", old_recovered, gap=True
            ),
            "publish --dry-run": Operation(
                lambda place: self._rehearse(self.recovered, place), "out", replaces=False
            ),
            "publish --dry-run --overwrite": Operation(
                lambda place: self._rehearse(self.recovered, place, overwrite=True), "out", old
            ),
            "publish --dry-run of a model": Operation(
                lambda place: self._rehearse(pruned, place), "out", replaces=False
            ),
            **{
                f"end of training{which}": Operation(
                    lambda place: end_training(place / "out"),
                    "out",
                    prepare,
                    last="adapter_config.json",
                    others=("pruned",),
                )
                for which, prepare in (("", run_folder), (", again", run_folder_again))
            },
            **{
                f"end of alignment{which}": Operation(
                    lambda place: end_alignment(place / "out"),
                    "out",
                    prepare,
                    again=self._save_trained,
                    last="config.json",
                    others=("training",),
                )
                for which, prepare in (
                    ("", self._save_trained),
                    (", again", self._save_trained_over_old),
                )
            },
            "prune --sparsity": Operation(
                lambda place: prune(str(base), place / "out", sparse), "out", replaces=False
            ),
        }

    def _rehearse(self, folder: Path, place: Path, **options: bool) -> None:
        Publication(folder, "me/it", output=place / "out", **options).rehearse()

    def _end_training(self, output: Path) -> None:
        base, pruned = Base(str(self.whole.base)), str(self.whole.pruned)
        recover(output / "pruned", pruned, output=output, base=base, update=True, card="a card")

    def _end_alignment(self, output: Path) -> None:
        from axolotl_loram.training.aligned import assemble

        assemble(output / "training", self.whole.pruned, output, {"objective": "a test"})

    def _end_by_plugin(self, output: Path) -> None:
        from axolotl_loram.models.formats import Formats
        from axolotl_loram.plugin import LoRAMPlugin
        from axolotl_loram.training.run import Run

        plan, plugin = PruningPlan.load(self.whole.pruned), LoRAMPlugin()
        base = Base(str(self.whole.base))
        plugin.run = Run(base, self.whole.pruned, plan, output, None, None, Formats())
        plugin.post_train_unload(SimpleNamespace(axolotl_config_path=None))

    def _end_alignment_by_plugin(self, output: Path) -> None:
        from axolotl_loram.config_loram import LoRAMConfig
        from axolotl_loram.plugin import LoRAMPlugin
        from axolotl_loram.training.align import Alignment

        plan, plugin = PruningPlan.load(self.whole.pruned), LoRAMPlugin()
        told = {"steps": 1, "tokens": 1, "data": [], "heldout_loss": None}
        section = LoRAMConfig(stage="align")
        plugin.alignment = Alignment("it", self.whole.pruned, plan, output, section, "", told)
        plugin.post_train_unload(SimpleNamespace())

    def _save_trained(self, place: Path) -> None:
        """What a run that is resumed leaves: the weights that it found are gone, and saved anew."""
        from axolotl_loram.training.aligned import remove_weights

        folder = place / "out/training"
        folder.mkdir(parents=True, exist_ok=True)
        remove_weights(folder)
        tensors = Checkpoint(self.whole.pruned).tensors.values()
        described = [(t.name, t.dtype, t.shape) for t in tensors]
        write_safetensors(folder / MODEL_FILE, described, (t.read() ^ 1 for t in tensors))

    def _save_trained_over_old(self, place: Path) -> None:
        shutil.copytree(self.whole.pruned, place / "out")  # in two shards
        self._save_trained(place)
