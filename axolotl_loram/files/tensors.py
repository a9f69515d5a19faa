"""Reading sharded safetensors lazily, and writing them array by array.

Tensors are handled as opaque bits: arrays of unsigned integers as wide as the elements. Pruning
and recovery only move elements, so every dtype of 8 to 64 bits goes through unchanged and neither
needs torch. What a base stores quantized is read as plain numbers (`quantized`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import write_json
from axolotl_loram.files.quantized import plain
from axolotl_loram.files.stored import BLOCK_BYTES as BLOCK_BYTES
from axolotl_loram.files.stored import ELEMENT_BYTES, StoredTensor, bytes_of
from axolotl_loram.files.stored import FLOATS as FLOATS
from axolotl_loram.files.stored import INFINITY as INFINITY
from axolotl_loram.files.stored import as_floats as as_floats
from axolotl_loram.files.stored import finite as finite
from axolotl_loram.files.untrusted import own_file, read_json

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
SMALL_BYTES = 2**16


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file, in the order they are stored, and the file's own metadata.

    Raises:
        LoRAMError: Not a whole safetensors file (safetensors itself checks header and size).
    """
    try:
        with safe_open(own_file(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            described = [(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
    except FileNotFoundError:
        raise LoRAMError(f"expected the file {file}, found none: download it again") from None
    except (SafetensorError, OSError) as error:
        raise LoRAMError(
            f"expected a whole safetensors file, found {file} unreadable ({error}): it is "
            "truncated or damaged, so download or write it again"
        ) from None
    with file.open("rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
    tensors = {}
    for name, dtype, shape in described:
        if dtype not in ELEMENT_BYTES:
            raise LoRAMError(
                f"expected tensors of {', '.join(ELEMENT_BYTES)}, found {name} of {dtype} in {file}"
            )
        tensors[name] = StoredTensor(name, dtype, shape, file, start)
        start += tensors[name].nbytes
    return tensors, metadata


class Checkpoint:
    """The tensors of a folder, read on demand.

    Attributes:
        tensors: Every tensor by name, those that are stored quantized as plain numbers.
        shards: Names of the `tensors` of each file, in the order they are stored.
    """

    def __init__(self, folder: Path, file: str = MODEL_FILE):
        """Open `folder`/`file`, or the shards that `file`.index.json lists.

        Raises:
            LoRAMError: Neither is there, or a listed file is missing, damaged or outside.
        """
        self.folder = folder
        self.stored: dict[str, StoredTensor] = {}
        listed = {} if (folder / file).exists() else _weight_map(folder, file)
        for name in shard_names(folder, file):
            tensors, _ = open_safetensors(folder / name)
            self._check_dealt(tensors, name, listed)
            self.stored |= tensors
        self.tensors = plain(self.stored, folder)
        self.shards: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            self.shards.setdefault(tensor.file.name, []).append(name)

    def _check_dealt(self, tensors: Iterable[str], shard: str, listed: Mapping[str, str]) -> None:
        """Refuse a shard with tensors that another has, or should have by the index."""
        for name in tensors:
            other = self.stored[name].file.name if name in self.stored else listed.get(name)
            if other not in (None, shard):
                raise LoRAMError(
                    f"expected every tensor in one file of {self.folder}, found {name} in {shard} "
                    f"and, by the index or really, in {other}: the shards are of two runs, so "
                    "download or write them again"
                )

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes of its `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fingerprint(self, samples: int = 16, sample_bytes: int = 4096) -> str:
        """A digest of what the checkpoint holds, in milliseconds whatever its size.

        It covers every tensor's name, dtype and shape, and `sample_bytes` from the middle of each
        of `samples` tensors spread over the model, as they are stored; not how tensors are dealt to
        shards.
        """
        digest = hashlib.sha256()
        names = sorted(self.stored)
        for name in names:
            tensor = self.stored[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for index in np.linspace(0, len(names) - 1, min(samples, len(names)), dtype=int):
            tensor = self.stored[names[index]]
            count = min(sample_bytes, tensor.nbytes)
            digest.update(tensor.read_bytes((tensor.nbytes - count) // 2, count).tobytes())
        return f"sha256:{digest.hexdigest()}"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds model weights as safetensors."""
    return (folder / MODEL_FILE).exists() or (folder / f"{MODEL_FILE}.index.json").exists()


def shard_names(folder: Path, file: str = MODEL_FILE) -> list[str]:
    """The weight files of a folder, as its index lists them.

    Raises:
        LoRAMError: There are none, or the index points out of the folder.
    """
    if (folder / file).exists():
        return [file]
    return sorted(set(_weight_map(folder, file).values()))


def _weight_map(folder: Path, file: str) -> dict[str, str]:
    """Tensor → shard, as the index says."""
    index = folder / f"{file}.index.json"
    if not index.exists():
        raise LoRAMError(
            f"expected {file} or {index.name} in {folder}, found neither: give a folder whose "
            "weights are saved as safetensors"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoRAMError(f"expected a weight_map in {index}, found none: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise LoRAMError(
                f"expected {index} to list plain file names, found {name!r}: do not use this "
                "checkpoint, its index points out of its folder"
            )
    return weight_map


TensorShape = tuple[str, str, tuple[int, ...]]
"""Name, dtype as safetensors names it, shape."""
Data = np.ndarray | Iterable[np.ndarray]
"""The bits of a tensor, in one array or in several."""


def write_shards(
    checkpoint: Checkpoint,
    folder: Path,
    data: Callable[[StoredTensor], Data],
    shape: Callable[[StoredTensor], tuple[int, ...]] = lambda tensor: tensor.shape,
) -> dict[str, str]:
    """Write a checkpoint again, dealt to files as it was; returns file name → SHA-256.

    Of each tensor, `data` gives the bits to write, and `shape` their shape.
    """
    held = {
        file: [(name, checkpoint[name].dtype, shape(checkpoint[name])) for name in names]
        for file, names in checkpoint.shards.items()
    }
    written = {
        file: write_safetensors(folder / file, parts, (data(checkpoint[n]) for n, *_ in parts))
        for file, parts in held.items()
    }
    if len(held) > 1:
        write_index(folder, held)
    return written


def write_index(folder: Path, files: Mapping[str, Iterable[TensorShape]]) -> None:
    """Write the index of a model in several files, given as file name → what is in it."""
    held = [(file, part) for file, parts in files.items() for part in parts]
    size = sum(math.prod(shape) * ELEMENT_BYTES[dtype] for _, (_, dtype, shape) in held)
    weight_map = {name: file for file, (name, *_) in held}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{MODEL_FILE}.index.json", index)


def write_safetensors(
    file: Path,
    described: Sequence[TensorShape],
    data: Iterable[Data],
    metadata: dict[str, str] | None = None,
) -> str:
    """Write a safetensors file array by array, as the library's writer cannot; returns its SHA-256.

    Args:
        file: Where to.
        described: What will come, in order.
        data: The bits of each, in that order, in one array or in several; consumed lazily.
        metadata: Strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, dtype, shape in described:
        end = start + math.prod(shape) * ELEMENT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with file.open("wb") as handle, ThreadPoolExecutor(1) as pool:
        handle.write(head)
        for (name, dtype, shape), arrays in zip(described, data, strict=True):
            expected, written = math.prod(shape) * ELEMENT_BYTES[dtype], 0
            for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
                flat = bytes_of(np.ascontiguousarray(array))
                if flat.nbytes < SMALL_BYTES:  # another thread would take longer to wake up
                    digest.update(flat)
                    written += handle.write(flat)
                    continue
                hashed = pool.submit(digest.update, flat)  # takes as long as writing does
                written += handle.write(flat)
                hashed.result()
            if written != expected:
                raise AssertionError(f"{name}: wrote {written} bytes, announced {expected}")
    return digest.hexdigest()


def ahead(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same arrays; a thread gets the next one while one is used."""
    iterator = iter(arrays)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (array := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield array
