"""Calibration text: from what the user names to an array of token ids."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import layer_fields, load_config
from axolotl_loram.architecture.vocabulary import OTHER_FILES, TOKENIZER_FILE
from axolotl_loram.config import FillArgs, Pruning
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import user_path
from axolotl_loram.text.axolotl_text import (
    SHUFFLE_BUFFER,
    load_yaml,
    one_line,
    token_rows,
    vocabulary,
)

Calibrated = Pruning | FillArgs
"""Settings that name calibration text, its length, samples and seed."""
LOG = logging.getLogger(__name__)
TEXT, ROWS, YAML = (".txt",), (".jsonl", ".json"), (".yml", ".yaml")
WINDOWS_PER_DOCUMENT = 4
"""At most so many sequences' worth of any one document, as long as there are others."""
CHARACTERS_PER_TOKEN = 4
"""Roughly, in English; only sets where a text file is cut."""
MOST_BLANKS = 64
"""Within so many bytes a JSON array begins, with a byte order mark before it or blanks."""


@dataclass(frozen=True)
class Calibration:
    """Token sequences that stand for what the model reads.

    Attributes:
        tokens: Token ids, int64 (samples, length); no two sequences share a place in the text.
    """

    tokens: np.ndarray
    source: str
    seed: int

    def record(self) -> dict[str, Any]:
        """What `loram.json` says about it; the digest is of the ids as little-endian int64."""
        return {
            "source": self.source,
            "samples": self.tokens.shape[0],
            "length": self.tokens.shape[1],
            "tokens": self.tokens.size,
            "seed": self.seed,
            "sha256": hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest(),
        }


def load_calibration(settings: Calibrated, model_folder: Path) -> Calibration:
    """The calibration sequences that the settings name, for the model in a folder.

    Raises:
        LoRAMError: There is no such text, it cannot be read, it is too short, or the folder has no
            tokenizer of this model.
    """
    source = settings.calibration_path
    if not source:
        raise LoRAMError("expected calibration text, found none: name some with --calibration")
    path = user_path(source)
    suffix = suffix_of(path, source)
    tokenizer = load_tokenizer(model_folder)
    if suffix in YAML:
        rows = token_rows(run_of(path, tokenizer), settings.seed)
        return pack_checked(rows, settings, model_folder, source)
    if suffix in TEXT:
        size = WINDOWS_PER_DOCUMENT * settings.calibration_length * CHARACTERS_PER_TOKEN
        texts = blocks_of(path, size, settings.seed)
    else:
        found = file_rows(path, settings.seed) if suffix else hub_rows(source, settings.seed)
        texts = (text_of(row, tokenizer, where) for row, where in found)
    ids = (token_ids(tokenizer, text) for text in texts)
    return pack_checked(ids, settings, model_folder, source, tokenizer.eos_token_id)


def pack_checked(
    rows: Iterable[Sequence[int]],
    settings: Calibrated,
    model_folder: Path,
    source: str,
    separator: int | None = None,
    shrink: bool = False,
) -> Calibration:
    """`pack_rows` as the settings say, and checked against the model in a folder.

    Raises:
        LoRAMError: The sequences are longer than the model reads, have tokens that it lacks, or
            there are not enough tokens.
    """
    config = layer_fields(load_config(str(model_folder)), None)
    samples, length = settings.calibration_samples, settings.calibration_length
    if length > (config.get("max_position_embeddings") or length):
        raise LoRAMError(
            "expected calibration sequences of at most the model's "
            f"{config['max_position_embeddings']} tokens, found {length}: give a shorter "
            "--calibration-length"
        )
    packed = pack_rows(rows, samples, length, settings.seed, source, separator, shrink)
    largest = int(packed.tokens.max())
    if largest >= config["vocab_size"]:
        raise LoRAMError(
            f"expected token ids below the model's vocabulary of {config['vocab_size']}, found "
            f"{largest} in {source}: use the tokenizer that belongs to the model"
        )
    return packed


