"""Which files belong together: base, pruned model, plan and adapter."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Container, Mapping
from pathlib import Path

from axolotl_loram.architecture.config_json import Config, family_of, load_config, places
from axolotl_loram.architecture.model import HEAD_WEIGHT, layer_pieces, parameter_count, stack_shape
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.record import RECORD_FILE, Record
from axolotl_loram.architecture.vocabulary import differ, vocabulary_digest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import (
    commit_of,
    find_folder,
    find_local_file,
    find_local_weights,
    hub_id_of,
)
from axolotl_loram.files.nf4 import logical_shapes
from axolotl_loram.files.quantized import format_of
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.files.untrusted import read_json

FINGERPRINT_SAMPLES = 256

LOG = logging.getLogger(__name__)


def shapes_of(config: Config, stored: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, as a config declares them.

    Args:
        config: A model's config.
        stored: Names of tensors; experts that are stored one by one as a rule are one tensor where
            the name of their stack is among them, as in checkpoints in 4 bits.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer in places(config):
        for name, pieces in layer_pieces(config, layer).items():
            if len(pieces) > 1 and name in stored:
                found[name] = stack_shape(pieces)
            else:
                found |= {piece.name: piece.shape for own in pieces for piece in own}
    return found


def check_tensors(config: Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse weights (name → shape) that are not those declared for `config`; `where` they are."""
    declared = shapes_of(config, shapes)
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
        if name not in declared and not is_derived(name, config) and not name.startswith(whole)
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


def is_derived(name: str, config: Config) -> bool:
    """Whether a stored tensor is recomputed, aliased or passed over on loading: it can go."""
    family = family_of(config)
    heads = (HEAD_WEIGHT, family.stored_name(HEAD_WEIGHT))
    ignored = any(re.search(expression, name) for expression in family.ignored)
    return name.endswith("rotary_emb.inv_freq") or name in heads or ignored


def check_pruned(folder: Path, plan: PruningPlan) -> None:
    """Refuse a pruned model whose plan, record, config, weights and tokenizer do not fit."""
    record, config = check_plan(folder, plan), plan.pruned_config
    check_tensors(config, shapes_of(load_config(str(folder))), f"{folder / 'config.json'}")
    stored = Checkpoint(folder)
    check_tensors(config, logical_shapes(stored.tensors), str(folder))
    check_fingerprint(stored, record)
    if differ(record.vocabulary, vocabulary_digest(folder)):
        raise LoRAMError(
            f"expected the tokenizer that {folder} was pruned with, found one with another "
            "vocabulary in it: put the base's tokenizer files there"
        )


def check_pair(pruned: Path, plan: PruningPlan, base: str, revision: str | None = None) -> None:
    """Refuse a pruned model that is not whole, or another base than it was pruned from."""
    check_pruned(pruned, plan)
    check_base(plan, base, revision)
    check_base_tokenizer(pruned, base, revision)


def check_narrowed(folder: Path, plan: PruningPlan, purpose: str) -> None:
    """Refuse a pruned model, sparse or in 4 bits, without the narrow weights that a purpose needs.

    The purpose is such as "to align".
    """
    if not plan.counts:
        raise LoRAMError(
            f"expected a model that lost whole units {purpose}, found {folder} with its layers as "
            "wide as they were: prune by a ratio, or leave this out"
        )
    if format_of(read_json(folder / "config.json")):
        raise LoRAMError(
            f"expected a pruned model in 16 or 32 bits {purpose}, found {folder} in 4 bits: give "
            "one that is pruned without quantize"
        )


def check_plan(folder: Path, plan: PruningPlan) -> Record:
    """Refuse a plan that is not the one that `loram.json` beside it records; returns that."""
    record = Record.load(folder)
    if record.plan in (None, plan.digest):
        return record
    left = parameter_count(plan.pruned_config)
    counted = (record.parameters or {}).get("pruned_parameters", left)
    if counted != left:
        raise LoRAMError(
            f"expected a plan that leaves {counted!r:.20} parameters, as {folder / RECORD_FILE} "
            f"records, found one that leaves {left}: it was made with another pruning ratio or "
            "other settings, for another checkpoint"
        )
    raise LoRAMError(
        f"expected the plan that {folder / RECORD_FILE} records ({str(record.plan)[:19]}…), found "
        f"{plan.digest[:19]}…: plan and checkpoint are from two prunings"
    )


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """What `loram.json` records of a pruned model's weights, in milliseconds.

    It samples so many tensors that some of every shard are among them.
    """
    return checkpoint.fingerprint(samples=FINGERPRINT_SAMPLES)


def check_fingerprint(checkpoint: Checkpoint, record: Record) -> None:
    """Refuse weights that are not the recorded ones, as far as samples, and the record, tell."""
    if record.fingerprint not in (None, weights_fingerprint(checkpoint)):
        raise LoRAMError(
            f"expected the weights that {RECORD_FILE} in {checkpoint.folder} records, found "
            "others: a shard is from another run, or was changed; `axolotl-loram inspect --verify` "
            "names the file"
        )


