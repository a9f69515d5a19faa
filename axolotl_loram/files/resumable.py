"""Long jobs that go on where they were interrupted.

What a job has finished lies in a hidden folder beside its target, named by what the job is: the
same command finds it, another one does not. When the job is complete, its result takes the target's
name, and the folder goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import refuse_occupied
from axolotl_loram.files.targets import Target, alone, hidden, locked, put_whole, real, remove
from axolotl_loram.files.tensors import StoredTensor, open_safetensors, write_safetensors

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """The finished steps of a job, each a file that is complete if it exists."""

    folder: Path

    @property
    def result(self) -> Path:
        """Folder that becomes the target."""
        return self.folder / "result"

    def has(self, step: str) -> bool:
        """Whether a step is finished."""
        return self._file(step).exists()

    def save(
        self,
        step: str,
        arrays: Mapping[str, tuple[str, np.ndarray]],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep a step's outcome: name → (dtype as safetensors names it, bits), and facts."""
        described = [(name, dtype, bits.shape) for name, (dtype, bits) in arrays.items()]
        data = (bits for _, bits in arrays.values())
        with put_whole(self._file(step)) as file:
            write_safetensors(file, described, data, {"about": json.dumps(dict(about or {}))})

    def load(self, step: str) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        """What `save` kept."""
        tensors, metadata = open_safetensors(self._file(step))
        return tensors, json.loads(metadata["about"])

    def _file(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"


def work_folder(target: Path, identity: Mapping[str, Any]) -> Path:
    """Where the steps of a job lie until it is complete: a hidden folder beside its target."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return hidden(real(target), digest[:16])


def check_free(target: Path, identity: Mapping[str, Any], needed: int, remedy: str) -> None:
    """Refuse to start a job, as `resumable` takes it, without the `needed` bytes of disk space.

    What the job has done already is counted in; `remedy` says what to do.
    """
    with locked(real(target)):
        pass  # something can be written there
    existing = next(path for path in (target, *target.resolve().parents) if path.exists())
    done = [file for file in work_folder(target, identity).rglob("*") if file.is_file()]
    found = shutil.disk_usage(existing).free + sum(file.stat().st_size for file in done)
    if found < needed:
        raise LoRAMError(
            f"expected {needed / 2**30:.3g} GiB free for {target} and the work on it, found "
            f"{found / 2**30:.3g} GiB in {existing}: {remedy}"
        )


@contextmanager
def resumable(target: Path, identity: Mapping[str, Any], overwrite: bool = False) -> Iterator[Work]:
    """The work on `target`; its result becomes `target` when the block ends.

    An interrupt, a crash or a full disk leaves the finished steps for the next call; wrong input
    (LoRAMError) leaves nothing.

    Args:
        target: Folder to make: at every moment absent, the old folder, or the complete new one.
        identity: Everything that decides the result, as JSON.
        overwrite: Whether `target` may be replaced.

    Raises:
        LoRAMError: `target` may not be replaced, cannot be written, or another process is at it.
    """
    with _kept(target, identity, lambda place: refuse_occupied(place.path, overwrite)) as found:
        place, work = found
        work.result.mkdir(exist_ok=True)
        yield work
        place.replace(work.result)


@contextmanager
def unfinished(target: Path, identity: Mapping[str, Any]) -> Iterator[Work]:
    """The finished steps of a job whose result is no folder; they go when the block ends well.

    Raises:
        LoRAMError: Nothing can be written there, or another process is at it.
    """
    with _kept(target, identity, lambda place: None) as (_, work):
        yield work
        remove(work.folder)


@contextmanager
def _kept(
    target: Path, identity: Mapping[str, Any], check: Callable[[Target], None]
) -> Iterator[tuple[Target, Work]]:
    target = real(target)
    work = Work(work_folder(target, identity))
    goes_on = f"goes on with what is done in {work.folder}"
    with alone(target, f"make room and run the same command again, which {goes_on}") as place:
        check(place)
        if work.folder.exists():
            LOG.warning("going on with the interrupted work in %s", work.folder)
        work.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield place, work
        except LoRAMError:
            shutil.rmtree(work.folder, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            LOG.warning("the same command %s", goes_on)
            raise
