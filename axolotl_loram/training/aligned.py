"""The aligned checkpoint: what the trainer saved, in the pruned model's format, with its plan."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.pairing import (
    check_plan,
    check_pruned,
    is_derived,
    weights_fingerprint,
)
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import updated_folder
from axolotl_loram.files.find import TOKENIZER_PATTERNS
from axolotl_loram.files.tensors import (
    FLOATS,
    MODEL_FILE,
    Checkpoint,
    StoredTensor,
    finite,
    write_index,
    write_safetensors,
)
from axolotl_loram.files.untrusted import copy_files
from axolotl_loram.models.bits import from_bits, to_bits
from axolotl_loram.results.checks import sha256_of

LOG = logging.getLogger(__name__)
CARRIED = ("config.json", "generation_config.json", PLAN_FILE, *TOKENIZER_PATTERNS)
"""What an aligned checkpoint takes over from the pruned one as it is."""


def assemble(
    trained: Path,
    pruned: Path,
    output: Path,
    alignment: Mapping[str, Any],
    frozen: Collection[str] = (),
) -> dict[str, Any]:
    """Write the aligned checkpoint `output` of what the trainer saved; returns its record.

    Weights keep the dtype that the pruned checkpoint stores them in; `frozen` ones are the pruned
    model's own, bit for bit. Files that have it already are linked into `output`, where the file
    system can; when all is in its place, those in `trained` are removed.

    Raises:
        LoRAMError: A weight is missing, of another shape, or not finite; `output` stays as it was.
    """
    plan = PruningPlan.load(pruned)
    check_plan(pruned, plan)
    with updated_folder(output, "config.json", weight_files) as scratch:
        files = _write_weights(trained, pruned, scratch, set(frozen))
        copy_files(pruned, scratch, CARRIED)
        check_pruned(scratch, plan)
        record = _record(pruned, scratch, files, alignment)
        record.save(scratch)
    try:
        remove_weights(trained)
    except OSError as error:
        LOG.warning("%s is complete, but weights stay in %s: %s", output, trained, error)
    return record.as_json()


def _record(
    pruned: Path, folder: Path, files: Mapping[str, str], alignment: Mapping[str, Any]
) -> Record:
    """The record of an aligned checkpoint, else complete: the pruned one's, one alignment more.

    `files` has the SHA-256 of its weights' files; those of the others are computed.
    """
    there = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    rest = {name: sha256_of(file) for name, file in there.items() if name not in files}
    record = Record.load(pruned)
    written = Checkpoint(folder)
    return replace(
        record,
        alignments=[*(record.alignments or []), dict(alignment)],
        weight_bytes=written.nbytes,
        fingerprint=weights_fingerprint(written),
        files=dict(sorted({**rest, **files}.items())),
    )


def remove_weights(folder: Path) -> None:
    """Remove a model's weights from a folder that keeps other things too."""
    for file in weight_files(folder):
        file.unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """A model's weights and their index, under whatever names."""
    stem = MODEL_FILE.partition(".")[0]
    return [*folder.glob(f"{stem}*.safetensors"), *folder.glob(f"{MODEL_FILE}.index.json")]


def _write_weights(trained: Path, pruned: Path, folder: Path, frozen: set[str]) -> dict[str, str]:
    """Write every shard of the trained model; returns file name → SHA-256."""
    new, stored = Checkpoint(trained), Checkpoint(pruned)
    config = load_config(str(pruned))
    missing = [
        name for name in stored.tensors if name not in new.tensors and not is_derived(name, config)
    ]
    if missing:
        raise LoRAMError(
            f"expected all weights of the aligned model in {trained}, found no {missing[0]} "
            f"({len(missing)} such): resume from the last checkpoint in it"
        )
    files, held = {}, {}
    for file, names in new.shards.items():
        parts = [_part(new[name], stored.tensors.get(name), name in frozen) for name in names]
        held[file] = [(part.source.name, part.dtype, part.source.shape) for part in parts]
        if all(part.source.file.parent == trained and not part.converts for part in parts):
            for part in parts:
                for _ in part.blocks():  # refuses what is not finite
                    pass
            _link(trained / file, folder / file)
            files[file] = sha256_of(folder / file)
        else:
            data = (part.blocks() for part in parts)
            files[file] = write_safetensors(folder / file, held[file], data)
    if MODEL_FILE not in new.shards:
        write_index(folder, held)
    return files


@dataclass(frozen=True)
class _Part:
    """A weight to write: where it is, and the dtype to write it in."""

    source: StoredTensor
    dtype: str

    @property
    def converts(self) -> bool:
        """Whether its dtype is another than the one it has."""
        return self.dtype != self.source.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Its bits, some rows at a time.

        Raises:
            LoRAMError: They hold a NaN or an infinity.
        """
        for block in self.source.blocks():
            if self.converts:
                block = to_bits(from_bits(block, self.source.dtype), self.dtype)
            if not finite(block, self.dtype):
                raise LoRAMError(
                    f"expected finite weights, found NaN or infinity in {self.source.name}: the "
                    "alignment diverged; lower the learning rate and start again"
                )
            yield block


def _part(tensor: StoredTensor, stored: StoredTensor | None, frozen: bool) -> _Part:
    if stored is None or stored.dtype == tensor.dtype:
        return _Part(tensor, tensor.dtype)
    if frozen or not {stored.dtype, tensor.dtype} <= set(FLOATS):
        return _Part(stored, stored.dtype)
    return _Part(tensor, stored.dtype)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
