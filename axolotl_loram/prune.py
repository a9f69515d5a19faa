"""Making a pruned checkpoint: choose a plan, then gather every tensor along it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram import __version__
from axolotl_loram.architecture import Tensor, family_of, layer_fields, sizes_of, tensors
from axolotl_loram.args import PruningArgs
from axolotl_loram.checkpoint import (
    Checkpoint,
    check_vacant,
    new_folder,
    read_json,
    write_json,
    write_safetensors,
)
from axolotl_loram.importance import (
    as_float,
    magnitude_scores,
    random_scores,
    select,
)
from axolotl_loram.pairing import check_tensors
from axolotl_loram.plan import (
    RECORD_FILE,
    SCHEMA_VERSION,
    Base,
    PruningPlan,
    gather,
    keep_counts,
    summary,
)
from axolotl_loram.reference import read_indices
from axolotl_loram.sources import TOKENIZER_PATTERNS, commit_of, find_folder, load_config

Progress = Callable[[int], object]
"""Called with bytes done since the last call."""


def prune(
    model: str,
    output: Path,
    settings: PruningArgs,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> dict[str, Any]:
    """Write a pruned checkpoint: an ordinary Hugging Face folder, its plan and its record.

    Args:
        model: Folder or hub id of the base model, in safetensors.
        output: Folder to write.
        settings: How to prune.
        revision: Revision on the hub.
        overwrite: Replace what `output` holds.
        progress: Given the bytes to write, returns a callback for the bytes done.

    Returns:
        What `loram.json` says.

    Raises:
        LoRAMError: Anything is wrong with the input; nothing is left at `output` then.
    """
    check_vacant(output, overwrite)
    config = load_config(model, revision)
    folder = find_folder(model, revision)
    checkpoint = Checkpoint(folder)
    check_tensors(config, {n: t.shape for n, t in checkpoint.tensors.items()}, where=str(folder))
    name = str(folder.resolve()) if Path(model).exists() else model
    base = Base(name, commit_of(folder, revision), checkpoint.fingerprint())
    plan = make_plan(checkpoint, config, base, settings)
    with new_folder(output, overwrite) as scratch:
        files = write_weights(checkpoint, plan, scratch, progress)
        record = _write_rest(folder, plan, settings, scratch, files)
    return record


def make_plan(
    checkpoint: Checkpoint, config: dict[str, Any], base: Base, settings: PruningArgs
) -> PruningPlan:
    """Choose which units to keep."""
    if settings.indices is not None:
        return PruningPlan(config, read_indices(Path(settings.indices), config), base)
    family, kept = family_of(config), {}
    assert settings.ratio is not None  # PruningArgs saw to it
    counts = keep_counts(config, settings.ratio, settings.protect_first, settings.protect_last)
    declared: dict[int | None, list[Tensor]] = {}
    for tensor in tensors(config):
        declared.setdefault(tensor.layer, []).append(tensor)
    for layer, count in counts.items():
        for group in family.groups:
            if settings.method == "random":
                units = sizes_of(layer_fields(config, layer))[group.kind]
                scores = random_scores(units, settings.seed, layer, group.kind)
            else:
                members = [t for t in declared[layer] if group.kind in t.kinds]
                loaded = [(tensor, as_float(checkpoint[tensor.name])) for tensor in members]
                scores = magnitude_scores(loaded, group.kind)
            kept[family.entry(layer, group)] = select(scores, count[group.kind])
    return PruningPlan(config, kept, base)


def write_weights(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    folder: Path,
    progress: Callable[[int], Progress] | None = None,
) -> dict[str, str]:
    """Gather every tensor along the plan, shard by shard, one tensor in memory at a time.

    Returns:
        File name → SHA-256.
    """
    base_tensors = {tensor.name: tensor for tensor in tensors(plan.config)}
    shapes = {t.name: t.shape for t in tensors({**plan.config, **plan.changes})}
    shards = {
        shard: [name for name in names if name in base_tensors]
        for shard, names in checkpoint.shards.items()
    }
    shards = {shard: names for shard, names in shards.items() if names}
    size = sum(
        int(np.prod(shapes[name], dtype=np.int64)) * checkpoint[name].bits.itemsize
        for name in shapes
    )
    done = progress(size) if progress else None

    def gathered(names: list[str]) -> Iterator[np.ndarray]:
        for name in names:
            tensor = base_tensors[name]
            array = gather(checkpoint[name].read(), plan.features(tensor.dims, tensor.layer))
            yield array
            if done:
                done(array.nbytes)

    files: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards.values(), start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(names, file)
        described = [(name, checkpoint[name].dtype, shapes[name]) for name in names]
        files[file] = write_safetensors(folder / file, described, gathered(names))
    if weight_map:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return files


def _write_rest(
    base_folder: Path, plan: PruningPlan, settings: PruningArgs, folder: Path, files: dict[str, str]
) -> dict[str, Any]:
    """Write config, tokenizer, plan and record beside the weights."""
    raw = read_json(base_folder / "config.json")
    write_json(folder / "config.json", {**raw, **plan.changes})
    for pattern in (*TOKENIZER_PATTERNS, "generation_config.json"):
        for file in base_folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    plan.save(folder)
    for file in sorted(folder.iterdir()):
        files.setdefault(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": "pruned-model",
        "base": asdict(plan.base),
        "pruning": settings.model_dump(),
        "calibration": None,
        "alignment": None,
        "parameters": summary(plan.config, plan.counts),
        "plan": plan.digest,
        "versions": versions(),
        "files": dict(sorted(files.items())),
    }
    write_json(folder / RECORD_FILE, record)
    return record


def versions() -> dict[str, str]:
    """Versions of what made an artefact, as far as installed."""
    found = {"axolotl_loram": __version__}
    for package in ("axolotl", "transformers", "peft", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
