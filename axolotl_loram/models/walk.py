"""Walking calibration text through the decoder layers, resumably."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import Work
from axolotl_loram.models.stream import TOKENS_PER_BATCH, LayerStream, States


class Walk:
    """Takes hidden states through the layers in order, all samples through one layer at a time.

    Iterating yields (index, layer), the layer loaded and its inputs ready; the loop's body looks at
    `batches`, may change the layer, and calls `advance`. When the body is over, the layer is done
    with: an interrupted walk goes on at the layer where it was.
    """

    def __init__(
        self,
        stream: LayerStream,
        work: Work,
        tokens: np.ndarray,
        stage: str,
        stop: int,
        progress: Progress = no_progress,
        keep: bool = False,
    ) -> None:
        """Prepare to walk.

        Args:
            stream: The layers.
            work: Where hidden states are kept.
            tokens: Token ids (samples, length).
            stage: Name of this walk among those of the same work.
            stop: Number of layers to walk through.
            progress: Shows the layers done.
            keep: Whether each layer's inputs are kept, or only the newest.
        """
        self.stream, self.work, self.stage, self.stop = stream, work, stage, stop
        self.tokens, self.progress, self.keep = torch.from_numpy(tokens), progress, keep
        self.done: Callable[[float], Any] = lambda done: None

    def inputs(self, index: int) -> States:
        """Hidden states before layer `index` (after the last one, where index is `stop`)."""
        shape = (*self.tokens.shape, self.stream.hidden_size)
        return States(self.work.folder / f"{self.stage}-{index}.states", shape, self.stream.dtype)

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield each layer that is still to be done."""
        newest = max((i for i in range(self.stop + 1) if self.inputs(i).exists), default=None)
        if newest is None:
            with self.inputs(0).written() as append:
                for batch in self.batches():
                    append(self.stream.embed(self.tokens[batch]))
        first = newest or 0
        self.done = self.progress(self.stop, self.stage, "layer")
        self.done(first)
        for index in range(first, self.stop):
            layer = self.stream.layer(index)
            yield index, layer
            for parameter in layer.parameters():  # the caller still names it while the next loads
                parameter.data = torch.empty(0)
            if not self.keep:
                self.inputs(index).file.unlink(missing_ok=True)

    def finish(self) -> None:
        """Walk to the end, with nothing to look at."""
        for index, layer in self:
            with self.advanced(index, layer):
                pass

    def batches(self, samples: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Sample numbers, as many at a time as fit TOKENS_PER_BATCH."""
        chosen = list(range(len(self.tokens)) if samples is None else samples)
        size = max(1, TOKENS_PER_BATCH // self.tokens.shape[1])
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]

    def run(
        self, index: int, layer: nn.Module, samples: Sequence[int] | None = None
    ) -> Iterator[torch.Tensor]:
        """The layer's outputs, batch by batch."""
        for batch in self.batches(samples):
            hidden = self.inputs(index).read(batch).to(self.stream.device)
            yield self.stream.run(index, layer, hidden)

    @contextmanager
    def advanced(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Run all samples through the layer; in the block, save what was learnt on the way.

        The outputs count as there only after the block, so nothing is lost in between.
        """
        with self.inputs(index + 1).written() as append:
            for output in self.run(index, layer):
                check_finite(output, f"{self.stream.family.layers}.{index}")
                append(output)
                self.done(len(output) / len(self.tokens))
            yield


def check_finite(values: torch.Tensor, where: str) -> None:
    """Refuse activations that are not numbers."""
    if not torch.isfinite(values).all():
        raise LoRAMError(
            f"expected finite activations, found NaN or infinity in the output of {where}: the "
            "base model is damaged, or overflows in this precision (try --device cpu)"
        )
