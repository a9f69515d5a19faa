"""Sequences that a model's outputs are stored for: what finds them again, and in which files.

They go through the model in parts, a layer in memory at a time; what is kept of a part is a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram import __version__
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.progress import Progress
from axolotl_loram.files.resumable import resumable
from axolotl_loram.files.targets import put_whole
from axolotl_loram.files.tensors import Data, TensorShape, write_safetensors
from axolotl_loram.memory.data import TOKENS_PER_PART
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk

TEACHER_FILE = "teacher.json"
DIGEST_BYTES = 16
LONGEST_IN_PART = 2
"""A part's sequences are padded to its longest, at most so many times as long as its shortest."""


@dataclass(frozen=True)
class Row:
    """A sequence.

    Attributes:
        tokens: Its token ids, without padding, (tokens,).
        trained: Which of them are trained, (tokens,); None where every place is kept. The first
            never is: nothing comes before it.
    """

    tokens: np.ndarray
    trained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def places(self) -> np.ndarray:
        """Positions whose outputs are kept: those before the trained tokens, or all."""
        if self.trained is None:
            return np.arange(len(self))
        return np.flatnonzero(self.trained[1:])

    @property
    def digest(self) -> bytes:
        """What it is found again by."""
        marks = b"" if self.trained is None else np.packbits(self.trained).tobytes()
        data = self.tokens.astype("<i4").tobytes() + marks
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def described(sequences: Sequence[Row], files: list[str]) -> dict[str, Any]:
    """What `teacher.json` says of the sequences, and of the files that hold the outputs on them.

    Raises:
        LoRAMError: There are no sequences.
    """
    if not sequences:
        raise LoRAMError(
            "expected token sequences for the teacher, found none: give some data, and for an "
            "anchor labels that are not all masked"
        )
    trained_only = any(row.trained is not None for row in sequences)
    return {
        "kind": "anchor" if trained_only else "teacher",
        "version": __version__,
        "trained_only": trained_only,
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "places": sum(len(row.places) for row in sequences),
        "sha256": data_digest(sequences),
        "files": files,
    }


def data_digest(sequences: Iterable[Row]) -> str:
    """SHA-256 of what `distinct` gives."""
    return hashlib.sha256(b"".join(row.digest for row in sequences)).hexdigest()


def distinct(rows: Iterable[Row | Sequence[int] | np.ndarray]) -> list[Row]:
    """Each sequence that has places to keep once, the shortest first."""
    every = (row if isinstance(row, Row) else Row(np.asarray(row, dtype=np.int32)) for row in rows)
    found = {row.digest: row for row in every if len(row.places)}
    return [found[key] for key in sorted(found, key=lambda key: (len(found[key]), key))]


def check_tokens(sequences: Sequence[Row], vocabulary: int) -> None:
    """Refuse tokens that a model with such a vocabulary lacks."""
    largest = max(int(row.tokens.max()) for row in sequences)
    if largest >= vocabulary:
        raise LoRAMError(
            f"expected token ids below the teacher's vocabulary of {vocabulary}, found {largest}: "
            "use the teacher's own tokenizer, without added tokens"
        )


def parts_of(sequences: Sequence[Row]) -> Iterator[list[Row]]:
    """Sequences that go through the layers together."""
    part: list[Row] = []
    for sequence in sequences:
        padded = (len(part) + 1) * len(sequence)
        if part and (
            padded > TOKENS_PER_PART or len(sequence) > LONGEST_IN_PART * max(len(part[0]), 32)
        ):
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part


def states_bytes(parts: Sequence[list[Row]], stream: LayerStream) -> int:
    """Bytes on disk of hidden states before and after a layer, of the part that has most."""
    most = max(len(part) * len(part[-1]) for part in parts)
    return 2 * most * stream.hidden_size * stream.dtype.itemsize


def write_parts(
    output: Path,
    record: dict[str, Any],
    parts: Sequence[list[Row]],
    stream: LayerStream,
    layers: int,
    progress: Progress,
    write: Callable[[Path, list[Row], Walk], None],
) -> None:
    """Take each part through the first layers, into the file of it that the record names.

    `write` is given a file, its part and the walk, and goes that to its end. What an interrupted
    call wrote is kept.
    """
    with resumable(output, record) as work:
        for part, name in zip(parts, record["files"], strict=True):
            file = work.result / name
            if not file.exists():
                walk = Walk(stream, work, _padded(part), file.stem, layers, progress)
                write(file, part, walk)
                walk.inputs(walk.stop).file.unlink()
        write_json(work.result / TEACHER_FILE, record)


def _padded(part: Sequence[Row]) -> np.ndarray:
    """Token ids of sequences, (sequences, tokens of the longest): what comes later is not seen."""
    found = np.zeros((len(part), len(part[-1])), np.int64)
    for tokens, row in zip(found, part, strict=True):
        tokens[: len(row)] = row.tokens
    return found


def write_rows(
    file: Path,
    part: Sequence[Row],
    lengths: Sequence[int],
    described: Sequence[TensorShape],
    data: Iterable[Data],
) -> None:
    """Write tensors of so many rows for each sequence, and what finds those again."""
    digests = np.stack([np.frombuffer(row.digest, np.uint8) for row in part])
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    found = [("digests", "U8", digests.shape), ("starts", "I64", starts.shape)]
    with put_whole(file) as partial:
        write_safetensors(partial, [*described, *found], (*data, digests, starts))


def unpadded(ids: np.ndarray, mask: Any) -> np.ndarray:
    """Where token ids of any shape are not padding; with no attention mask, everywhere."""
    return np.ones(ids.shape, bool) if mask is None else np.asarray(mask).reshape(ids.shape) != 0


def spans(inputs: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The sequences that a batch (rows, tokens) holds, padded or packed.

    Packed ones begin where positions begin anew, or where the mask has another number. Without a
    mask, each padding token that has position 0 is a sequence too.

    Yields:
        Number of the row, positions there (tokens,), token ids (tokens,).
    """
    arrays = {
        name: inputs[name].cpu().numpy()
        for name in ("input_ids", "attention_mask", "position_ids")
        if inputs.get(name) is not None and inputs[name].shape == inputs["input_ids"].shape
    }
    for number, ids in enumerate(arrays["input_ids"]):
        own = {name: array[number] for name, array in arrays.items()}
        mask = own.get("attention_mask", np.ones_like(ids))
        begins = np.flatnonzero(np.diff(mask)) + 1
        if "position_ids" in own:
            begins = np.union1d(begins, np.flatnonzero(own["position_ids"] == 0))
        for positions in np.split(np.arange(len(ids)), begins):
            if len(positions) and mask[positions[0]]:
                yield number, positions, ids[positions]
