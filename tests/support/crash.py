"""Crashes: whatever an operation does to files, it is killed there, or that fails.

An operation runs in a forked child, in which each call that changes a file is counted; at the n-th
the child kills itself (a write is cut in half), or the call fails. `sweep` does so for every n and
looks at what is left. Operations that import torch come last: without it, a process forks faster.
`benchmarks/crash.py` runs all sweeps, and real kills at random moments.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import Child, Faults, Outcome

from axolotl_loram.errors import LONGEST

PAGE = os.sysconf("SC_PAGE_SIZE")
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
