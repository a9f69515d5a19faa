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

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture.config_json import layer_count, load_config
from axolotl_loram.architecture.pairing import fingerprint_of
from axolotl_loram.architecture.plan import SCHEMA_VERSION
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import made_once
from axolotl_loram.files.progress import Progress, no_progress, progress_bar
from axolotl_loram.files.resumable import check_free
from axolotl_loram.files.tensors import (
    Checkpoint,
    StoredTensor,
    open_safetensors,
)
from axolotl_loram.files.untrusted import read_json
from axolotl_loram.memory.data import place_bytes
from axolotl_loram.models.bits import to_bits
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.cache import cache_folder
from axolotl_loram.training.distil import Targets
from axolotl_loram.training.rows import (
    TEACHER_FILE,
    Row,
    check_tokens,
    data_digest,
    described,
    distinct,
    parts_of,
    states_bytes,
    write_parts,
    write_rows,
)

LOG = logging.getLogger(__name__)
NEVER = -1e4
"""A log-probability whose exponential is 0."""


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
    kept = record["places"] * place_bytes(record["top_k"], record["trained_only"])
    remedy = "give fewer tokens, a smaller teacher_top_k, or another disk (cache_dir)"
    check_free(output, record, states_bytes(parts, stream) + kept, remedy)

    def write(file: Path, part: list[Row], walk: Walk) -> None:
        write_outputs(file, part, _outputs_of(walk, part, record["top_k"]))

    write_parts(output, record, parts, stream, layer_count(config), progress, write)
    return record


def kept_outputs(
    name: str,
    model: Path,
    rows: Iterable[Row | np.ndarray],
    many: int,
    cache_dir: str | None,
    make: Callable[..., object] = make_teacher,
) -> Path:
    """The cached folder (`name`) of a model's outputs on a run's rows, made by whoever comes first.

    Args:
        name: Of the folder.
        model: Folder of the model.
        rows: The run's.
        many: What `make` takes after rows and output: how many tokens, or layers.
        cache_dir: The cache, as settings name it.
        make: `make_teacher`, or another that is called like it.

    Raises:
        LoRAMError: They cannot be computed, or not kept there.
    """
    sequences, device = distinct(rows), choose_device()
    identity = [SCHEMA_VERSION, fingerprint_of(model), data_digest(sequences), many, device]

    def fill(folder: Path) -> None:
        places = sum(len(row.places) for row in sequences)
        LOG.info("computing what %s says at %d places", model, places)
        with progress_bar(name) as progress:
            make(model, sequences, folder, many, device, progress)

    return made_once(cache_folder(cache_dir) / name, identity, fill)


def write_outputs(file: Path, part: Sequence[Row], outputs: Sequence[torch.Tensor]) -> None:
    """Keep `most_likely` of all places of some sequences in a file that is whole or absent."""
    ids, logprobs, rest = outputs
    dtype = "F16" if part[0].trained is None else "F32"
    arrays = [ids.numpy(), to_bits(logprobs, dtype), to_bits(rest, "F32")]
    kinds = {"ids": "I32", "logprobs": dtype, "rest": "F32"}
    described = [(*kind, bits.shape) for kind, bits in zip(kinds.items(), arrays, strict=True)]
    write_rows(file, part, [len(row.places) for row in part], described, arrays)


@torch.no_grad()
def _outputs_of(walk: Walk, rows: Sequence[Row], top_k: int) -> list[torch.Tensor]:
    """Take sequences through the layers; `most_likely` of all their places, end to end."""
    walk.finish()
    found: list[tuple[torch.Tensor, ...]] = []
    for batch in walk.batches():
        states = walk.inputs(walk.stop).read(batch).to(walk.stream.device)
        for number, own in zip(batch, states, strict=True):
            row = rows[number]
            found.append(_said_of(row, walk.stream.logits(own[None, row.places])[0], top_k))
    walk.stream.drop_head()
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _said_of(row: Row, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """`most_likely` of the logits of a sequence's places, (places, vocabulary)."""
    if row.trained is None:
        return most_likely(logits, top_k)
    labels = torch.from_numpy(row.tokens[row.places + 1].astype(np.int64))
    return most_likely(logits, top_k, labels.to(logits.device))


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