def fingerprint_of(folder: Path) -> str:
    """`Checkpoint.fingerprint` of a model's weights, computed once while its files stay."""
    files = sorted(folder.glob("*.safetensors*"))
    stats = [(file.name, file.stat()) for file in files]
    return _fingerprint(
        folder.resolve(), *((n, at.st_ino, at.st_mtime_ns, at.st_size) for n, at in stats)
    )


@functools.lru_cache(maxsize=8)
def _fingerprint(folder: Path, *files: object) -> str:
    return Checkpoint(folder).fingerprint()


def check_base(plan: PruningPlan, model: str, revision: str | None = None) -> None:
    """Refuse a base model that is not the one the plan was made for.

    Compares shapes by config, and contents by fingerprint where the base's weights are on this
    machine. Where they are not, training does not need them, and the hub's id and commit decide.
    """
    check_base_shapes(plan, model, revision)
    commit = _commit(model, revision)
    weights = find_local_weights(model, revision)
    if weights is not None:
        check_base_weights(plan.base, model, weights, commit)
    elif (model, commit) != (plan.base.id, plan.base.revision):
        LOG.warning(
            "the weights of %s%s are not on this machine: only its config was compared with %s%s, "
            "the base of the pruned model",
            model,
            _at(commit),
            plan.base.id,
            _at(plan.base.revision),
        )


def check_base_shapes(plan: PruningPlan, model: str, revision: str | None = None) -> None:
    """Refuse a base model whose config is of another size than the plan's base."""
    expected, found = shapes_of(plan.config), shapes_of(load_config(model, revision))
    for name in sorted(expected.keys() | found.keys()):
        tied = (
            is_derived(name, plan.config) and name not in found
        )  # by its config, and not by its weights
        if expected.get(name) != found.get(name) and not tied:
            raise LoRAMError(
                f"expected base_model to be {plan.base.id}, for which the pruned model was made, "
                f"found {model} of another size: {name} is {found.get(name)}, not "
                f"{expected.get(name)}"
            )


def check_base_weights(base: Base, model: str, weights: Path, commit: str | None = None) -> str:
    """Refuse weights that are not those of `base`; returns their fingerprint.

    Args:
        base: What was recorded.
        model: What the user calls the weights.
        weights: Their folder.
        commit: Their commit on the hub, where it is known.
    """
    fingerprint = fingerprint_of(weights)
    if base.fingerprint in (None, fingerprint):
        return fingerprint
    if hub_id_of(weights) == base.id and base.revision not in (None, commit):
        raise LoRAMError(
            f"expected {base.id} at revision {base.revision}, which was pruned, found other weights"
            f" at {commit}: set revision_of_model (or --revision) to {base.revision}"
        )
    raise LoRAMError(
        f"expected base_model to be {base.id} (fingerprint {str(base.fingerprint)[:19]}…), found "
        f"{model} of the same shape with {fingerprint[:19]}…: it is another model, such as a "
        "fine-tuned one, or a mixture of two, or the same one stored in another format"
    )


def check_recorded_base(record: Record, model: str, revision: str | None = None) -> None:
    """Refuse a base whose weights are here and are not those that an adapter's record names."""
    weights = find_local_weights(model, revision)
    if weights is not None and record.base is not None:
        check_base_weights(record.base, model, weights, commit_of(weights, revision))


def check_base_tokenizer(folder: Path, model: str, revision: str | None = None) -> None:
    """Refuse a base whose tokenizer, where it is on this machine, is not the pruned model's."""
    found = find_local_file(model, "config.json", revision)
    theirs = None if found is None else vocabulary_digest(found.parent)
    if differ(vocabulary_digest(folder), theirs):
        raise LoRAMError(
            f"expected the tokenizer of {model} to be the pruned model's in {folder}, found "
            "another vocabulary: the same text would be other tokens; put the tokenizer that both "
            "were made with into both"
        )


def check_adapter_tokenizer(adapter: Path, pruned: Path) -> None:
    """Refuse an adapter saved with another tokenizer than its pruned model, or its record, has."""
    theirs = vocabulary_digest(pruned) or Record.load(pruned).vocabulary
    if differ(vocabulary_digest(adapter), theirs):
        raise LoRAMError(
            f"expected an adapter trained with the tokenizer of {pruned}, found another vocabulary "
            f"in {adapter}: give the pruned model it was trained on; if the files there are not "
            "the training's, remove them"
        )


def _commit(model: str, revision: str | None) -> str | None:
    return commit_of(find_folder(model, revision, ["config.json"]), revision)


def _at(revision: str | None) -> str:
    return f" at revision {revision}" if revision else ""


def check_trained_under(record: Record, plan: PruningPlan, adapter: Path) -> None:
    """Refuse an adapter whose own record names another plan.

    Plans of one ratio give adapters of one shape, so shapes alone would let a wrong pair through.
    """
    if record.plan not in (None, plan.digest):
        raise LoRAMError(
            f"expected an adapter trained under plan {plan.digest[:19]}…, found {adapter} trained "
            f"under {str(record.plan)[:19]}…: give the pruned model it was trained on"
        )
