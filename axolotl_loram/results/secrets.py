"""What must not be written to an artefact, nor published: tokens, keys, passwords."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from axolotl_loram.errors import LoRAMError

TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
SECRET = re.compile(
    r"(?mi)^(\s*(?:- )?(?!(?:bos|eos|pad|unk|mask|cls|sep)_token\b)"
    r"(?:\w+_)?(?:token|key|secret|password)\s*:[ \t]*)[^\s#].*$"
)
"""A line of YAML that holds one."""
SMALL = 2**20
"""Bytes below which a file is searched for tokens."""


def without_secrets(text: str) -> str:
    """A YAML with the values of keys such as hub_token or wandb_api_key, and hub tokens, hidden."""
    hidden = SECRET.sub(lambda found: f"{found[1]}[hidden]", text)
    return TOKEN.sub(b"[hidden]", hidden.encode()).decode()


def refuse_tokens(files: Mapping[str, Path]) -> None:
    """Refuse a small file, such as a YAML in a card, that has a token of the hub in it."""
    from huggingface_hub import get_token

    own = (get_token() or "").encode()
    for name, path in files.items():
        text = path.read_bytes() if path.stat().st_size <= SMALL else b""
        if TOKEN.search(text) or (own and own in text):
            raise LoRAMError(f"expected no token in what is published, found one in {name}")
