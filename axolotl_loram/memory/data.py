"""What a run trains on, as far as its YAML and its files tell, and what an anchor of it costs.

Nothing is tokenized: a local file of text counts a token for every four bytes, which is assumed
(English in JSON has between three and five); of data elsewhere only `--tokens` or `max_steps` tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.compute import forward_flops
from axolotl_loram.memory.layout import Layout, part_of
from axolotl_loram.memory.settings import TrainingArgs

BYTES_PER_TOKEN = 4
UNKNOWN = 1_000_000
MOST = 2**40
"""Steps or epochs beyond are a mistake."""
TEXT = (".json", ".jsonl", ".txt", ".csv")
TOP_K = 32
"""Tokens that an anchor names at each place; 8, 32, 128 and all did the same (`real.csv`)."""
TOKENS_PER_PART = 2**20
"""Tokens whose hidden states lie on disk at once: 32 GiB of them for a 70B model in bfloat16."""


@dataclass(frozen=True)
class Data:
    """Tokens of a run: of its data set once, and of all epochs; `said` is how they are known."""

    once: int
    trained: int
    said: str


ANY_DATA = Data(UNKNOWN, UNKNOWN, "for a million; the data set is not known: give --tokens")


def data_of(cfg: Mapping[str, Any], run: TrainingArgs, tokens: int | None) -> Data:
    """The tokens of a run: as somebody counted them (`tokens`), else by its config, if any.

    Raises:
        LoRAMError: `tokens` is below 1, or there are no or endless epochs or steps.
    """
    epochs, steps = cfg.get("num_epochs") or 1, cfg.get("max_steps") or 0
    if tokens is not None and tokens < 1:
        raise LoRAMError(f"expected at least one token, found --tokens {tokens}: give a number")
    for name, number in {"num_epochs": epochs, "max_steps": steps}.items():
        if not number < MOST or (name == "num_epochs" and number <= 0):
            found = number if number <= 0 else "a larger one, or none"
            raise LoRAMError(
                f"expected {name} to be above 0 and below 2**40, found {found}: correct it"
            )
    most = steps * run.tokens * run.gradient_accumulation_steps
    size = sum(file.stat().st_size for file in _files(cfg) or ())
    if tokens:
        once, said = tokens, "as given"
    elif size:
        once = max(1, size // BYTES_PER_TOKEN)
        said = f"about, from {size:,} bytes of data at {BYTES_PER_TOKEN} a token (assumed)"
    elif most > 0:
        return Data(most, most, "max_steps, every sequence full")
    else:
        return ANY_DATA
    trained = math.ceil(once * epochs)
    if 0 < most < trained:
        trained, said = most, f"max_steps, every sequence full; the data set: {said}"
    return Data(once, trained, said)


def _files(cfg: Mapping[str, Any]) -> list[Path] | None:
    """The files of all data sets of a run; None where one of them is not here."""
    found: list[Path] = []
    for named in cfg.get("datasets") or ():
        own = list(_files_of(named)) if isinstance(named, Mapping) else []
        if not own:
            return None
        found += own
    return found


def _files_of(named: Mapping[str, Any]) -> Iterator[Path]:
    listed = named.get("data_files") or named.get("path")
    for name in listed if isinstance(listed, list) else [listed]:
        place = Path(str(name))
        with suppress(OSError, ValueError):  # names that no file system takes, folders not ours
            if place.is_dir():
                yield from (file for file in sorted(place.iterdir()) if file.suffix in TEXT)
            elif place.is_file() and place.suffix in TEXT:
                yield place


def place_bytes(top_k: int, trained_only: bool = True) -> int:
    """Bytes that a model's outputs at one place take: tokens, their log-probabilities, the rest.

    Of trained places they are in 32 bits, otherwise in 16.
    """
    return top_k * (8 if trained_only else 6) + 4


def anchor_costs(
    base: Layout, run: TrainingArgs, data: Data, upper: Layout | None = None
) -> dict[str, Any]:
    """What `anchor: base` takes before the first step.

    Args:
        base: Layout of the original.
        run: Settings of the run.
        data: Its tokens; if not all of them are trained, `disk_bytes` and `flops` are less.
        upper: Layout of the pruned model, where whole layers are removed: then their hidden states
            are kept, of all tokens, and the other layers are not run.

    Returns:
        "tokens"; "disk_bytes" of what is kept; "states_bytes" of hidden states on disk meanwhile;
        "flops" of the original's forward pass; "parts" that the data are taken through the layers
        in (more, where lengths differ much), and "read_bytes" of its weights for that.
    """
    stored, flops, kept = stored_bytes(base), forward_flops(run, base), place_bytes(TOP_K)
    if upper is not None:
        embedding = next(t for t in base.outside if part_of(t) == "embedding")
        stored += 2 * math.prod(embedding.shape) - stored_bytes(upper)
        flops, kept = flops - forward_flops(run, upper), 2 * base.hidden
    parts = math.ceil(data.once / TOKENS_PER_PART)
    states = 2 * min(data.once, TOKENS_PER_PART) * base.hidden * run.compute_bytes
    return {
        "tokens": data.once,
        "disk_bytes": data.once * kept,
        "states_bytes": states,
        "flops": data.once * flops,
        "parts": parts,
        "read_bytes": parts * stored,
    }


def stored_bytes(layout: Layout, width: int = 2) -> int:
    """Bytes of a checkpoint of a model, of 16-bit weights."""
    return width * sum(math.prod(tensor.shape) * count for tensor, count in layout.tensors)
