"""Files that strangers wrote: ordinary ones that lie in their folder, and JSON of bounded size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError

MOST_JSON_BYTES = 100 * 2**20
"""As safetensors bounds its headers; the index of a model with 100,000 tensors has a tenth."""


def own_file(file: Path) -> Path:
    """`file`, if it is an ordinary file, or there is none.

    A link out of its folder would have us read, and copy into what is published, files of whoever
    downloaded it. The hub's cache alone, where snapshots link to blobs beside, may do that.

    Raises:
        LoRAMError: It is something else, or a link out of its folder.
    """
    try:
        folder, real = file.parent.resolve(), file.resolve()
        ordinary = real.is_file() or not real.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names with a zero
        raise LoRAMError(f"expected an ordinary file {file}, found {error}") from None
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if not ordinary or not (real.parent == folder or (cache and real.parent == cache)):
        found = "a link to" if real != folder / file.name else "no such thing but"
        raise LoRAMError(
            f"expected an ordinary file {file}, found {found} {real}: do not use a folder that "
            "reaches out of itself; if it is your own, copy the file to where the link is"
        )
    return file


def parse_json(text: str, where: object) -> dict[str, Any]:
    """A JSON object.

    Args:
        text: The JSON.
        where: What to call its place in the message.

    Raises:
        LoRAMError: It is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoRAMError(f"expected a JSON object in {where}, found {error}") from None
    if not isinstance(value, dict):
        raise LoRAMError(f"expected a JSON object in {where}, found a {type(value).__name__}")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LoRAMError: There is no such file, it is not an ordinary one, or it is no JSON object.
    """
    try:
        if own_file(file).stat().st_size > MOST_JSON_BYTES:
            raise LoRAMError(f"expected at most {MOST_JSON_BYTES} bytes in {file}, found more")
        return parse_json(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        raise LoRAMError(f"expected the file {file}, found none") from None
    except (UnicodeDecodeError, OSError) as error:
        raise LoRAMError(f"expected a JSON object in {file}, found {error}") from None


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder that match any pattern to another.

    Raises:
        LoRAMError: One is not an ordinary file.
    """
    for pattern in patterns:
        for file in source.glob(pattern):
            if not file.is_dir():
                shutil.copyfile(own_file(file), target / file.name)


def check_types(value: dict[str, Any], expected: dict[str, type | tuple], where: object) -> None:
    """Refuse a JSON object in which a known key has a value of another type; all may be missing.

    Raises:
        LoRAMError: The first that has.
    """
    for name, types in expected.items():
        if name in value and not isinstance(value[name], types):
            kinds = types if isinstance(types, tuple) else (types,)
            raise LoRAMError(
                f"expected {name} in {where} to be a {' or '.join(k.__name__ for k in kinds)}, "
                f"found {str(value[name])[:80]!r}: the file is damaged, or not ours"
            )
