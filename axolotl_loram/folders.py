"""Writing folders that are whole or absent, and files that have reached the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from axolotl_loram.errors import LoRAMError


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON for people to read."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and vanishes if it fails.

    `target` is at every moment absent, the old folder, or the complete new one.

    Raises:
        LoRAMError: `target` holds something and `overwrite` is false, or nothing can be written.
    """
    check_vacant(target, overwrite)
    with _scratch_beside(target) as scratch:
        yield scratch
        replace_folder(scratch, target)


def replace_folder(scratch: Path, target: Path) -> None:
    """Give a complete folder beside `target` its name, once all of it has reached the disk."""
    _sync_all(scratch)
    with _scratch_beside(target) as old:
        if target.exists():
            target.replace(old / "old")
        scratch.replace(target)
    sync(target.parent)


def check_vacant(target: Path, overwrite: bool = False) -> None:
    """Refuse a target that would be overwritten unasked; called before the long work."""
    if target.is_file():
        raise LoRAMError(f"expected {target} to be a folder to write, found a file")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise LoRAMError(
            f"expected {target} to be new or empty, found files in it: choose another folder or "
            "pass --overwrite"
        )


def made_once(stem: Path, identity: list[Any], make: Callable[[Path], None]) -> Path:
    """The folder ``stem-<digest of identity>``, made by whichever process comes first.

    A file lock makes the others wait, so that no process group and no timeout is involved; each
    node makes its own where they share no disk.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = stem.with_name(f"{stem.name}-{digest[:16]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            make(folder)
    return folder


@contextmanager
def updated_folder(target: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files move into `target` when the block ends.

    For a folder that keeps other things too. The file `last`, without which the rest means nothing,
    is taken away first and put back last: a reader finds the old files, no `last`, or the new ones.
    """
    target.mkdir(parents=True, exist_ok=True)
    with _scratch_beside(target / last) as scratch:
        yield scratch
        _sync_all(scratch)
        (target / last).unlink(missing_ok=True)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == last):
            file.replace(target / file.name)
        sync(target)


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise LoRAMError(
            f"expected to be able to write in {target.parent}, found: {error.strerror}"
        ) from None
    try:
        yield scratch
    except OSError as error:
        raise LoRAMError(
            f"expected to write {target}, found: {error.strerror or error}; nothing of it was "
            "kept, so make room or choose another folder and run it again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    """`sync` everything below `folder`, and itself."""
    folder.chmod(0o755)  # mkdtemp gives 0o700; the result is an ordinary folder
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Make sure that a file, or the list of a folder's files, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
