"""Merging into a base that is published quantized: into a copy of it in plain numbers.

A merged weight rounded to a few bits again would no longer be the base plus the update, and whoever
merges by shards does not know every format.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from axolotl_loram.errors import not_finite
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, find_folder
from axolotl_loram.files.progress import Progress
from axolotl_loram.files.quantized import FORMATS, check_weights, format_of, without_format
from axolotl_loram.files.resumable import check_free
from axolotl_loram.files.tensors import Checkpoint, StoredTensor, finite, write_shards
from axolotl_loram.files.untrusted import copy_files, read_json

LOG = logging.getLogger(__name__)


@contextmanager
def plain_base(
    model: str, revision: str | None, place: Path, progress: Progress, stored_in: str | None = None
) -> Iterator[str]:
    """In the block, the base in plain numbers: itself, or a copy in `place` that goes when it ends.

    There must be room for two copies, as what is merged is as large; `stored_in` is what the merged
    model will be stored in, by default what the copy is.

    Raises:
        LoRAMError: Its weights are packed otherwise than its config says, or there is no room.
    """
    folder = find_folder(model, revision)
    config = read_json(folder / "config.json")
    form = FORMATS.get(str(format_of(config)))
    if form is None:
        yield model
        return
    checkpoint = Checkpoint(folder)
    check_weights(config, checkpoint.tensors, str(folder))
    size = checkpoint.nbytes
    shutil.rmtree(place, ignore_errors=True)  # what a killed process left
    check_free(place, {}, 2 * size, "make room, or merge on another machine")
    dtypes = ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
    LOG.info(
        "%s is stored in %s: it is merged into as plain numbers, and the merged model is stored in "
        "%s (%.3g GiB in the copy)",
        model,
        form,
        stored_in or dtypes,
        size / 2**30,
    )
    place.mkdir(parents=True)
    try:
        write_plain(checkpoint, place, progress)
        write_json(place / "config.json", without_format(config))
        copy_files(folder, place, (*TOKENIZER_PATTERNS, "generation_config.json"))
        yield str(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_plain(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """Write a checkpoint's weights as plain numbers, a few MB of one in memory.

    Raises:
        LoRAMError: A weight holds a NaN or an infinity.
    """
    done = progress(checkpoint.nbytes, "dequantizing")

    def counted(tensor: StoredTensor) -> Iterator[np.ndarray]:
        for block in tensor.blocks():
            if not finite(block, tensor.dtype):
                raise not_finite(tensor.name)
            done(block.nbytes)
            yield block

    write_shards(checkpoint, folder, counted)
