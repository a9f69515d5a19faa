"""Artefacts from strangers: small folders of every kind, mutated, and the doors they enter by.

A door reads one kind of folder. Whatever is in it, the door opens, or says in one sentence
(LoRAMError) why it does not; within bounded time and memory, and without writing outside.
`benchmarks/fuzz.py` tries as many mutations as one likes, tests/test_hostile.py some thousands.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from families import MOE, PICO

from axolotl_loram.architecture import parameters, tensors, with_defaults
from axolotl_loram.args import PruningArgs
from axolotl_loram.checkpoint import ADAPTER_FILE, MODEL_FILE, Checkpoint, write_safetensors
from axolotl_loram.inspection import inspect
from axolotl_loram.matching import ADAPTER_CONFIG, match
from axolotl_loram.pairing import check_base, check_pruned, read_record
from axolotl_loram.plan import PLAN_FILE, RECORD_FILE, PruningPlan, keep_counts, summary
from axolotl_loram.prune import prune
from axolotl_loram.recover import recover
from axolotl_loram.sources import load_config

SMALL = {
    **{k: v for k, v in PICO.items() if not k.endswith("_id")},
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 32,
    "head_dim": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {"llama": SMALL, "qwen3_moe": {**SMALL, **MOE, "moe_intermediate_size": 16}}
MAX_FILE = 1 << 20


def write_model(folder: Path, config: Mapping[str, Any], shards: int = 2, seed: int = 0) -> Path:
    """A model of random bits, in shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(seed)
    listed = [(t.name, "F16", t.shape) for t in tensors(with_defaults(config))]
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = listed[shard::shards]
        data = (numbers.normal(size=shape).astype("<f2").view("<u2") for _, _, shape in mine)
        write_safetensors(folder / name, mine, data)
        weight_map |= {tensor: name for tensor, _, _ in mine}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{MODEL_FILE}.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, plan: PruningPlan, pruned: Path, rank: int = 2) -> Path:
    """LoRA on all linear layers of the pruned model, as PEFT writes it."""
    folder.mkdir(parents=True)
    adapted = [t for t in parameters(plan.pruned_config) if t.linear]
    shapes = {
        f"base_model.model.{t.module}.lora_{side}.weight": shape
        for t in adapted
        for side, shape in (("A", (rank, t.shape[1])), ("B", (t.shape[0], rank)))
    }
    described = [(name, "F32", shape) for name, shape in shapes.items()]
    numbers = np.random.default_rng(1)
    data = (numbers.normal(size=shape).astype("<f4").view("<u4") for shape in shapes.values())
    write_safetensors(folder / ADAPTER_FILE, described, data)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none"}
    config |= {
        "target_modules": sorted({t.module.split(".")[-1] for t in adapted}),
        "base_model_name_or_path": str(pruned),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    trained = {"pruned_model": str(pruned)}
    record = {"schema_version": 1, "kind": "trained-adapter", "base": vars(plan.base)}
    (folder / RECORD_FILE).write_text(
        json.dumps({**record, "plan": plan.digest, "training": trained})
    )
    return folder


@dataclass
class Artefacts:
    """A base, its pruned version and an adapter trained on that, all whole."""

    base: Path
    pruned: Path
    adapter: Path

    @classmethod
    def make(cls, folder: Path, model_type: str) -> Artefacts:
        """Make them below a new folder."""
        base = write_model(folder / "base", {**CONFIGS[model_type], "model_type": model_type})
        prune(str(base), folder / "pruned", PruningArgs(ratio=0.5, protect_first=1, protect_last=1))
        plan = PruningPlan.load(folder / "pruned")
        adapter = write_adapter(folder / "adapter", plan, folder / "pruned")
        return cls(base, folder / "pruned", adapter)


def _read_base(whole: Artefacts, suspect: Path) -> None:
    config = load_config(str(suspect))
    summary(config, keep_counts(config, 0.5, 1, 1))
    Checkpoint(suspect).fingerprint()


def _pair(whole: Artefacts, suspect: Path) -> None:
    check_base(PruningPlan.load(whole.pruned), str(suspect))


def _read_pruned(whole: Artefacts, suspect: Path) -> None:
    plan = PruningPlan.load(suspect)
    check_pruned(suspect, plan)
    summary(plan.config, plan.counts)


def _recover(whole: Artefacts, suspect: Path) -> None:
    read_record(suspect)
    recover(suspect, str(whole.pruned), suspect.parent / "recovered", overwrite=True)


def _recover_under(whole: Artefacts, suspect: Path) -> None:
    recover(whole.adapter, str(suspect), suspect.parent / "recovered", overwrite=True)


def _match(whole: Artefacts, suspect: Path) -> None:
    match(Checkpoint(suspect, ADAPTER_FILE), PruningPlan.load(whole.pruned), full_size=False)


def _inspect(whole: Artefacts, suspect: Path) -> None:
    inspect(str(suspect), verifying=True)


@dataclass(frozen=True)
class Door:
    """A way in: what reads a folder of which kind, and the files there that a stranger wrote."""

    enter: Callable[[Artefacts, Path], None]
    kind: str
    files: tuple[str, ...]


SHARD, INDEX = "model-00001-of-00002.safetensors", f"{MODEL_FILE}.index.json"
DOORS = {
    "base config": Door(_read_base, "base", ("config.json",)),
    "base index": Door(_read_base, "base", (INDEX,)),
    "base shard": Door(_read_base, "base", (SHARD,)),
    "base pairing": Door(_pair, "base", ("config.json", INDEX, SHARD)),
    "pruned config": Door(_read_pruned, "pruned", ("config.json",)),
    "pruned weights": Door(_read_pruned, "pruned", ("model*.safetensors*",)),
    "plan": Door(_read_pruned, "pruned", (PLAN_FILE,)),
    "record": Door(_read_pruned, "pruned", (RECORD_FILE,)),
    "plan for recovery": Door(_recover_under, "pruned", (PLAN_FILE, RECORD_FILE)),
    "adapter config": Door(_recover, "adapter", (ADAPTER_CONFIG,)),
    "adapter weights": Door(_recover, "adapter", (ADAPTER_FILE,)),
    "adapter names": Door(_match, "adapter", (ADAPTER_FILE,)),
    "pruned, verified": Door(_inspect, "pruned", (RECORD_FILE, PLAN_FILE, "config.json", INDEX)),
    "adapter, verified": Door(_inspect, "adapter", (RECORD_FILE, ADAPTER_CONFIG, ADAPTER_FILE)),
    "adapter record": Door(_recover, "adapter", (RECORD_FILE,)),
}

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "a", "\0", "\ud800", "é" * 50),
    *("../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "file:///x", "x" * 5000, "{}"),
    *([], {}, [[]], [0], {"a": 1}, [1, 2, 3], ["a"], {"0": {}}, {"": None}, [None]),
)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """The value with something, somewhere, replaced, taken away, added or swapped."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        around, key = chance.choice(places)
        way = chance.randrange(5)
        try:
            if way < 2:
                around[key] = copy.deepcopy(chance.choice(NASTY))
            elif way == 2:
                del around[key]
            elif way == 3 and isinstance(around, dict):
                around[str(chance.choice(NASTY))] = around[key]
            else:
                other, where = chance.choice(places)
                around[key] = copy.deepcopy(other[where])
        except (KeyError, IndexError):  # an earlier change took the place away
            continue
    return value


def _places(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """The bytes with some flipped, cut, repeated or put in."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 8, 100)))
        new = bytes(chance.randrange(256) for _ in range(end - at))
        part = chance.choice((new, b"", data[at:end] * 2, b"\xff" * 8, b"[" * 5000, b"9" * 400))
        data = (data[:at] + part + data[end:])[:MAX_FILE] or b"\0"
    return data


