"""Scattering an adapter from the pruned model's shapes to the base's, and gathering one back.

Training on the pruned model gives h = x W₀ᴾ + x BᴾAᴾ. The recovered Bᴿ, Aᴿ hold Bᴾ, Aᴾ at the kept
features and zeros elsewhere, so that h = x (W₀ + BᴿAᴿ) on the base (arXiv 2502.13533, eq. 6).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_loram.architecture.config_json import layer_count
from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.pairing import check_plan
from axolotl_loram.architecture.plan import PLAN_FILE, Base, PruningPlan
from axolotl_loram.architecture.record import RECORD_FILE, Kind, Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder, updated_folder, write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, find_folder, is_hub_id
from axolotl_loram.files.tensors import ADAPTER_FILE, write_safetensors
from axolotl_loram.files.untrusted import copy_files
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.scatter import Moved
from axolotl_loram.recovery.servable import one_line, verdicts
from axolotl_loram.recovery.servers import Subject
from axolotl_loram.recovery.whole import check_adapter

LOG = logging.getLogger(__name__)
Filler = Callable[[list[Moved], Mapping[str, Any]], tuple[dict[str, np.ndarray], dict[str, Any]]]
"""Given an adapter's tensors and its config: bits of those that are not just scattered, by name,
and what `loram.json` says about them."""


def recover(
    adapter: Path | Adapter,
    pruned_model: str | None = None,
    output: Path | None = None,
    base: Base | None = None,
    update: bool = False,
    overwrite: bool = False,
    card: str = "",
    fill: Filler | None = None,
    of_run: bool = False,
) -> dict[str, Any]:
    """Turn an adapter trained on a pruned model into a PEFT adapter for the base.

    Returns what its `loram.json` says, and "output", the folder.

    Args:
        adapter: Open, or its folder.
        pruned_model: Folder or hub id of the pruned model; by default the one that the adapter's
            own config names.
        output: Folder to write, by default `default_output(adapter)`.
        base: What the result names as its base, by default the plan's.
        update: Put the files into `output` beside others that it keeps.
        overwrite: Replace what `output` holds.
        card: Text to append to the model card.
        fill: What to put in the place of zeros (see `fitted.Job`); by default, zeros stay.
        of_run: As in `check_adapter`.

    Raises:
        LoRAMError: The adapter cannot be recovered exactly, or does not belong to the plan.
    """
    adapter = Adapter.open(adapter)
    pruned = find_folder(pruned_model or adapter.model, patterns=[PLAN_FILE, RECORD_FILE])
    plan = PruningPlan.load(pruned)
    check_plan(pruned, plan)
    adapter = adapter.of_today(plan.pruned_config)
    moved = check_adapter(adapter, plan, pruned, of_run)
    adapter = replace(adapter, settings=_of_layers(adapter.settings, plan))
    base, output = base or plan.base, output or default_output(adapter.folder)
    base = replace(base, fingerprint=base.fingerprint or plan.base.fingerprint)
    if not update:
        check_vacant(output, overwrite)
    LOG.info("recovering %d tensors of %s to %s", len(moved), adapter.folder, output)
    filled, about = fill(moved, adapter.settings) if fill else ({}, None)

    def put(m: Moved) -> np.ndarray:
        return filled[m.stored.name] if m.stored.name in filled else m.scatter()

    manager = updated_folder(output, ADAPTER_CONFIG) if update else new_folder(output, overwrite)
    with manager as scratch:
        record = Record(
            Kind.RECOVERED_ADAPTER,
            base,
            plan.digest,
            trained=adapter.record.training,
            masked=bool(adapter.record.masked),
            files=_write_adapter(scratch, moved, put, adapter, base),
            fill=about,
        )
        record.save(scratch)
        shapes = {m.stored.name: m.shape for m in moved}
        served = one_line(verdicts(Subject(adapter.settings, shapes, plan.config)))
        text = model_card(base, _steps(record.trained or {}) + f"{served}\n\n" + card)
        (scratch / "README.md").write_text(text, encoding="utf-8")
        copy_files(adapter.folder, scratch, TOKENIZER_PATTERNS)
    return {**record.as_json(), "output": str(output)}


def _of_layers(settings: Mapping[str, Any], plan: PruningPlan) -> Mapping[str, Any]:
    """An adapter's config that says which layers it is of, where the others were removed.

    PEFT takes that beside a list of modules only; otherwise it puts new LoRA there, which is 0.
    """
    if not plan.removed or settings.get("layers_to_transform") is not None:
        return settings
    if not isinstance(settings.get("target_modules"), list):
        return settings
    stay = [n for n in range(layer_count(plan.config)) if n not in plan.removed]
    return {**settings, "layers_to_transform": stay}


def _steps(training: Mapping[str, Any]) -> str:
    """What a card says of an adapter that was saved before its training ended."""
    steps = training.get("steps")
    done, planned = (steps.get("done"), steps.get("planned")) if isinstance(steps, dict) else (0, 0)
    if not isinstance(done, int) or not isinstance(planned, int) or done >= planned:
        return ""
    return f"Saved after {done} of the {planned} steps of its training.\n\n"


def default_output(adapter: Path, made: str = "recovered") -> Path:
    """``run/pruned/checkpoint-7`` → ``run/pruned/recovered-checkpoint-7``.

    Not below the checkpoint: on resume, the Trainer takes a folder there that holds an adapter for
    one more adapter of the pruned model. Not ``checkpoint-7-…``: that looks like a checkpoint.
    """
    adapter = adapter.resolve()
    return adapter.parent / f"{made}-{adapter.name}"


def gather_adapter(
    adapter: Path | Adapter, plan: PruningPlan, pruned_model: str, output: Path
) -> None:
    """The mirror of `recover`: cut a full-size adapter to the pruned model, for a warm start.

    Raises:
        LoRAMError: The adapter is not one for the plan's base.
    """
    adapter = Adapter.open(adapter).of_today(plan.config)
    moved = check_adapter(adapter, plan)
    lost = [each.stored.name for each in moved if 0 in each.shape]
    if lost:
        raise LoRAMError(
            f"expected an adapter of the layers that pruning left, found {lost[0]} ({len(lost)} "
            "such): merge it into the base first, and prune that"
        )
    with new_folder(output, overwrite=True) as scratch:
        _write_adapter(scratch, moved, Moved.gather, adapter, Base(pruned_model))


def _write_adapter(
    folder: Path,
    moved: list[Moved],
    move: Callable[[Moved], np.ndarray],
    adapter: Adapter,
    base: Base,
) -> dict[str, str]:
    """Write weights and config; returns file → SHA-256."""
    described = [(m.stored.name, m.stored.dtype, m.shape) for m in moved]
    digest = write_safetensors(folder / ADAPTER_FILE, described, (move(m) for m in moved))
    named = {"base_model_name_or_path": base.id, "revision": base.revision}
    write_json(folder / ADAPTER_CONFIG, {**adapter.settings, **named})
    config = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes()).hexdigest()
    return {ADAPTER_FILE: digest, ADAPTER_CONFIG: config}


def model_card(base: Base, details: str = "") -> str:
    """A model card whose metadata names the base, for the hub and for people."""
    revision = f" at revision `{base.revision}`" if base.revision else ""
    named = {"base_model": base.id} if is_hub_id(base.id) else {}  # the hub refuses a folder here
    front = {**named, "library_name": "peft", "tags": ["axolotl", "lora", "loram"]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return (
        f"---\n{lines}\n---\n\n# LoRA adapter for {base.id}\n\n"
        f"Runs on `{base.id}`{revision}, the original model, like any PEFT adapter. It was\n"
        "trained on a pruned version of that model and recovered to the original shapes with\n"
        f"axolotl-loram (LoRAM, arXiv 2502.13533).\n\n{details}"
    )
