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

from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG, named_model
from axolotl_loram.architecture.pairing import (
    check_adapter_tokenizer,
    check_plan,
    check_trained_under,
    read_record,
)
from axolotl_loram.architecture.plan import (
    PLAN_FILE,
    RECORD_FILE,
    SCHEMA_VERSION,
    Base,
    PruningPlan,
)
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, new_folder, updated_folder, write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, find_folder, is_hub_id
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint, write_safetensors
from axolotl_loram.files.untrusted import copy_files, read_json
from axolotl_loram.recovery.scatter import Moved, match
from axolotl_loram.recovery.whole import check_modules, check_trained

LOG = logging.getLogger(__name__)
Filler = Callable[[list[Moved], Mapping[str, Any]], tuple[dict[str, np.ndarray], dict[str, Any]]]
"""Given an adapter's tensors and its config: bits of those that are not just scattered, by name,
and what `loram.json` says about them."""
DEFAULT_INITS = (True, False, "gaussian", "eva", "orthogonal")


def recover(
    adapter: Path,
    pruned_model: str | None = None,
    output: Path | None = None,
    base: Base | None = None,
    update: bool = False,
    overwrite: bool = False,
    card: str = "",
    fill: Filler | None = None,
    of_run: bool = False,
) -> dict[str, Any]:
    """Turn an adapter trained on a pruned model into an ordinary PEFT adapter for the base.

    Args:
        adapter: Folder with adapter_config.json and adapter_model.safetensors.
        pruned_model: Folder or hub id of the pruned model; by default the one that the adapter's
            own config names.
        output: Folder to write, by default `default_output(adapter)`.
        base: What the result names as its base, by default the plan's.
        update: Put the files into `output` beside others that it keeps.
        overwrite: Replace what `output` holds.
        card: Text to append to the model card.
        fill: What to put in the place of zeros (see `fill.filler`); by default, zeros stay.
        of_run: Whether the run that trained the adapter is the caller: then it may be untrained,
            as before the first step, and its tokenizer is not held against the pruned model's.

    Returns:
        What the result's `loram.json` says, and "output", the folder.

    Raises:
        LoRAMError: The adapter cannot be recovered exactly, or does not belong to the plan.
    """
    settings = read_adapter_config(adapter)
    pruned = _plan_folder(pruned_model or named_model(adapter))
    plan = PruningPlan.load(pruned)
    check_plan(pruned, plan)
    check_trained_under(adapter, plan)
    recorded = read_record(adapter)
    checkpoint = Checkpoint(adapter, ADAPTER_FILE)
    moved = match(checkpoint, plan, full_size=False)
    check_modules(checkpoint, settings, plan)
    if not of_run:
        check_trained(checkpoint)
        check_adapter_tokenizer(adapter, pruned)
    base, output = base or plan.base, output or default_output(adapter)
    base = replace(base, fingerprint=base.fingerprint or plan.base.fingerprint)
    if not update:
        check_vacant(output, overwrite)
    LOG.info("recovering %d tensors of %s to %s", len(moved), adapter, output)
    filled, about = fill(moved, settings) if fill else ({}, None)
    manager = updated_folder(output, ADAPTER_CONFIG) if update else new_folder(output, overwrite)
    with manager as scratch:
        files = _write_adapter(scratch, moved, lambda m: _filled(m, filled), settings, base)
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": "recovered-adapter",
            "base": vars(base),
            "plan": plan.digest,
            "trained": recorded.get("training"),
            "masked": bool(recorded.get("masked")),
            "files": files,
            **({"fill": about} if about else {}),
        }
        write_json(scratch / RECORD_FILE, record)
        text = model_card(base, _steps(recorded.get("training") or {}) + card)
        (scratch / "README.md").write_text(text, encoding="utf-8")
        copy_files(adapter, scratch, TOKENIZER_PATTERNS)
    return {**record, "output": str(output)}


def _filled(moved: Moved, filled: Mapping[str, np.ndarray]) -> np.ndarray:
    bits = filled.get(moved.stored.name)
    return moved.scatter() if bits is None else bits


def _steps(training: Mapping[str, Any]) -> str:
    """What a card says of an adapter that was saved before its training ended."""
    steps = training.get("steps")
    done, planned = (steps.get("done"), steps.get("planned")) if isinstance(steps, dict) else (0, 0)
    if not isinstance(done, int) or not isinstance(planned, int) or done >= planned:
        return ""
    return f"Saved after {done} of the {planned} steps of its training.\n\n"


