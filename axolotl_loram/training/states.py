"""Hidden states of the original before the first layer that pruning left, kept on disk.

Where whole layers go, they take the removed layers' place in training. They are computed as a
teacher's outputs are (`teacher`): a layer in memory at a time, interrupted and gone on with, found
again by a sequence's tokens; of every token, in bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from axolotl_loram.models.removed import removed_layers
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.training.rows import (
    Row,
    check_tokens,
    described,
    distinct,
    parts_of,
    spans,
    states_bytes,
    unpadded,
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
        "kind": "anchor",
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


def whole_rows(
    data: Iterable[Mapping[str, Any]],
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
) -> Iterator[Row]:
    """Sequences that go through the model, whichever of their tokens are trained.

    Args:
        data: Rows as Axolotl prepares them, or as TRL's trainers do.
        collate: Makes batches of rows that have no token ids, but a prompt's and two answers'.

    Raises:
        LoRAMError: There are no token ids.
    """
    for row in data:
        batch = row if collate is None or "input_ids" in row else collate([row])
        names = [name for name in batch if f"_{name}".endswith("_input_ids")]
        if not names:
            raise LoRAMError(
                f"expected rows of token ids, found {', '.join(row)}: name data that Axolotl, or "
                "the trainer, tokenizes"
            )
        for name in names:
            if name != "prompt_input_ids":  # by itself it goes through no model
                mask = batch.get(name.removesuffix("input_ids") + "attention_mask")
                ids = np.atleast_2d(batch[name])
                for tokens, own in zip(ids, unpadded(ids, mask), strict=True):
                    yield Row(tokens[own].astype(np.int32))


class HiddenStates:
    """Puts the base's hidden states in the place of the layers that pruning removed.

    The loss stays the trainer's own: above them, the model is the base.
    """

    def __init__(self, stored: StoredStates) -> None:
        self.stored = stored

    def attach(self, model: Any) -> None:
        """See every batch before a PEFT model's decoder does, whichever loss it is for."""
        decoder = model.get_base_model().base_model
        decoder.register_forward_pre_hook(self.fill, with_kwargs=True)
        self.last = removed_layers(decoder)[-1]

    @torch.compiler.disable
    def fill(self, decoder: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Hand a batch's hidden states to the last removed layer; padding gets zeros."""
        inputs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | given
        ids = inputs["input_ids"]
        states = torch.zeros(*ids.shape, self.stored.hidden_size, dtype=torch.bfloat16)
        for number, positions, tokens in spans(inputs):
            row = Row(tokens.astype(np.int32))
            if row.digest in self.stored.places or len(set(tokens)) > 1:  # or no mask says padding
                states[number, torch.from_numpy(positions)] = self.stored.states_of(row)
        self.last.given = states.to(ids.device)
