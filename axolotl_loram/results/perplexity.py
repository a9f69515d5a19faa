"""Losses of held-out documents, in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.text.heldout import IGNORED, HeldOut, Window

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


def fitting(batch_size: int, run: Callable[[int], Result]) -> tuple[Result, int]:
    """Run something with a batch size, halved while memory does not suffice; returns both.

    Args:
        batch_size: To start with.
        run: Takes the batch size; its first batch should be its largest.
    """
    while True:
        try:
            return run(batch_size), batch_size
        except RuntimeError as error:
            if batch_size == 1 or not should_reduce_batch_size(error):
                raise
        batch_size //= 2
        LOG.warning("out of memory: going on with a batch size of %d", batch_size)
        clear_device_cache(garbage_collection=True)


def document_losses(
    model: Any, held_out: HeldOut, batch_size: int, progress: Progress = no_progress
) -> np.ndarray:
    """Negative log likelihoods and counts of the labelled tokens of each document.

    Neither padding nor the batch size changes them, beyond rounding. The model is left in the mode
    (training or not) that it was in.

    Args:
        model: A causal language model; on its `device`.
        held_out: The documents.
        batch_size: Windows at once, longest first.
        progress: Shows how far it is.

    Returns:
        float64 (documents, 2): nats, and tokens predicted.

    Raises:
        LoRAMError: A loss is not finite.
    """
    found = np.zeros((held_out.documents, 2))
    ordered = sorted(held_out.windows, key=lambda window: len(window.ids), reverse=True)
    advance = progress(len(ordered), held_out.name, " documents")
    training = model.training
    model.eval()
    try:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            for window, nats, tokens in zip(batch, *batch_losses(model, batch), strict=True):
                found[window.document] += nats, tokens
            advance(len(batch))
    finally:
        model.train(training)
    if not np.isfinite(found).all():
        raise LoRAMError(
            f"expected finite losses, found NaN or infinity on {held_out.name} in {model.dtype}: "
            "take another dtype, or look whether the weights are damaged"
        )
    return found


@torch.no_grad()
def batch_losses(model: Any, batch: Sequence[Window]) -> tuple[list[float], list[int]]:
    """Nats and number of the predicted tokens of each window."""
    ids, labels, mask = (part.to(model.device) for part in _padded(batch))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    # Only what counts in float32: all logits of a batch can be gigabytes.
    counted = logits[rows, columns].float()
    losses = cross_entropy(counted, targets[rows, columns].to(counted.device), reduction="none")
    rows = rows.cpu()
    nats = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows, losses.double().cpu())
    return nats.tolist(), torch.bincount(rows, minlength=len(batch)).tolist()


def _padded(batch: Sequence[Window]) -> Iterator[torch.Tensor]:
    """Ids, labels and attention mask, int64 (windows, longest), padded at the end."""
    ids = [torch.as_tensor(window.ids, dtype=torch.int64) for window in batch]
    labels = [torch.as_tensor(window.labels, dtype=torch.int64) for window in batch]
    yield pad_sequence(ids, batch_first=True)
    yield pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    yield pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