def default_output(adapter: Path) -> Path:
    """``run/pruned/checkpoint-7`` → ``run/pruned/recovered-checkpoint-7``.

    Not below the checkpoint: on resume, the Trainer takes a folder there that holds an adapter for
    one more adapter of the pruned model. Not ``checkpoint-7-…``: that looks like a checkpoint.
    """
    adapter = adapter.resolve()
    return adapter.parent / f"recovered-{adapter.name}"


def gather_adapter(adapter: Path, plan: PruningPlan, pruned_model: str, output: Path) -> None:
    """The mirror of `recover`: cut a full-size adapter to the pruned model, for a warm start.

    Args:
        adapter: Folder of a PEFT LoRA adapter for the base.
        plan: The pruned model's plan.
        pruned_model: What the result names as its base.
        output: Folder to write; replaced.

    Raises:
        LoRAMError: The adapter is not one for the plan's base.
    """
    settings = read_adapter_config(adapter)
    checkpoint = Checkpoint(adapter, ADAPTER_FILE)
    moved = match(checkpoint, plan, full_size=True)
    check_modules(checkpoint, settings, plan)
    with new_folder(output, overwrite=True) as scratch:
        _write_adapter(scratch, moved, Moved.gather, settings, Base(pruned_model))


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """An adapter's config, if recovery of such an adapter is exact.

    Raises:
        LoRAMError: No adapter, or one whose update is not BA on the adapted weights.
    """
    if not (adapter / ADAPTER_CONFIG).exists():
        raise LoRAMError(
            f"expected a PEFT adapter with {ADAPTER_CONFIG} in {adapter}, found none: give the "
            "folder that training wrote, such as output_dir/pruned or a checkpoint in it"
        )
    settings = read_json(adapter / ADAPTER_CONFIG)
    refusal = unrecoverable(settings)
    if refusal:
        raise LoRAMError(f"{adapter} cannot be recovered: {refusal}")
    return settings


def unrecoverable(settings: Mapping[str, Any]) -> str | None:
    """Why an adapter with this PEFT config cannot be recovered exactly; None if it can."""
    init = settings.get("init_lora_weights", True)
    if settings.get("peft_type", "LORA") != "LORA":
        return f"expected peft_type LORA, found {settings['peft_type']}, whose update is not BA"
    if settings.get("use_dora"):
        return (
            "DoRA rescales each row of W₀ + BA by its norm, which differs between pruned and "
            "original rows: train without peft_use_dora"
        )
    if init not in DEFAULT_INITS:
        return (
            f"init_lora_weights {init!r} changes the base weights when training starts, so BA "
            "alone is not the update: use the default"
        )
    if settings.get("layer_replication"):
        return "layer_replication makes layers that the base has not: train without it"
    if settings.get("bias", "none") != "none":
        return f"expected lora bias 'none', found {settings['bias']!r}: trained biases are not BA"
    return None


def _plan_folder(pruned_model: str) -> Path:
    return find_folder(pruned_model, patterns=[PLAN_FILE, RECORD_FILE])


def _write_adapter(
    folder: Path,
    moved: list[Moved],
    move: Callable[[Moved], np.ndarray],
    settings: Mapping[str, Any],
    base: Base,
) -> dict[str, str]:
    """Write weights and config; returns file → SHA-256."""
    described = [(m.stored.name, m.stored.dtype, m.shape) for m in moved]
    digest = write_safetensors(folder / ADAPTER_FILE, described, (move(m) for m in moved))
    named = {"base_model_name_or_path": base.id, "revision": base.revision}
    write_json(folder / ADAPTER_CONFIG, {**settings, **named})
    config = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes()).hexdigest()
    return {ADAPTER_FILE: digest, ADAPTER_CONFIG: config}


def model_card(base: Base, details: str = "") -> str:
    """A model card whose metadata names the base, for the hub and for people."""
    revision = f" at revision `{base.revision}`" if base.revision else ""
    named = {"base_model": base.id} if is_hub_id(base.id) else {}  # the hub refuses a folder here
    front = {**named, "library_name": "peft", "tags": ["axolotl", "lora", "loram"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# LoRA adapter for {base.id}",
            "",
            f"Runs on `{base.id}`{revision}, the original model, like any PEFT adapter. It was",
            "trained on a pruned version of that model and recovered to the original shapes with",
            "axolotl-loram (LoRAM, arXiv 2502.13533).",
            "",
            details,
        ]
    )
