"""What tells tokenizers apart: which number each token has, not how their files are written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.untrusted import own_file, read_json

TOKENIZER_FILE = "tokenizer.json"
OTHER_FILES = ("*.model", "vocab*", "*.tiktoken")
"""Where a vocabulary is if there is no tokenizer.json."""


def vocabulary_digest(folder: Path) -> str | None:
    """A digest of a folder's vocabulary; None where there is none.

    Added tokens do not count, which training may add to, nor padding, truncation and templates:
    saved again after training, a tokenizer has the digest that it had. Digests that begin otherwise
    (of tokenizer.json, of other files) say nothing about one another.

    Raises:
        LoRAMError: tokenizer.json is damaged, or a file is not an ordinary one.
    """
    if (folder / TOKENIZER_FILE).exists():
        model = read_json(folder / TOKENIZER_FILE).get("model")
        tokens = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(tokens, list):  # of a Unigram model: [token, score]
            tokens = [entry[0] if isinstance(entry, list) and entry else entry for entry in tokens]
        if not isinstance(tokens, list | dict) or not tokens:
            raise LoRAMError(
                f"expected a tokenizer with a vocabulary in {folder / TOKENIZER_FILE}, found none: "
                "it is damaged, so download it again"
            )
        return f"sha256:{hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()}"
    files = sorted({file for pattern in OTHER_FILES for file in folder.glob(pattern)})
    hashed = hashlib.sha256()
    for file in files:
        with own_file(file).open("rb") as handle:
            hashed.update(hashlib.file_digest(handle, "sha256").digest())
    return f"files-sha256:{hashed.hexdigest()}" if files else None


def differ(one: str | None, other: str | None) -> bool:
    """Whether two digests are known to be of two vocabularies."""
    if one is None or other is None or one.partition(":")[0] != other.partition(":")[0]:
        return False
    return one != other