def pack_rows(
    sequences: Iterable[Sequence[int]],
    samples: int,
    length: int,
    seed: int,
    source: str,
    separator: int | None,
    shrink: bool = False,
) -> Calibration:
    """Concatenate token sequences and cut windows out of that, drawn by seed.

    Takes sequences, in their order, only until there is enough. Of a long one a random part of
    4 x length tokens goes in, so that it does not fill everything, unless all of them together are
    not enough: then all of all goes in.

    Args:
        sequences: Token ids of documents.
        samples: How many windows; fewer, with a warning, where there are at least two.
        length: Tokens in each window. Windows do not overlap.
        seed: Of the parts, of the windows and of their order.
        source: What the sequences come from.
        separator: Token to put after each, where it does not end in it.
        shrink: Of less text than two windows, take two shorter ones (of 2 tokens at least): nobody
            asked for this length.

    Raises:
        LoRAMError: There are not enough tokens for two windows.
    """
    drawn = np.random.default_rng(seed)
    documents: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    most, missing = WINDOWS_PER_DOCUMENT * length, samples * length
    for sequence in sequences:
        ids = np.asarray(sequence, dtype=np.int64)
        if separator is not None and ids.size and ids[-1] != separator:
            ids = np.append(ids, separator)
        start = int(drawn.integers(max(len(ids) - most, 0) + 1))
        documents.append(ids)
        parts.append(ids[start : start + most])
        missing -= len(parts[-1])
        if missing <= 0:
            break
    joined = np.concatenate((documents if missing > 0 else parts) or [np.empty(0, np.int64)])
    if shrink:
        length = min(length, max(2, len(joined) // 2))
    found = len(joined) // length
    if found < 2:
        raise LoRAMError(
            f"expected {samples * length} tokens for calibration, at least {2 * length} (two "
            f"sequences), found {len(joined)} in {source}: give more text or a shorter "
            "--calibration-length"
        )
    if found < samples:
        LOG.warning(
            "%s holds %d calibration sequences of %d tokens, not %d: using these",
            *(source, found, length, samples),
        )
    start = int(drawn.integers(len(joined) - found * length + 1))
    windows = joined[start : start + found * length].reshape(found, length)
    return Calibration(windows[drawn.permutation(found)[:samples]], source, seed)


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """A text's token ids, with `special` also those that the tokenizer adds to every text.

    Halves of surrogate pairs, which JSON can hold and no tokenizer takes, are read as U+FFFD.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def run_of(path: Path, tokenizer: Any) -> Any:
    """The settings of an Axolotl YAML.

    Raises:
        LoRAMError: Axolotl tokenizes it otherwise than the model's tokenizer.
    """
    cfg = load_yaml(path)
    if not tokenizer.get_vocab().items() <= vocabulary(cfg).items():
        raise LoRAMError(
            f"expected an Axolotl YAML with the tokenizer of {tokenizer.name_or_path}, found "
            f"{path} with that of {cfg.tokenizer_config}: take a YAML for this model"
        )
    return cfg


def suffix_of(path: Path, source: str) -> str | None:
    """The suffix of a file that can be read, or None for what may be a data set on the hub.

    Raises:
        LoRAMError: There is no such file, or it is of another kind.
    """
    suffix = path.suffix.lower()
    kinds = "a .txt, .jsonl or .yml file, or a data set on the hub (org/name)"
    if path.is_dir():
        raise LoRAMError(f"expected {kinds}, found the folder {source}: name a file in it")
    if path.is_file():
        if suffix not in (*TEXT, *ROWS, *YAML):
            raise LoRAMError(f"expected {kinds}, found {source}: convert it to one of these")
        return suffix
    if (
        suffix in (*TEXT, *ROWS, *YAML)
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
    ):
        raise LoRAMError(f"no such file: expected {kinds}, found {source!r}: check the path")
    return None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the model in a folder.

    Raises:
        LoRAMError: There is none that transformers loads.
    """
    # For some families transformers makes up an empty tokenizer where a folder has none.
    reason = "no file of a vocabulary"
    if any(file for pattern in (TOKENIZER_FILE, *OTHER_FILES) for file in folder.glob(pattern)):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = one_line(error)
    raise LoRAMError(
        f"expected the model's tokenizer in {folder}, found none that transformers loads "
        f"({reason}): put the tokenizer's files beside the weights"
    )


def blocks_of(path: Path, size: int, seed: int) -> Iterator[str]:
    """A text file in blocks of whole lines, about `size` characters each, in a drawn order."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoRAMError(
            f"expected UTF-8 text in {path}, found bytes that are not ({error}): convert it"
        ) from None
    cuts = [0]
    while cuts[-1] < len(text):
        end = cuts[-1] + size
        newline = text.rfind("\n", cuts[-1], end) + 1 if end < len(text) else 0
        cuts.append(newline or min(end, len(text)))
    for block in np.random.default_rng(seed).permutation(len(cuts) - 1):
        yield text[cuts[block] : cuts[block + 1]]


def file_rows(path: Path, seed: int) -> Iterator[tuple[Any, str]]:
    """Rows of a file in a drawn order, and where each stands: JSON lines, or one JSON array.

    Of lines, only where they begin is held in memory, and only those asked for are parsed.
    """
    begins = array("q", [0])
    with path.open("rb") as file:
        if file.read(MOST_BLANKS).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _rows_of_array(path, seed)
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if not line.strip():
                raise LoRAMError(
                    f"expected a JSON object in each line, found line {number} of {path} empty: "
                    "take it out"
                )
            begins.append(begins[-1] + len(line))
        for index in np.random.default_rng(seed).permutation(len(begins) - 1):
            file.seek(begins[index])
            where = f"line {index + 1} of {path}"
            try:
                yield json.loads(file.readline()), where
            except (ValueError, RecursionError) as error:
                raise LoRAMError(
                    f"expected a JSON object in each line, found {where} invalid ({error}): "
                    "correct it"
                ) from None


def _rows_of_array(path: Path, seed: int) -> Iterator[tuple[Any, str]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoRAMError(
            f"expected a JSON object in each line of {path}, or one array of them, found neither "
            f"({error}): correct it"
        ) from None
    for index in np.random.default_rng(seed).permutation(len(rows)):
        yield rows[index], f"row {index + 1} of {path}"


def hub_rows(source: str, seed: int) -> Iterator[tuple[Any, str]]:
    """Rows of a data set on the hub (name, name:subset or name:subset:split), and its name.

    They are streamed: all are never downloaded. The split is train, where none is named.
    """
    from datasets import load_dataset

    name, subset, split = [*source.split(":", 2), "", ""][:3]
    try:
        rows = load_dataset(name, subset or None, split=split or "train", streaming=True)
        shuffled = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        yield from ((row, source) for row in shuffled)
    except (OSError, ValueError, RuntimeError) as error:
        raise LoRAMError(
            f"expected text: a file, or a data set with a {split or 'train'} split that the hub "
            f"gives out, found {source!r} ({one_line(error)}): check the name, the subset and the "
            "connection"
        ) from None


def text_of(row: Any, tokenizer: Any, where: str) -> str:
    """The text of a row: `text`, the joined `segments`, or the `messages` in their template."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    found = f"found {', '.join(row)}" if isinstance(row, dict) else f"found {type(row).__name__}"
    try:
        if isinstance(row, dict) and "segments" in row:
            return "".join(segment["text"] for segment in row["segments"])
        if isinstance(row, dict) and "messages" in row:
            if not tokenizer.chat_template:
                found = "found messages, for which the tokenizer has no chat template"
            else:
                return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    except Exception as error:  # chat templates are programs, and refuse what they like
        found += f", refused ({type(error).__name__}: {one_line(error)})"
    raise LoRAMError(
        f"expected a text, segments or messages in {where}, {found}: give rows with a text"
    )