def mutate_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header, or what it says of its own length, is another."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    inner = {key: text for key, text in metadata.items() if text.startswith("{")}
    if inner and chance.random() < 0.6:  # JSON within JSON: what a plan says of its base
        key = chance.choice(list(inner))
        metadata[key] = json.dumps(mutate_json(json.loads(inner[key]), chance))
    elif chance.random() < 0.5 and len(data) > 8 + size:  # the numbers themselves
        at = chance.randrange(8 + size, len(data))
        word = chance.choice((0, 1, 23, 24, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
        return (data[:at] + word + data[at + 4 :])[: len(data)]
    else:
        header = mutate_json(header, chance)
    text = json.dumps(header).encode()
    said = len(text) if chance.random() < 0.9 else chance.choice((0, 2**63, 2**64 - 1, len(data)))
    return said.to_bytes(8, "little") + text + data[8 + size :]


def mutate_file(file: Path, chance: random.Random) -> None:
    """Put a mutation in a file's place; now and then a link out of the folder, or nothing."""
    way, data = chance.random(), file.read_bytes()
    if way < 0.02:
        file.unlink()
    elif way < 0.04:
        file.unlink()
        file.symlink_to(chance.choice(("/etc/passwd", "/dev/zero", "..", "nowhere", file.name)))
    elif way < 0.3:
        file.write_bytes(mutate_bytes(data, chance))
    elif file.suffix == ".json":
        text = json.dumps(mutate_json(json.loads(data), chance))
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(mutate_safetensors(data, chance))


class Suspect:
    """A copy of whole artefacts of one kind, in which one file at a time is mutated."""

    def __init__(self, door: Door, whole: Artefacts, folder: Path) -> None:
        self.door, self.whole, self.folder = door, whole, folder
        shutil.copytree(getattr(whole, door.kind), folder)
        self.files = sorted(file for pattern in door.files for file in folder.glob(pattern))

    def attempt(self, seed: int) -> None:
        """Mutate a file, go in, and put the file back.

        Raises:
            LoRAMError: The door said why it does not open. Anything else is a fault of ours.
        """
        chance = random.Random(seed)
        file = chance.choice(self.files)
        before = file.read_bytes()
        try:
            mutate_file(file, chance)
            self.door.enter(self.whole, self.folder)
        finally:
            file.unlink(missing_ok=True)
            file.write_bytes(before)
