"""Files that strangers wrote: ordinary ones in their folder, JSON and YAML of bounded size."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError

MOST_JSON_BYTES = 100 * 2**20
"""As safetensors bounds its headers; the index of a model with 100,000 tensors has a tenth."""
MOST_YAML_BYTES = 2**18
"""Takes seconds to parse; libyaml, which is faster, crashes where brackets nest deeply."""
MOST_YAML_VALUES = 100_000
DEEPEST = 50
LONGEST_NUMBER = 1_000
HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON writes one of UTF-16's surrogates."""


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
    snapshot = next((f for f in (folder, folder.parent) if f.parent.name == "snapshots"), None)
    cache = snapshot.parent.parent / "blobs" if snapshot else None
    if not ordinary or not (real.parent == folder or (cache and real.parent == cache)):
        found = "a link to" if real != folder / file.name else "no such thing but"
        raise LoRAMError(
            f"expected an ordinary file {file}, found {found} {real}: do not use a folder that "
            "reaches out of itself; if it is your own, copy the file to where the link is"
        )
    return file


def parse_json(text: str, where: object) -> dict[str, Any]:
    """A JSON object; `where` names its place in the message of the LoRAMError for anything else."""
    try:
        value = json.loads(text)
        if HALF_A_CHARACTER.search(text):  # of a pair, perhaps; alone, no file takes it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise LoRAMError(f"expected a JSON object in {where}, found {error}") from None
    if not isinstance(value, dict):
        raise LoRAMError(f"expected a JSON object in {where}, found a {type(value).__name__}")
    return value


def read_json(file: Path, linked: bool = False) -> dict[str, Any]:
    """A JSON object from a file; one that users name may be `linked`: be a link out of its folder.

    Raises:
        LoRAMError: There is no such file, it is not an ordinary one, or it is no JSON object.
    """
    return parse_json(read_text(file, MOST_JSON_BYTES, "a JSON object", linked), file)


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping from a YAML file that users name, such as an Axolotl config; empty if it is none.

    Raises:
        LoRAMError: There is no such file, it is too large, or no YAML.
    """
    return parse_yaml(read_text(file, MOST_YAML_BYTES, "YAML", linked=True), file)


def parse_yaml(text: str, where: object) -> dict[str, Any]:
    """A mapping; empty if the YAML is none.

    Plain values alone: tags that make objects are refused, and so are aliases that stand for more
    than a file of the largest size could hold.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Gives up where brackets nest deeply, which PyYAML takes seconds for."""

        def fetch_flow_collection_start(self, TokenClass: Any) -> None:
            if self.flow_level > DEEPEST:
                raise LoRAMError(f"expected at most {DEEPEST} brackets in one another in {where}")
            super().fetch_flow_collection_start(TokenClass)

    try:
        loader = Loader(text)
        node = loader.get_single_node()
        _check_expansion(node, where)
        value = loader.construct_document(node) if node else None
    except LoRAMError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise LoRAMError(f"expected {where} to be YAML, found that it is not: {reason}") from None
    return value if isinstance(value, dict) else {}


def _check_expansion(root: Any, where: object) -> None:
    """Refuse YAML in which aliases, or one number, take much longer to work out than to read."""
    from yaml import ScalarNode

    counted: dict[int, int] = {}

    def count(node: Any) -> int:
        if isinstance(node, ScalarNode):
            if len(node.value) > LONGEST_NUMBER and not node.tag.endswith(":str"):
                raise LoRAMError(
                    f"expected numbers of at most {LONGEST_NUMBER} characters in {where}, found "
                    f"{len(node.value)}: do not use this file"
                )
            return 1
        if id(node) not in counted:
            counted[id(node)] = MOST_YAML_VALUES + 1  # what a node that holds itself stands for
            parts = (part for pair in node.value for part in pair)
            inner = parts if node.id == "mapping" else node.value
            counted[id(node)] = 1 + sum(map(count, inner))
        if counted[id(node)] > MOST_YAML_VALUES:
            raise LoRAMError(
                f"expected aliases in {where} that stand for at most {MOST_YAML_VALUES} values, "
                "found more: do not use this file, it is made to fill the memory"
            )
        return counted[id(node)]

    if root is not None:
        count(root)


def read_text(file: Path, most: int, what: str, linked: bool = False) -> str:
    """The text of a file of at most `most` bytes; `what` and `linked` as in `read_json`.

    Raises:
        LoRAMError: There is no such file, it is not an ordinary one, too large, or no UTF-8.
    """
    try:
        if not (linked and file.is_file()):
            own_file(file)
        if file.stat().st_size > most:
            raise LoRAMError(f"expected at most {most} bytes in {file}, found more")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoRAMError(f"expected the file {file}, found none") from None
    except (UnicodeDecodeError, OSError) as error:
        raise LoRAMError(f"expected {what} in {file}, found {error}") from None


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder that match any pattern to the same place in another.

    Raises:
        LoRAMError: One is not an ordinary file.
    """
    for pattern in patterns:
        for file in source.glob(pattern):
            if not file.is_dir():
                place = target / file.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(own_file(file), place)


def check_types(
    value: Mapping[str, Any], expected: Mapping[str, type | tuple], where: object
) -> None:
    """Refuse a JSON object in which a known key has a value of another type; all may be missing."""
    for name, types in expected.items():
        if name in value and not isinstance(value[name], types):
            kinds = types if isinstance(types, tuple) else (types,)
            raise LoRAMError(
                f"expected {name} in {where} to be a {' or '.join(k.__name__ for k in kinds)}, "
                f"found {str(value[name])[:80]!r}: the file is damaged, or not ours"
            )
