"""The one writer of a target: what it makes takes the target's name at once, or not at all.

What is being made lies beside its target under hidden names that follow from the target's:

* ``.NAME.lock`` is locked by the process that writes; a kill unlocks it, so that whatever else the
  next one finds under these names is of the dead;
* ``.NAME.partial`` is what grows, and after an exchange of names what was there before;
* ``.NAME.ready`` holds files that are complete and on their way into a folder;
* ``.NAME.old`` is the target itself, for a moment, where names cannot be exchanged;
* ``.NAME.<16 digits>`` is the work of a job that can be gone on with (`work`).

Links are written through: a target that is one stays one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from axolotl_loram.errors import LoRAMError

LOG = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems without locks answer: who writes there has to be alone by itself."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
GONE = ".gone"
"""Folder in ``.NAME.ready``: its files name those that go when the others come."""


class Target:
    """What this process alone writes, without links; `replaced` once it is the new one."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self.lock, self.replaced = path, lock, False

    def hidden(self, what: str) -> Path:
        """One of the names beside it."""
        return hidden(self.path, what)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder beside it, until the block ends."""
        folder = self.hidden("partial")
        folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)

    @property
    def state(self) -> str:
        """What there is now, for messages."""
        if self.replaced:
            return "the new one is complete"
        if self.hidden("ready").exists():
            return "the new files are complete, and the next run puts them in their place"
        if self.hidden("old").exists():
            return "the next run puts the old one back"
        return "it is as it was" if self.path.exists() else "there is still none"

    def replace(self, made: Path) -> None:
        """Give what was made beside it the name, once all is on the disk; the old one goes."""
        sync_all(made)
        partial, old = self.hidden("partial"), self.hidden("old")
        if made != partial:
            made.replace(partial)
        self._note(partial)
        try:
            partial.replace(self.path)  # in the place of none, of an empty folder, or of a file
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not _exchange(partial, self.path):
                self.path.replace(old)
                try:
                    partial.replace(self.path)
                except OSError:
                    old.replace(self.path)
                    raise
        self.replaced = True
        sync(self.path.parent)
        self.tidy()

    def move_in(self) -> None:
        """Move what is ready into the folder; called again, it goes on where it was."""
        ready, folder = self.hidden("ready"), self.path.parent
        sync(folder)
        if (ready / self.path.name).exists():
            self.path.unlink(missing_ok=True)
            sync(folder)
            for name in (ready / GONE).iterdir() if (ready / GONE).exists() else ():
                (folder / name.name).unlink(missing_ok=True)
            for file in ready.iterdir():
                if file.name not in (self.path.name, GONE):
                    _move(file, folder / file.name)
            sync(folder)
            self._note(ready / self.path.name)
            (ready / self.path.name).replace(self.path)
        self.replaced = True
        sync(folder)
        remove(ready)

    def _note(self, made: Path) -> None:
        """Let who settles this, if it is cut off, tell the new target from the old one."""
        os.pwrite(self.lock, str(made.stat().st_ino).encode(), 0)

    def settle(self) -> None:
        """Put in order what killed processes left, and tell what the target is."""
        old, noted = self.hidden("old"), os.pread(self.lock, 20, 0).decode("ascii", "replace")
        left = bool(noted)
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, b"-", 0)
        if self.hidden("ready").exists():
            self.move_in()
            left = True
        elif old.exists() and not self.path.exists():
            old.replace(self.path)
            left = True
        elif self.path.exists() and noted == str(self.path.stat().st_ino):
            self.replaced = True
        if self.rest:
            self.tidy()
            left = True
        if left:
            LOG.warning("a run that wrote %s was interrupted: %s", self.path, self.state)
        self.replaced = False

    @property
    def rest(self) -> list[Path]:
        """What beside it has to go; once it is the new one, also the work of other jobs on it."""
        left = [self.hidden("partial"), self.hidden("old")]
        if self.replaced:
            left += self.path.parent.glob(f".{glob.escape(self.path.name)}.{'[0-9a-f]' * 16}")
        return [path for path in left if path.exists()]

    def tidy(self) -> None:
        """Remove the rest."""
        for path in self.rest:
            remove(path)


@contextmanager
def alone(
    target: Path, advice: str = "make room or choose another folder, and run it again"
) -> Iterator[Target]:
    """The one writer of `target` (links followed); what killed ones left of it is settled.

    Raises:
        LoRAMError: Another process writes it, or it cannot be written; it says what there is then.
    """
    with locked(target) as lock:
        place = Target(target, lock)
        try:
            place.settle()
            yield place
        except OSError as error:
            reason = error.strerror or str(error)
            where = f" ({error.filename})" if error.filename else ""
            raise LoRAMError(
                f"expected to write {target}, found: {reason}{where}; {place.state}: {advice}"
            ) from error
        except KeyboardInterrupt:
            LOG.warning("interrupted in writing %s: %s", target, place.state)
            raise
        finally:
            if not place.rest and not place.hidden("ready").exists():
                with suppress(OSError):
                    os.ftruncate(lock, 0)


@contextmanager
def locked(target: Path) -> Iterator[int]:
    """Keep other processes off `target`; gives the open lock file, which goes if it is empty.

    Raises:
        LoRAMError: Another process is there, or nothing can be written beside `target`.
    """
    file = hidden(target, "lock")
    try:
        _make_folder(file.parent)
        lock = _lock(file)
    except BlockingIOError:
        raise LoRAMError(
            f"expected to be alone in writing {target}, found another process at it: wait for it"
        ) from None
    except OSError as error:
        raise LoRAMError(
            f"expected to be able to write in {file.parent}, found: {error.strerror}"
        ) from None
    try:
        yield lock
    finally:
        with suppress(OSError):
            if os.fstat(lock).st_size == 0:  # else something is left, for the next to settle
                file.unlink()  # while it is locked: who has it open looks whether it still is it
        os.close(lock)


def _lock(file: Path) -> int:
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(lock)
                raise
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), file.stat()):
                return lock
        os.close(lock)  # its owner was done, and took it away


def real(target: Path) -> Path:
    """Where `target` is, links followed.

    Raises:
        LoRAMError: The links lead nowhere.
    """
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:
        raise LoRAMError(f"expected {target} to be a place to write, found {error}") from None


def hidden(target: Path, what: str) -> Path:
    """One of the names beside a target."""
    return target.with_name(f".{target.name}.{what}")


def _move(made: Path, place: Path) -> None:
    """Give a file or folder its place; of a folder that is there already, each of its files."""
    if made.is_dir() and place.is_dir():
        for file in made.iterdir():
            file.replace(place / file.name)
        sync(place)
    else:
        made.replace(place)


def _make_folder(folder: Path) -> None:
    """Make a folder and what it is in, all of it on the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once, if C library, kernel and file system can (Linux)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        return False
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed, the next run tries to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sync_all(made: Path) -> None:
    """`sync` a file, or a folder and everything below it."""
    for path in sorted(made.rglob("*")) if made.is_dir() else ():
        sync(path)
    sync(made)


@contextmanager
def put_whole(file: Path) -> Iterator[Path]:
    """A path to write to: what is there when the block ends reaches the disk, then has the name."""
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    sync(partial)
    partial.replace(file)


def sync(path: Path) -> None:
    """Make sure that a file, or the list of a folder's files, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # what some network disks answer
            raise
    finally:
        os.close(descriptor)
