"""Held-out text: from what the user names to token ids, and which of them are to be predicted."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import user_path
from axolotl_loram.text.axolotl_text import heldout_rows
from axolotl_loram.text.calibration import (
    CHARACTERS_PER_TOKEN,
    TEXT,
    YAML,
    blocks_of,
    file_rows,
    hub_rows,
    run_of,
    suffix_of,
    text_of,
    token_ids,
)

IGNORED = -100
"""The label of a token that does not count, as in transformers."""
HUB_DOCUMENTS = 1000
"""How many rows of a data set on the hub are read, where no limit is given."""
Kind = Literal["in_domain", "out_of_domain"]
Row = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Window:
    """What the model reads at once: a document, or a part of a long one.

    Attributes:
        ids: Token ids, int64 (length,).
        labels: The same, with IGNORED where a token does not count. The first is never predicted.
    """

    document: int
    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class HeldOut:
    """Documents to measure perplexity on, as windows, document by document."""

    name: str
    kind: Kind
    source: str
    windows: tuple[Window, ...]

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.windows[-1].document + 1

    @property
    def digest(self) -> str:
        """SHA-256 of all ids and labels, window by window."""
        found = hashlib.sha256()
        for window in self.windows:
            found.update(np.array([window.document, len(window.ids)], "<i8").tobytes())
            found.update(window.ids.astype("<i8").tobytes() + window.labels.astype("<i8").tobytes())
        return found.hexdigest()


def held_out(
    source: str,
    kind: Kind,
    tokenizer: Any,
    vocabulary_size: int,
    length: int,
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> HeldOut:
    """The held-out documents that a source holds.

    A row of `.jsonl` or of a data set on the hub is a document: of a `text` every token counts, of
    `segments` those with `label: true` (as under Axolotl's `input_output`), of `messages` every
    token of the chat template. A `.txt` file is cut into documents of about `length` tokens. A
    `.yml` stands for what that Axolotl run holds out, with its label masks.

    Args:
        source: A file, or a data set on the hub (name, name:subset or name:subset:split).
        kind: What the set is called.
        tokenizer: The model's.
        vocabulary_size: How many tokens the model has.
        length: Most tokens in a window; longer documents are cut into several.
        limit: Most documents, drawn with the seed; without it all, and HUB_DOCUMENTS of the hub's.
        seed: Of the draw.
        name: What the results call it, by default the file's name.

    Raises:
        LoRAMError: It cannot be read, holds no token to predict, or tokens the model lacks.
    """
    path = user_path(source)
    suffix = suffix_of(path, source)
    if suffix in YAML:
        limited = _drawn(heldout_rows(run_of(path, tokenizer)), limit, seed)
    elif suffix in TEXT:
        texts = blocks_of(path, length * CHARACTERS_PER_TOKEN, seed)
        limited = itertools.islice((_all(tokenizer, text) for text in texts), limit)
    else:
        found = file_rows(path, seed) if suffix else hub_rows(source, seed)
        encoded = (_encode(row, tokenizer, where) for row, where in found)
        limited = itertools.islice(encoded, limit or (None if suffix else HUB_DOCUMENTS))
    stem = path.stem if suffix else source.split(":")[0].rpartition("/")[2]
    return from_rows(limited, name or stem, kind, source, length, vocabulary_size)


def from_rows(
    rows: Iterable[Row], name: str, kind: Kind, source: str, length: int, vocabulary_size: int
) -> HeldOut:
    """Held-out documents from token ids and labels; see `held_out`."""
    cut = (_windows(row, length) for row in rows)
    documents = [windows for windows in cut if windows]
    if not documents:
        raise LoRAMError(
            f"expected held-out text with tokens to predict, found none in {source}: give other "
            "text, or another split of the run's data"
        )
    windows = tuple(
        Window(number, ids, labels)
        for number, parts in enumerate(documents)
        for ids, labels in parts
    )
    largest = max(int(window.ids.max()) for window in windows)
    if largest >= vocabulary_size:
        raise LoRAMError(
            f"expected token ids below the vocabulary of {vocabulary_size}, found {largest} in "
            f"{source}: tokenize it with the base model's own tokenizer; or, if it is a token that "
            "training added, evaluate --models pruned+adapter,base+recovered"
        )
    return HeldOut(name, kind, source, windows)


def _windows(row: Row, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A document in windows, without those that predict nothing."""
    ids, labels = (np.asarray(part, dtype=np.int64) for part in row)
    starts = range(0, len(ids), length)
    cut = [(ids[start : start + length], labels[start : start + length]) for start in starts]
    return [(i, marked) for i, marked in cut if (marked[1:] != IGNORED).any()]


def _drawn(rows: Sequence[Row], limit: int | None, seed: int) -> Iterator[Row]:
    order = np.random.default_rng(seed).permutation(len(rows))[:limit]
    return (rows[index] for index in sorted(order))


def _encode(row: Any, tokenizer: Any, where: str) -> Row:
    if isinstance(row, dict) and isinstance(row.get("segments"), list):
        return _segments(row["segments"], tokenizer, where)
    # A chat template writes the special tokens itself.
    special = isinstance(row, dict) and isinstance(row.get("text"), str)
    return _all(tokenizer, text_of(row, tokenizer, where), special)


def _segments(segments: list[Any], tokenizer: Any, where: str) -> Row:
    ids: list[int] = []
    labels: list[int] = []
    for segment in segments:
        if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
            raise LoRAMError(f"expected segments with a text in {where}, found {segment!r}: add it")
        part = token_ids(tokenizer, segment["text"])
        ids += part
        labels += part if segment.get("label") else [IGNORED] * len(part)
    return ids, labels


def _all(tokenizer: Any, text: str, special: bool = True) -> Row:
    """A text of which every token counts, begun as the tokenizer begins texts."""
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = token_ids(tokenizer, text, special and not begun)
    return ids, ids
