"""The original model's outputs on token sequences, computed once and kept on disk.

Of each place the k most likely next tokens, their log-probabilities and the probability of all the
others are kept: k = 32 are about 200 bytes a token. The original passes through memory one decoder
layer at a time, some sequences at a time, so that neither it nor its hidden states need fit.

Sequences are found again by a digest of their tokens: whatever the order, the batches, the ranks or
the padding, and also when a run is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram import __version__
from axolotl_loram.architecture.config_json import layer_count, load_config
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import Work, check_free, resumable
from axolotl_loram.files.targets import sync
from axolotl_loram.files.tensors import (
    Checkpoint,
    StoredTensor,
    open_safetensors,
    write_safetensors,
)
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.models.bits import to_bits
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.training.distil import Targets

TEACHER_FILE = "teacher.json"
DIGEST_BYTES = 16
TOKENS_PER_PART = 2**20
"""Tokens whose hidden states lie on disk at once: 32 GiB of them for a 70B model in bfloat16."""
NEVER = -1e4
"""A log-probability whose exponential is 0."""
LONGEST_IN_PART = 2
"""A part's sequences are padded to its longest, at most so many times as long as its shortest."""


def digest_of(tokens: np.ndarray) -> bytes:
    """What a sequence of token ids is found again by."""
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=DIGEST_BYTES).digest()


class Teacher:
    """The outputs that `make_teacher` stored.

    Attributes:
        record: What made them.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            LoRAMError: It holds no such outputs, or damaged ones.
        """
        self.record = read_json(folder / TEACHER_FILE)
        self._files: list[dict[str, StoredTensor]] = []
        self.places: dict[bytes, tuple[int, int, int]] = {}
        for name in self.record["files"]:
            tensors, _ = open_safetensors(folder / name)
            starts = tensors["starts"].read().view(np.int64)
            for row, digest in enumerate(tensors["digests"].read()):
                place = (len(self._files), int(starts[row]), int(starts[row + 1]))
                self.places[digest.tobytes()] = place
            self._files.append(tensors)

    def targets(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> Targets:
        """What the teacher says of a batch.

        Args:
            tokens: Token ids, (batch, tokens).
            mask: Where they are not padding, (batch, tokens); everywhere by default.

        Returns:
            On the CPU; of padding, that all is "rest".

        Raises:
            LoRAMError: A sequence is none of those that the outputs were computed for.
        """
        ids = tokens.cpu().numpy()
        real = np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy().astype(bool)
        shape = (*ids.shape, self.record["top_k"])
        found = Targets(
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, NEVER),
            torch.ones(ids.shape),
        )
        for row, (sequence, kept) in enumerate(zip(ids, real, strict=True)):
            own, where = self._of_sequence(sequence[kept]), torch.from_numpy(kept)
            found.ids[row, where] = own.ids
            found.logprobs[row, where] = own.logprobs
            found.rest[row, where] = own.rest
        return found

    def _of_sequence(self, tokens: np.ndarray) -> Targets:
        place = self.places.get(digest_of(tokens))
        if place is None:
            raise LoRAMError(
                f"expected sequences that the teacher's outputs were computed for, found one of "
                f"{len(tokens)} tokens, {tokens[:4].tolist()} …, that is none of them: the data "
                "changed, or sequences are packed or cut after that"
            )
        file, start, stop = place

        def read(name: str) -> np.ndarray:
            tensor = self._files[file][name]
            row = int(np.prod(tensor.shape[1:], dtype=int))
            size = row * tensor.bits.itemsize
            bits = tensor.read_bytes(start * size, (stop - start) * size).view(tensor.bits)
            return bits.reshape(-1, *tensor.shape[1:])

        return Targets(
            torch.from_numpy(read("ids").view(np.int32)).long(),
            torch.from_numpy(read("logprobs").view(np.float16)).float(),
            torch.from_numpy(read("rest").view(np.float32)),
        )


