"""The original model's outputs on token sequences, computed once and kept on disk.

Of each place the k most likely next tokens, their log-probabilities and the probability of all the
others are kept: k = 32 are about 200 bytes a token. Where a sequence says which of its tokens are
trained, only the places before those are kept, the trained token as the first of the k, in float32.
The original passes through memory one decoder layer at a time, some sequences at a time, so that
neither it nor its hidden states need fit.

Sequences are found again by a digest of their tokens, and of which are trained: whatever the order,
the batches, the ranks or the padding, and also when a run is resumed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram import __version__
from axolotl_loram.architecture.config_json import layer_count, load_config
from axolotl_loram.architecture.pairing import fingerprint_of
from axolotl_loram.architecture.plan import SCHEMA_VERSION
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import made_once, write_json
from axolotl_loram.files.progress import Progress, no_progress, progress_bar
from axolotl_loram.files.resumable import Work, check_free, resumable
from axolotl_loram.files.targets import put_whole
from axolotl_loram.files.tensors import (
    Checkpoint,
    StoredTensor,
    open_safetensors,
    write_safetensors,
)
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.memory.data import TOKENS_PER_PART, place_bytes
from axolotl_loram.models.bits import to_bits
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.cache import cache_folder
from axolotl_loram.training.distil import Targets

LOG = logging.getLogger(__name__)
TEACHER_FILE = "teacher.json"
DIGEST_BYTES = 16
NEVER = -1e4
"""A log-probability whose exponential is 0."""
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

    def outputs(self, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
        """`most_likely` of the logits of its places, (places, vocabulary)."""
        if self.trained is None:
            return most_likely(logits, top_k)
        labels = torch.from_numpy(self.tokens[self.places + 1].astype(np.int64))
        return most_likely(logits, top_k, labels.to(logits.device))


class Teacher:
    """The outputs that `make_teacher` stored."""

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
            torch.zeros(shape, dtype=torch.int64), torch.full(shape, NEVER), torch.ones(ids.shape)
        )
        for row, (sequence, kept) in enumerate(zip(ids, real, strict=True)):
            own, where = self.of(Row(sequence[kept])), torch.from_numpy(kept)
            found.ids[row, where] = own.ids
            found.logprobs[row, where] = own.logprobs
            found.rest[row, where] = own.rest
        return found

    def of(self, row: Row) -> Targets:
        """What the teacher says at a sequence's places.

        Raises:
            LoRAMError: The outputs were not computed for it.
        """
        file, start, stop = self.place_of(row)

        def read(name: str, dtype: type[np.generic]) -> torch.Tensor:
            return torch.from_numpy(self.read(file, name, start, stop).view(dtype))

        return Targets(
            read("ids", np.int32).long(),
            read("logprobs", np.float32 if self.record.get("trained_only") else np.float16).float(),
            read("rest", np.float32),
        )

    def place_of(self, row: Row) -> tuple[int, int, int]:
        """Number of the file that a sequence's outputs are in, and from where to where.

        Raises:
            LoRAMError: The outputs were not computed for it.
        """
        place = self.places.get(row.digest)
        if place is None:
            raise LoRAMError(
                f"expected sequences that the {self.record['kind']}'s outputs were computed for, "
                f"found one of {len(row)} tokens, {row.tokens[:4].tolist()} …, that is none of "
                "them: the data changed (or the chat template, or which tokens are trained), or "
                "sequences are packed or cut after that"
            )
        return place

    def read(self, file: int, name: str, start: int, stop: int) -> np.ndarray:
        """Some rows of a stored tensor, as bits."""
        tensor = self._files[file][name]
        size = int(np.prod(tensor.shape[1:], dtype=int)) * tensor.bits.itemsize
        bits = tensor.read_bytes(start * size, (stop - start) * size).view(tensor.bits)
        return bits.reshape(-1, *tensor.shape[1:])


def make_teacher(
    model: Path,
    rows: Iterable[Row | Sequence[int] | np.ndarray],
    output: Path,
    top_k: int = 32,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compute and store a model's outputs on token sequences; returns what `teacher.json` says.

    Interrupted, it leaves what it has done beside `output`, and goes on from there when it is
    called again with the same arguments.

    Args:
        model: Folder of the teacher.
        rows: The sequences, or their token ids; equal ones are computed once. Either all say
            which of their tokens are trained, or none.
        output: Folder to write.
        top_k: How many of the most likely tokens to keep.
        device: Where to compute: in float32 on a CPU, in bfloat16 on a GPU.
        progress: Shows how far it is.

    Raises:
        LoRAMError: There are no sequences, or tokens that the teacher lacks.
    """
    config, checkpoint = load_config(str(model)), Checkpoint(model)
    sequences = distinct(rows)
    parts = list(parts_of(sequences))
    stream = LayerStream(checkpoint, config, device)
    vocabulary = stream.model.get_output_embeddings().weight.shape[0]
    record = {
        **described(sequences, [f"teacher-{i:05}.safetensors" for i in range(len(parts))]),
        "fingerprint": checkpoint.fingerprint(),
        "top_k": min(top_k, vocabulary),
        "computed_in": str(stream.dtype),
    }
    check_tokens(sequences, vocabulary)
    remedy = "give fewer tokens, a smaller teacher_top_k, or another disk (cache_dir)"
    check_free(output, record, _needed_bytes(record, parts, stream), remedy)
    with resumable(output, record) as work:
        for part, name in zip(parts, record["files"], strict=True):
            if not (work.result / name).exists():
                _write_part(stream, work, part, work.result / name, record["top_k"], progress)
        write_json(work.result / TEACHER_FILE, record)
    return record


