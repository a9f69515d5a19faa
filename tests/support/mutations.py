"""Mutations of what a stranger may send: JSON, YAML, safetensors, index files, any bytes."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import yaml

MAX_FILE = 1 << 20
Fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
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


BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
MERGES = "a0: &a0 {a: 1}\n" + "\n".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)
)
YAML_ALONE = (
    *(BOMB, MERGES, "a: &a\n  b: *a", "loram: !!python/object/apply:os.getcwd []", "? [a]\n: b"),
    *("<<: *a", "loram: &l {a: 1}\nb: {<<: [*l, *l]}", f"lora_r: {'1:' * 5000}1", "a: 2001-99-99"),
)
"""What YAML has and JSON has not: aliases, merges, tags, keys of any kind, odd numbers."""


def mutate_yaml(data: bytes, chance: random.Random) -> bytes:
    """Settings with other values, or with what YAML alone has: tags, aliases, merges."""
    if chance.random() < 0.7:
        return json.dumps(mutate_json(yaml.load(data, Fast), chance)).encode()  # which YAML is too
    return data + b"\n" + chance.choice(YAML_ALONE).encode()


def write_indices_of_another(file: Path, chance: random.Random) -> None:
    """A tensor of another kind, size or order; or no tensor."""
    import torch

    of_any = torch.randint(-4, 40, (chance.randrange(12),))
    file.unlink()
    chosen = (
        *(of_any, of_any.short(), of_any.float(), of_any.bool(), of_any.to(torch.complex64)),
        *(torch.tensor(chance.choice((0, -1, 2**31, 2**62))), torch.arange(8).flip(0)),
        *(torch.arange(4).repeat(2), torch.zeros(1, dtype=torch.long).expand(2**40)),
        *(torch.zeros(1, dtype=torch.int8).expand(2**20, 2**20), torch.zeros(0), [1, 2], None),
        *(torch.eye(3).to_sparse(), [torch.arange(2), torch.arange(3)], {"pruned_idx": 1}, "x"),
        torch.empty(3, dtype=torch.long, device="meta"),
    )
    value = chance.choice(chosen)
    torch.save(value if chance.random() < 0.1 else {"pruned_idx": value}, file)


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
    elif file.suffix == ".yml":
        file.write_bytes(mutate_yaml(data, chance))
    elif file.suffix == ".pt":
        write_indices_of_another(file, chance)
    else:
        file.write_bytes(mutate_safetensors(data, chance))
