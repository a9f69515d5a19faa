"""Which files belong together: base, pruned model, plan and adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_loram.architecture import Config, family_of, tensors
from axolotl_loram.checkpoint import Checkpoint, read_json
from axolotl_loram.errors import LoRAMError
from axolotl_loram.plan import RECORD_FILE, SCHEMA_VERSION, PruningPlan
from axolotl_loram.prequantized import logical_shapes
from axolotl_loram.sources import commit_of, find_folder, find_local_weights, load_config

LOG = logging.getLogger(__name__)


def read_record(folder: Path) -> dict[str, Any]:
    """What `loram.json` in a folder says; empty where there is none.

    Raises:
        LoRAMError: It was written by a newer version.
    """
    file = folder / RECORD_FILE
    record = read_json(file) if file.exists() else {}
    version = record.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise LoRAMError(
            f"expected schema version {SCHEMA_VERSION} in {file}, found {version}: upgrade "
            "axolotl-loram"
        )
    return record


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, as a config declares them."""
    return {tensor.name: tensor.shape for tensor in tensors(config)}


def check_tensors(config: Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse weights that are not the ones the declaration lists for `config`.

    Args:
        config: A model's config.
        shapes: Stored tensor name → shape.
        where: What to call the weights in the message.

    Raises:
        LoRAMError: A tensor is missing, has another shape, or is not declared.
    """
    declared = shapes_of(config)
    for name, shape in declared.items():
        if shapes.get(name) != shape:
            found = f"{list(shapes[name])}" if name in shapes else "none"
            raise LoRAMError(
                f"expected {name} of shape {list(shape)} in {where}, found {found}: the weights "
                "do not belong to the config or plan"
            )
    whole = untouched_prefixes(config)
    extra = [
        name
        for name in shapes
        if name not in declared and not is_derived(name) and not name.startswith(whole)
    ]
    if extra:
        raise LoRAMError(
            f"expected only the weights of a plain {config['model_type']} model in {where}, found "
            f"{extra[0]} ({len(extra)} such): give an unquantized model without additions"
        )


def untouched_prefixes(config: Config) -> tuple[str, ...]:
    """What the stored names of weights begin with that are not declared and stay as they are.

    Those that are stored under another name than they run under, as in early checkpoints, too.
    """
    family = family_of(config)
    return tuple({form for prefix in family.whole for form in (prefix, family.stored_name(prefix))})


def is_derived(name: str) -> bool:
    """Whether a stored tensor is recomputed or aliased on loading, so that it need not be kept."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def check_pruned(folder: Path, plan: PruningPlan) -> None:
    """Refuse a pruned model whose plan, record, config and weights do not fit one another."""
    recorded = read_record(folder).get("plan")
    if recorded not in (None, plan.digest):
        raise LoRAMError(
            f"expected the plan that {folder / RECORD_FILE} records ({recorded[:19]}…), found "
            f"{plan.digest[:19]}…: plan and checkpoint are from two prunings"
        )
    config = plan.pruned_config
    check_tensors(config, shapes_of(load_config(str(folder))), f"{folder / 'config.json'}")
    check_tensors(config, logical_shapes(Checkpoint(folder).tensors), str(folder))


def check_base(plan: PruningPlan, model: str, revision: str | None = None) -> None:
    """Refuse a base model that is not the one the plan was made for.

    Compares shapes by config, and contents by fingerprint where the base's weights are on this
    machine. Where they are not, training does not need them, and the hub's id and commit decide.
    """
    expected, found = shapes_of(plan.config), shapes_of(load_config(model, revision))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise LoRAMError(
                f"expected base_model to be {plan.base.id}, for which the pruned model was made, "
                f"found {model}: {name} is {found.get(name)}, not {expected.get(name)}"
            )
    weights = find_local_weights(model, revision)
    if weights is not None:
        fingerprint = Checkpoint(weights).fingerprint()
        if fingerprint != plan.base.fingerprint:
            raise LoRAMError(
                f"expected base_model to be {plan.base.id} (fingerprint "
                f"{str(plan.base.fingerprint)[:19]}…), found {model} of the same shape with "
                f"{fingerprint[:19]}…: it is another model, such as a fine-tuned one"
            )
        return
    commit = commit_of(find_folder(model, revision, ["config.json"]), revision)
    if (model, commit) != (plan.base.id, plan.base.revision):
        LOG.warning(
            "the weights of %s are not on this machine: only its config was compared with %s, the "
            "base of the pruned model",
            model,
            plan.base.id,
        )


def check_trained_under(adapter: Path, plan: PruningPlan) -> None:
    """Refuse an adapter whose own record names another plan.

    Plans of one ratio give adapters of one shape, so shapes alone would let a wrong pair through.
    """
    trained_under = read_record(adapter).get("plan")
    if trained_under not in (None, plan.digest):
        raise LoRAMError(
            f"expected an adapter trained under plan {plan.digest[:19]}…, found {adapter} trained "
            f"under {str(trained_under)[:19]}…: give the pruned model it was trained on"
        )