def kept_outputs(
    name: str, model: Path, rows: Iterable[Row | np.ndarray], top_k: int, cache_dir: str | None
) -> Path:
    """The cached folder (`name`) of a model's outputs on a run's rows, made by whoever comes first.

    Raises:
        LoRAMError: They cannot be computed, or not kept there.
    """
    sequences, device = distinct(rows), choose_device()
    identity = [SCHEMA_VERSION, fingerprint_of(model), data_digest(sequences), top_k, device]

    def make(folder: Path) -> None:
        places = sum(len(row.places) for row in sequences)
        LOG.info("computing what %s says at %d places", model, places)
        with progress_bar(name) as progress:
            make_teacher(model, sequences, folder, top_k, device, progress)

    return made_once(cache_folder(cache_dir) / name, identity, make)


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


def _needed_bytes(
    record: Mapping[str, Any], parts: Sequence[list[Row]], stream: LayerStream
) -> int:
    padded = max(len(part) * len(part[-1]) for part in parts)
    states = 2 * padded * stream.hidden_size * stream.dtype.itemsize
    return states + record["places"] * place_bytes(record["top_k"], record["trained_only"])


def _write_part(
    stream: LayerStream, work: Work, part: list[Row], file: Path, top_k: int, progress: Progress
) -> None:
    """Keep the outputs on a part's sequences in a file that is whole once it has its name."""
    walk = Walk(stream, work, padded(part), file.stem, layer_count(stream.config), progress)
    write_outputs(file, part, _outputs_of(walk, part, top_k))
    walk.inputs(walk.stop).file.unlink()


def padded(part: Sequence[Row]) -> np.ndarray:
    """Token ids of sequences, (sequences, tokens of the longest): what comes later is not seen."""
    found = np.zeros((len(part), len(part[-1])), np.int64)
    for tokens, row in zip(found, part, strict=True):
        tokens[: len(row)] = row.tokens
    return found


def write_outputs(file: Path, part: Sequence[Row], outputs: Sequence[torch.Tensor]) -> None:
    """Keep `most_likely` of all places of some sequences in a file that is whole or absent."""
    ids, logprobs, rest = outputs
    dtype = "F16" if part[0].trained is None else "F32"
    arrays: dict[str, tuple[str, np.ndarray]] = {
        "ids": ("I32", ids.numpy()),
        "logprobs": (dtype, to_bits(logprobs, dtype)),
        "rest": ("F32", to_bits(rest, "F32")),
        "digests": ("U8", np.stack([np.frombuffer(row.digest, np.uint8) for row in part])),
        "starts": ("I64", np.cumsum([0, *(len(row.places) for row in part)], dtype=np.int64)),
    }
    described = [(name, dtype, bits.shape) for name, (dtype, bits) in arrays.items()]
    with put_whole(file) as partial:
        write_safetensors(partial, described, (bits for _, bits in arrays.values()))


@torch.no_grad()
def _outputs_of(walk: Walk, rows: Sequence[Row], top_k: int) -> list[torch.Tensor]:
    """Take sequences through the layers; `most_likely` of all their places, end to end."""
    for index, layer in walk:
        with walk.advanced(index, layer):
            pass
    found: list[tuple[torch.Tensor, ...]] = []
    for batch in walk.batches():
        states = walk.inputs(walk.stop).read(batch).to(walk.stream.device)
        for number, own in zip(batch, states, strict=True):
            row = rows[number]
            found.append(row.outputs(walk.stream.logits(own[None, row.places])[0], top_k))
    walk.stream.drop_head()
    return [torch.cat(column) for column in zip(*found, strict=True)]


def most_likely(
    logits: torch.Tensor, top_k: int, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each place: the most likely tokens, their log-probabilities, the others' probability.

    Args:
        logits: (tokens, vocabulary).
        top_k: How many.
        labels: Tokens that come first among them, however likely, (tokens,).

    Returns:
        int32 (tokens, k), float32 (tokens, k) and float32 (tokens,), on the CPU.
    """
    logprobs = logits.float().log_softmax(-1)
    first = logprobs if labels is None else logprobs.scatter(-1, labels[:, None], torch.inf)
    ids = first.topk(top_k, dim=-1).indices
    values = logprobs.gather(-1, ids)
    rest = logprobs.scatter(-1, ids, -torch.inf).exp().sum(-1)
    return ids.int().cpu(), values.cpu(), rest.cpu()
