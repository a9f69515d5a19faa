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
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import check_free
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.bits import from_bits, to_bits
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.training.rows import (
    Row,
    check_tokens,
    described,
    distinct,
    parts_of,
    states_bytes,
    write_parts,
    write_rows,
)
from axolotl_loram.training.teacher import Teacher

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

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state."""
        return self._files[0]["states"].shape[1]

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
    kept = 2 * stream.hidden_size * record["tokens"]
    remedy = "give fewer tokens, or another disk (cache_dir)"
    check_free(output, record, states_bytes(parts, stream) + kept, remedy)

    def write(file: Path, part: list[Row], walk: Walk) -> None:
        lengths = [len(row) for row in part]
        shape = (sum(lengths), stream.hidden_size)
        write_rows(file, part, lengths, [("states", DTYPE, shape)], [_through(walk, part)])

    write_parts(output, record, parts, stream, layers, progress, write)
    return record


@torch.no_grad()
def _through(walk: Walk, part: Sequence[Row]) -> Iterator[np.ndarray]:
    """Take sequences through the layers; the hidden states of each, (tokens, hidden), as bits."""
    walk.finish()
    for batch in walk.batches():
        for number, own in zip(batch, walk.inputs(walk.stop).read(batch), strict=True):
            yield to_bits(own[: len(part[number])], DTYPE)
