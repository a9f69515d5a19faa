"""Writing folders and files that are whole or absent, whenever their writer is killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.targets import GONE, alone, hidden, real, remove, sync_all


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON for people to read."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and vanishes if it fails.

    `target` is at every moment absent, the old folder, or the complete new one.

    Raises:
        LoRAMError: `target` holds something and `overwrite` is false, or nothing can be written,
            or another process writes it.
    """
    with alone(real(target)) as place:
        refuse_occupied(place.path, overwrite)
        with place.scratch() as scratch:
            yield scratch
            place.replace(scratch)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path for a file that becomes `target` when the block ends, and vanishes if it fails.

    Raises:
        LoRAMError: It cannot be written, or another process writes it.
    """
    with alone(real(target)) as place:
        if place.path.is_dir():
            raise LoRAMError(f"expected {target} to be a file to write, found a folder")
        partial = place.hidden("partial")
        try:
            yield partial
            place.replace(partial)
        finally:
            remove(partial)


@contextmanager
def updated_folder(
    target: Path, last: str, outdated: Callable[[Path], Iterable[Path]] = lambda folder: ()
) -> Iterator[Path]:
    """A temporary folder whose files move into `target` when the block ends.

    For a folder that keeps other things too. The file `last`, without which the rest means nothing,
    is taken away first and put back last: a reader finds the old files, no `last`, or the new ones.
    By then the new ones are complete: if their move is cut off, the next call ends it first.

    Args:
        target: The folder; made where there is none.
        last: Name of the file.
        outdated: Files of `target` that must not stay beside the new ones, found in the end.

    Raises:
        LoRAMError: It cannot be written, or another process writes it.
    """
    with alone(real(target) / last) as place:
        with place.scratch() as scratch:
            yield scratch
            names = [file.name for file in outdated(place.path.parent)]
            for name in names:
                if not (scratch / name).exists():
                    (scratch / GONE).mkdir(exist_ok=True)
                    (scratch / GONE / name).touch()
            sync_all(scratch)
            scratch.replace(place.hidden("ready"))
        place.move_in()


def check_vacant(target: Path, overwrite: bool = False) -> None:
    """Refuse a target that would be overwritten unasked, or that others write; before the work."""
    target = real(target)
    if hidden(target, "lock").exists():
        with alone(target):  # in which what a killed process left is settled
            pass
    refuse_occupied(target, overwrite)


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """`check_vacant`, for the one process that writes `target`."""
    if target.is_file():
        raise LoRAMError(f"expected {target} to be a folder to write, found a file")
    if target.is_mount():
        raise LoRAMError(
            f"expected {target} to be a folder that can be renamed, found that another disk is "
            "mounted there: choose a folder in it"
        )
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise LoRAMError(
            f"expected {target} to be new or empty, found files in it: choose another folder or "
            "pass --overwrite"
        )


def made_once(stem: Path, identity: list[Any], make: Callable[[Path], None]) -> Path:
    """The folder ``stem-<digest of identity>``, made by whichever process comes first.

    A file lock makes the others wait, so that no process group and no timeout is involved; each
    node makes its own where they share no disk.

    Raises:
        LoRAMError: Nothing can be written, or locked, there.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = stem.with_name(f"{stem.name}-{digest[:16]}")
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where a disk knows no locks
        raise LoRAMError(
            f"expected {folder.parent} to be a folder to write in, found {error}: name another "
            "(cache_dir, or output_dir)"
        ) from None
    try:
        if not folder.exists():
            make(folder)
    finally:
        lock.release()
    return folder
