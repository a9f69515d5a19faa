"""Finding what a user names: a folder, a config file, or a model on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import MODEL_FILE, has_weights, shard_names
from axolotl_loram.files.untrusted import read_json

TOKENIZER_PATTERNS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.jinja", "additional_chat_templates/*.jinja", "*.tiktoken", "tekken.json"),
    *("*processor_config.json", "chat_template.json"),
)
"""What reads text for a model, and images."""
MODEL_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("loram*", *TOKENIZER_PATTERNS),
)
TWICE = ("consolidated*", "*/*.safetensors")
"""The same weights again, in the format of another program: Mistral's, and Llama's `original/`."""


def find_folder(
    model: str, revision: str | None = None, patterns: Sequence[str] = MODEL_PATTERNS
) -> Path:
    """The local folder of a model, downloaded to the hub's cache where it is a hub id.

    Args:
        model: A folder, or a hub id such as ``org/name``.
        revision: Branch, tag or commit on the hub; meaningless for a folder.
        patterns: Which files to download.

    Raises:
        LoRAMError: There is no such folder and no such model within reach.
    """
    _check_unicode(model)
    if is_folder(model):
        return Path(model)
    if _looks_local(model):
        raise LoRAMError(f"no such model: expected a folder or a hub id, found {model!r}")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(TWICE)
        )
        return Path(found)
    except hub_errors() as error:
        raise LoRAMError(
            f"no such model: expected a folder or a model that the hub gives out, found {model!r} "
            f"({reason(error)}): check the name, the connection, and `hf auth whoami` for gated "
            "models; what was downloaded so far is kept"
        ) from None


def _check_unicode(name: str) -> None:
    """Refuse a name that no record could hold: bytes of a path that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise LoRAMError(
            f"expected the name of a model in UTF-8, found {os.fsencode(name)!r}: rename the folder"
        ) from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What calls to the hub fail with: its answers, names it refuses, connections, disks."""
    from httpx import HTTPError
    from huggingface_hub.errors import HFValidationError

    return (HTTPError, HFValidationError, OSError)  # HfHubHTTPError is one, offline mode too


def reason(error: BaseException) -> str:
    """An error in one line: what it is and, of several lines, the first that explains it."""
    told = [line.strip(" -.") for line in str(error).splitlines() if line.strip()]
    return ": ".join(told[:2]) or type(error).__name__


def find_local_weights(model: str, revision: str | None = None) -> Path | None:
    """The folder that holds a model's weights on this machine, or None: downloads nothing."""
    if is_folder(model):
        return Path(model) if has_weights(Path(model)) else None
    for name in (MODEL_FILE, f"{MODEL_FILE}.index.json"):
        found = find_local_file(model, name, revision)
        if found is not None:
            folder = found.parent
            whole = name == MODEL_FILE or all((folder / n).exists() for n in shard_names(folder))
            return folder if whole else None
    return None


def find_local_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder, or of a model in the hub's cache, or None: downloads nothing."""
    if is_folder(model) or _looks_local(model):
        with suppress(OSError):  # a name that no file system takes
            return Path(model, name) if Path(model, name).is_file() else None
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def user_path(name: str) -> Path:
    """A path as a user writes it, `~` resolved.

    Raises:
        LoRAMError: It begins with `~` and nobody's home is known.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise LoRAMError(
            f"expected a home folder for {name!r}, found none ({error}): set HOME, or write the "
            "path out"
        ) from None


def is_folder(name: str) -> bool:
    """Whether a name, of any length, is that of a folder."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def is_hub_id(model: str) -> bool:
    """Whether a name is a hub id and not a folder or file of this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return not _looks_local(model) and not Path(model).exists()


def commit_of(folder: Path, revision: str | None) -> str | None:
    """The hub commit that a folder is a snapshot of, if it lies in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else revision


def hub_id_of(folder: Path) -> str | None:
    """The hub id that a folder is a snapshot of, if it lies in the hub's cache."""
    repository = folder.resolve().parent.parent.name
    if folder.resolve().parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def stored_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config as it is stored, from a folder, file or hub id.

    Raises:
        LoRAMError: No such model.
    """
    path = Path(model)
    if not path.is_file():
        path = find_folder(model, revision, patterns=["config.json"]) / "config.json"
    return read_json(path)


def _looks_local(model: str) -> bool:
    """Whether a name cannot be a hub id (``name`` or ``org/name``)."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".json")