def make_teacher(
    model: Path,
    rows: Iterable[Sequence[int] | np.ndarray],
    output: Path,
    top_k: int = 32,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compute and store a model's outputs on token sequences.

    Interrupted, it leaves what it has done beside `output`, and goes on from there when it is
    called again with the same arguments.

    Args:
        model: Folder of the teacher.
        rows: Token ids of each sequence, without padding; equal ones are computed once.
        output: Folder to write.
        top_k: How many of the most likely tokens to keep.
        device: Where to compute: in float32 on a CPU, in bfloat16 on a GPU.
        progress: Shows how far it is.

    Returns:
        What `teacher.json` says.

    Raises:
        LoRAMError: There are no sequences, or tokens that the teacher lacks.
    """
    config, checkpoint = load_config(str(model)), Checkpoint(model)
    sequences = distinct(rows)
    parts = list(_parts(sequences))
    stream = LayerStream(checkpoint, config, device)
    vocabulary = stream.model.get_output_embeddings().weight.shape[0]
    _check_tokens(sequences, vocabulary)
    record = {
        "kind": "teacher",
        "version": __version__,
        "fingerprint": checkpoint.fingerprint(),
        "top_k": min(top_k, vocabulary),
        "computed_in": str(stream.dtype),
        "sequences": len(sequences),
        "tokens": sum(map(len, sequences)),
        "sha256": data_digest(sequences),
        "files": [f"teacher-{number:05}.safetensors" for number in range(len(parts))],
    }
    remedy = "give fewer tokens, a smaller teacher_top_k, or another disk (cache_dir)"
    check_free(output, record, _needed_bytes(record, parts, stream), remedy)
    with resumable(output, record) as work:
        for part, name in zip(parts, record["files"], strict=True):
            if not (work.result / name).exists():
                _write_part(stream, work, part, work.result / name, record["top_k"], progress)
        write_json(work.result / TEACHER_FILE, record)
    return record


def data_digest(sequences: Sequence[np.ndarray]) -> str:
    """SHA-256 of what `distinct` gives."""
    return hashlib.sha256(b"".join(map(digest_of, sequences))).hexdigest()


def distinct(rows: Iterable[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    """Each sequence once, the shortest first."""
    arrays = (np.asarray(row, dtype=np.int32) for row in rows)
    found = {digest_of(array): array for array in arrays if len(array)}
    return [found[key] for key in sorted(found, key=lambda key: (len(found[key]), key))]


def _check_tokens(sequences: Sequence[np.ndarray], vocabulary: int) -> None:
    if not sequences:
        raise LoRAMError("expected token sequences for the teacher, found none: give some data")
    largest = max(int(sequence.max()) for sequence in sequences)
    if largest >= vocabulary:
        raise LoRAMError(
            f"expected token ids below the teacher's vocabulary of {vocabulary}, found {largest}: "
            "use the teacher's own tokenizer, without added tokens"
        )


def _parts(sequences: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    part: list[np.ndarray] = []
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


def _needed_bytes(
    record: Mapping[str, Any], parts: Sequence[list[np.ndarray]], stream: LayerStream
) -> int:
    padded = max(len(part) * len(part[-1]) for part in parts)
    states = 2 * padded * stream.hidden_size * stream.dtype.itemsize
    return states + record["tokens"] * (6 * record["top_k"] + 4)


def _write_part(
    stream: LayerStream,
    work: Work,
    part: list[np.ndarray],
    file: Path,
    top_k: int,
    progress: Progress,
) -> None:
    """Keep the outputs on a part's sequences in a file that is whole once it has its name."""
    padded = np.zeros((len(part), len(part[-1])), np.int64)  # what comes later is not looked at
    for tokens, sequence in zip(padded, part, strict=True):
        tokens[: len(sequence)] = sequence
    walk = Walk(stream, work, padded, file.stem, layer_count(stream.config), progress)
    ids, logprobs, rest = _outputs_of(walk, list(map(len, part)), top_k)
    arrays: dict[str, tuple[str, np.ndarray]] = {
        "ids": ("I32", ids.numpy()),
        "logprobs": ("F16", to_bits(logprobs, "F16")),
        "rest": ("F32", to_bits(rest, "F32")),
        "digests": ("U8", np.stack([np.frombuffer(digest_of(row), np.uint8) for row in part])),
        "starts": ("I64", np.cumsum([0, *map(len, part)], dtype=np.int64)),
    }
    partial = file.with_suffix(".partial")
    described = [(name, dtype, bits.shape) for name, (dtype, bits) in arrays.items()]
    write_safetensors(partial, described, (bits for _, bits in arrays.values()))
    sync(partial)
    partial.replace(file)
    walk.inputs(walk.stop).file.unlink()


@torch.no_grad()
def _outputs_of(walk: Walk, lengths: Sequence[int], top_k: int) -> list[torch.Tensor]:
    """Take sequences through the layers; `most_likely` of all their tokens, end to end."""
    for index, layer in walk:
        with walk.advanced(index, layer):
            pass
    found: list[tuple[torch.Tensor, ...]] = []
    for batch in walk.batches():
        logits = walk.stream.logits(walk.inputs(walk.stop).read(batch).to(walk.stream.device))
        for row, own in zip(batch, logits, strict=True):
            found.append(most_likely(own[: lengths[row]], top_k))
    walk.stream.drop_head()
    return [torch.cat(column) for column in zip(*found, strict=True)]


def most_likely(
    logits: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each place: the most likely tokens, their log-probabilities, the others' probability.

    Args:
        logits: (tokens, vocabulary).
        top_k: How many.

    Returns:
        int32 (tokens, k), float32 (tokens, k) and float32 (tokens,), on the CPU.
    """
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(top_k, dim=-1)
    rest = logprobs.scatter(-1, ids, -torch.inf).exp().sum(-1)
    return ids.int().cpu(), values.cpu(), rest.cpu()
