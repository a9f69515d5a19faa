"""Embeddings that a config ties: the weights decide, as they do in transformers (5.16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from axolotl_loram.architecture.config_json import TIED, Config, family_of, is_tied, load_config
from axolotl_loram.architecture.model import HEAD_WEIGHT, tensors
from axolotl_loram.architecture.spaces import EMBEDDING
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_local_weights
from axolotl_loram.files.tensors import Checkpoint


def config_of(model: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config, with its embeddings tied as its weights have it, if all are at hand.

    Raises:
        LoRAMError: No such model, or an unknown architecture.
    """
    config = load_config(model, revision)
    weights = find_local_weights(model, revision) if is_tied(config) else None
    try:
        return by_weights(config, Checkpoint(weights)) if weights else config
    except LoRAMError:  # a download that is not whole yet
        return config


def by_weights(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The config as transformers takes it with these weights.

    Where it ties the embeddings and only the lm_head is stored, that is the embedding too: from now
    on the checkpoint gives it under that name. Where another lm_head is stored, they are not tied.
    The lm_head may be stored under the name that it runs under, also where another is usual.
    """
    config = dict(config)
    name = next((tensor.name for tensor in tensors(config) if tensor.role == EMBEDDING), None)
    head_name = family_of(config).stored_name(HEAD_WEIGHT)
    if head_name not in checkpoint.tensors:
        _rename(checkpoint, HEAD_WEIGHT, head_name)
    head = checkpoint.tensors.get(head_name)
    if not is_tied(config) or name is None or head is None:
        return config
    if name not in checkpoint.tensors:
        _rename(checkpoint, head_name, name)
        return config
    embedding = checkpoint[name]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    pairs = zip(head.blocks(), embedding.blocks(), strict=True) if same else ()
    same = same and not any((one != other).any() for one, other in pairs)
    return config if same else untied(config)


def _rename(checkpoint: Checkpoint, old: str, new: str) -> None:
    if old in checkpoint.tensors:
        checkpoint.tensors[new] = replace(checkpoint.tensors.pop(old), name=new)
        for names in checkpoint.shards.values():
            names[:] = [new if name == old else name for name in names]


def untied(config: Config) -> dict[str, Any]:
    """A config that says in every place that the embeddings are not tied."""
    section = family_of(config).section
    inner = {section: {**config[section], TIED: False}} if section and section in config else {}
    return {**config, **inner, TIED: False}
