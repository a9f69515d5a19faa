"""Hidden states of the original before the first layer that pruning left, kept on disk.

Where whole layers go, they take the removed layers' place in training. They are computed as a
teacher's outputs are (`teacher`): a layer in memory at a time, interrupted and gone on with, found
again by a sequence's tokens; of every token, in bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.pairing import fingerprint_of
from axolotl_loram.architecture.plan import SCHEMA_VERSION
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import made_once, write_json
from axolotl_loram.files.progress import Progress, no_progress, progress_bar
from axolotl_loram.files.resumable import check_free, resumable
from axolotl_loram.files.targets import sync
from axolotl_loram.files.tensors import Checkpoint, write_safetensors
from axolotl_loram.models.bits import from_bits, to_bits
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.cache import cache_folder
from axolotl_loram.training.teacher import (
    TEACHER_FILE,
    Row,
    Teacher,
    check_tokens,
    data_digest,
    described,
    distinct,
    padded,
    parts_of,
)

LOG = logging.getLogger(__name__)
DTYPE = "BF16"


class StoredStates(Teacher):
    """What `make_states` stored."""

    def __init__(self, folder: Path, layers: int) -> None:
        """Open a folder.

        Args:
            folder: Where they are.
            layers: How many layers they must have gone through.

        Raises:
            LoRAMError: They are something else, or damaged.
        """
        super().__init__(folder)
        found = self.record.get("layers")
        if found != layers:
            what = "a model's outputs" if found is None else f"those after {found} layers"
            raise LoRAMError(
                f"expected hidden states after {layers} layers in {folder}, found {what}: let "
                "`axolotl-loram anchor` make them for this YAML"
            )

    def states_of(self, row: Row) -> torch.Tensor:
        """Of each of a sequence's tokens, (tokens, hidden), in bfloat16.

        Raises:
            LoRAMError: They were not computed for it.
        """
        file, start, stop = self.place_of(row)
        return from_bits(self.read(file, "states", start, stop), DTYPE)


def make_states(
    model: Path,
    rows: Iterable[Row],
    output: Path,
    layers: int,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compute and store the hidden states of sequences; returns the record beside them.

    Interrupted, it goes on when it is called again with the same arguments.

    Args:
        model: Folder of the original.
        rows: The sequences; equal ones are computed once.
        output: Folder to write.
        layers: How many of its layers they go through.
        device: Where to compute: in float32 on a CPU, in bfloat16 on a GPU.
        progress: Shows how far it is.

    Raises:
        LoRAMError: There are no sequences, or tokens that the model lacks.
    """
    config, checkpoint = load_config(str(model)), Checkpoint(model)
    sequences = distinct(rows)
    parts = list(parts_of(sequences))
    stream = LayerStream(checkpoint, config, device)
    record = {
        **described(sequences, [f"states-{i:05}.safetensors" for i in range(len(parts))]),
        "fingerprint": checkpoint.fingerprint(),
        "layers": layers,
        "computed_in": str(stream.dtype),
    }
    check_tokens(sequences, len(stream.model.get_input_embeddings().weight))  # type: ignore
    most = max(padded(part).size for part in parts)
    needed = 2 * most * stream.dtype.itemsize + 2 * record["tokens"]
    remedy = "give fewer tokens, or another disk (cache_dir)"
    check_free(output, record, needed * stream.hidden_size, remedy)
    with resumable(output, record) as work:
        for part, name in zip(parts, record["files"], strict=True):
            file = work.result / name
            if not file.exists():
                walk = Walk(stream, work, padded(part), file.stem, layers, progress)
                _write(file, part, _through(walk, part), stream.hidden_size)
                walk.inputs(layers).file.unlink()
        write_json(work.result / TEACHER_FILE, record)
    return record


def kept_states(model: Path, rows: Iterable[Row], layers: int, cache_dir: str | None) -> Path:
    """The cached folder of hidden states of a run's rows, made by whoever comes first.

    Raises:
        LoRAMError: They cannot be computed, or not kept there.
    """
    sequences, device = distinct(rows), choose_device()
    identity = [SCHEMA_VERSION, fingerprint_of(model), data_digest(sequences), layers, device]

    def make(folder: Path) -> None:
        LOG.info("computing what the first %d layers of %s give", layers, model)
        with progress_bar("anchor") as progress:
            make_states(model, sequences, folder, layers, device, progress)

    return made_once(cache_folder(cache_dir) / "states", identity, make)


@torch.no_grad()
def _through(walk: Walk, part: Sequence[Row]) -> Iterator[np.ndarray]:
    """Take sequences through the layers; the hidden states of each, (tokens, hidden), as bits."""
    for index, layer in walk:
        with walk.advanced(index, layer):
            pass
    for batch in walk.batches():
        for number, own in zip(batch, walk.inputs(walk.stop).read(batch), strict=True):
            yield to_bits(own[: len(part[number])], DTYPE)


def _write(file: Path, part: Sequence[Row], states: Iterable[np.ndarray], hidden: int) -> None:
    starts = np.cumsum([0, *map(len, part)], dtype=np.int64)
    digests = np.stack([np.frombuffer(row.digest, np.uint8) for row in part])
    what = [
        ("states", DTYPE, (int(starts[-1]), hidden)),
        ("digests", "U8", digests.shape),
        ("starts", "I64", starts.shape),
    ]
    partial = file.with_suffix(".partial")
    write_safetensors(partial, what, (states, digests, starts))
    sync(partial)
    partial.replace(file)
