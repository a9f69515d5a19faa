"""Making a pruned checkpoint: score, choose, refit, round, and gather each tensor by the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_loram import __version__
from axolotl_loram.architecture.config_json import (
    Config,
    family_of,
    is_tied,
    layer_count,
    layer_fields,
    load_config,
    sizes_of,
)
from axolotl_loram.architecture.counts import plan_of_size, sparse_layers, sparse_summary, summary
from axolotl_loram.architecture.model import changed
from axolotl_loram.architecture.pairing import check_tensors, fingerprint_of, weights_fingerprint
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.record import Kind, Record, versions
from axolotl_loram.architecture.ties import by_weights, untied
from axolotl_loram.architecture.vocabulary import vocabulary_digest
from axolotl_loram.config import GPTQ, UNCALIBRATED, Pruning, PruningArgs
from axolotl_loram.criteria import CRITERIA
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import check_vacant, write_json
from axolotl_loram.files.find import TOKENIZER_PATTERNS, commit_of, find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.quantized import check_format, check_weights, without_format
from axolotl_loram.files.resumable import Work, check_free, resumable
from axolotl_loram.files.tensors import Checkpoint, StoredTensor
from axolotl_loram.files.untrusted import copy_files, read_json
from axolotl_loram.models.packing import Packing, plan_packing
from axolotl_loram.pruning.evidence import Evidence
from axolotl_loram.pruning.gather import needed_bytes, write_weights
from axolotl_loram.pruning.importance import choose
from axolotl_loram.pruning.sparse import load_sparse

if TYPE_CHECKING:
    from axolotl_loram.models.stream import LayerStream
    from axolotl_loram.models.walk import Walk
    from axolotl_loram.text.calibration import Calibration


@dataclass(frozen=True)
class Outcome:
    """What was decided.

    Attributes:
        replaced: Weights of the pruned shapes that are not just gathered.
        refit: Held-out errors of each refitted projection.
        zeros: Of a sparse model, what `sparse_summary` counts.
        rounding: Held-out errors of each weight that was rounded to 4 bits.
    """

    plan: PruningPlan
    replaced: Mapping[str, StoredTensor] = field(default_factory=dict)
    refit: Mapping[str, Any] = field(default_factory=dict)
    zeros: Mapping[str, Any] = field(default_factory=dict)
    rounding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One pruning: all that decides its result, and how to show its progress.

    Attributes:
        sketch: A plan as large as the one to come (the one to come, if index files give it).
    """

    checkpoint: Checkpoint
    sketch: PruningPlan
    settings: Pruning
    calibration: Calibration | None
    packing: Packing | None = None
    progress: Progress = no_progress

    @property
    def config(self) -> Config:
        """The base's config."""
        return self.sketch.config

    @property
    def identity(self) -> dict[str, Any]:
        """What an interrupted job must agree in to be gone on with."""
        return {
            "version": __version__,
            "base": asdict(self.sketch.base),
            "pruning": self.settings.model_dump(exclude={"device"}),
            "calibration": self.calibration and self.calibration.record(),
            "device": self.calibration and self.device,  # decides the precision of hidden states
        }

    @property
    def device(self) -> str:
        """Where calibration runs."""
        from axolotl_loram.models.device import choose_device

        return choose_device(self.settings.device)

    def stream(self, four_bit: bool = False) -> LayerStream:
        """The base's layers, on the device."""
        from axolotl_loram.models.stream import LayerStream

        return LayerStream(self.checkpoint, self.config, self.device, four_bit)

    def walk(self, work: Work, stage: str, stop: int) -> Walk:
        """The calibration text through the base's first `stop` layers."""
        from axolotl_loram.models.walk import Walk

        assert self.calibration is not None  # `_calibrate` saw to it
        return Walk(self.stream(), work, self.calibration.tokens, stage, stop, self.progress)

    def evidence(self, work: Work, layers: list[int]) -> Evidence:
        """What criteria look at."""
        return Evidence(
            self.checkpoint,
            self.config,
            layers,
            work,
            self.settings.seed,
            self.calibration.tokens if self.calibration else None,
            lambda: self.stream(self.settings.load_in_4bit and not self.settings.sparsity),
            self.progress,
            frozenset(kind for count in self.sketch.counts.values() for kind in count),
        )


def prune(
    model: str,
    output: Path,
    settings: PruningArgs,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Write a pruned checkpoint: a Hugging Face folder, its plan and its record; returns that.

    Interrupted, it leaves what it has done beside `output`, and goes on from there when it is
    called again with the same arguments.

    Args:
        model: Folder or hub id of the base model, in safetensors.
        output: Folder to write.
        settings: How to prune; what they leave open is settled here (`PruningArgs.resolve`).
        revision: Revision on the hub.
        overwrite: Replace what `output` holds.
        progress: Shows how far it is.
        calibration: Calibration text, by default what `settings` names.

    Raises:
        LoRAMError: Anything is wrong with the input; nothing is left at `output` then.
    """
    check_vacant(output, overwrite)
    config = load_config(model, revision)
    check_format(config, model)
    resolved = resolve(settings, config, own_text=calibration is not None)
    folder = find_folder(model, revision)
    checkpoint = Checkpoint(folder)
    check_weights(config, checkpoint.tensors, str(folder))
    config = by_weights(without_format(config), checkpoint)
    check_tensors(config, {n: t.shape for n, t in checkpoint.tensors.items()}, where=str(folder))
    name = str(folder.resolve()) if Path(model).exists() else model
    base = Base(name, commit_of(folder, revision), fingerprint_of(folder))
    sketch = plan_of_size(config, base, resolved)
    check_scorable(sketch, resolved)
    packing = _plan_packing(resolved, checkpoint, sketch)
    calibration = calibration or _calibrate(resolved, folder)
    job = Job(checkpoint, sketch, resolved, calibration, packing, progress)
    check_room(job, output)
    with resumable(output, job.identity, overwrite) as work:
        outcome = decide(job, work)
        plan, replaced = outcome.plan, outcome.replaced
        files = write_weights(checkpoint, plan, work.result, progress, replaced, packing)
        return _write_rest(folder, job, outcome, work.result, files)


def resolve(settings: PruningArgs, config: Config, own_text: bool = False) -> Pruning:
    """`PruningArgs.resolve` for the model with this config."""
    return settings.resolve(own_text, layer_fields(config, None).get("max_position_embeddings"))


def _plan_packing(settings: Pruning, checkpoint: Checkpoint, sketch: PruningPlan) -> Packing | None:
    if settings.quantize is None:
        return None
    config = _pruned_config(checkpoint.folder, sketch)
    from axolotl_loram.models.device import choose_device

    block, device = settings.quantize_block_size, choose_device(settings.device)
    return plan_packing(config, checkpoint.tensors, block, device)


def _pruned_config(base: Path, plan: PruningPlan) -> dict[str, Any]:
    """The base's own config.json with what the plan changes."""
    raw = without_format(read_json(base / "config.json"))
    if is_tied(raw) and not is_tied(plan.config):
        raw = untied(raw)
    return changed(raw, plan.changes)


def _calibrate(settings: Pruning, folder: Path) -> Calibration | None:
    if not settings.needs_calibration:
        return None
    if settings.calibration_path is None:
        why = "refit" if settings.refit else f"quantize {GPTQ}"
        why = f"method {settings.method}" if CRITERIA[settings.method].calibrated else why
        raise LoRAMError(
            f"expected calibration text for {why}, found none: give --calibration FILE (.txt, "
            ".jsonl, an Axolotl YAML) or a data set on the hub"
        )
    from axolotl_loram.text.calibration import load_calibration

    return load_calibration(settings, folder)


def check_prunable(model: str, config: Config, settings: Pruning) -> None:
    """Refuse what the config shows cannot be pruned so, before any text is read.

    Raises:
        LoRAMError: Its format is not read here, the settings do not suit it, or the criterion does
            not know what it is to score.
    """
    check_format(config, model)
    check_scorable(plan_of_size(without_format(config), Base(model), settings), settings)


def check_scorable(sketch: PruningPlan, settings: Pruning) -> None:
    """Refuse a criterion that needs text of a model that reads none, or cannot look into stacks."""
    family, method = family_of(sketch.config), settings.method
    if settings.needs_calibration and family.auto_class == "AutoModelForImageClassification":
        raise LoRAMError(
            f"expected method {' or '.join(UNCALIBRATED)} without refit or {GPTQ} for "
            f"{family.model_type}, "
            f"found {method}: calibration text goes through language models only"
        )
    kinds = {kind for count in sketch.counts.values() for kind in count}
    if "expert_neurons" in kinds and not CRITERIA[method].inside:
        able = [
            name for name, criterion in CRITERIA.items() if criterion.units and criterion.inside
        ]
        raise LoRAMError(
            f"expected method {' or '.join(able)} for expert_neurons, found {method}, which knows "
            "no gradient of each of them"
        )


def check_room(job: Job, output: Path) -> None:
    """Refuse to start without the disk space for the result and the work before it."""
    needed = needed_bytes(job.checkpoint, job.sketch, job.packing)
    if job.settings.sparsity or job.settings.refit or job.settings.quantize == GPTQ:
        needed += needed_bytes(job.checkpoint, job.sketch)
    if job.calibration is not None:
        states = job.calibration.tokens.size * sizes_of(job.config)["hidden"] * 4
        all_kept = CRITERIA[job.settings.method].keeps_states
        needed += states * (layer_count(job.config) + 2 if all_kept else 2)
    check_free(output, job.identity, needed, "make room or choose another disk")


def decide(job: Job, work: Work) -> Outcome:
    """Choose what to keep, and refit and round it if that is asked for."""
    if job.settings.sparsity is not None:
        return _make_sparse(job, work, job.settings.sparsity)
    known = job.settings.indices_path or job.settings.whole_layers
    outcome = Outcome(job.sketch if known else choose_units(job, work))
    if job.settings.refit and outcome.plan.kept:
        from axolotl_loram.pruning.refit import refit

        walk = job.walk(work, "refit", max(outcome.plan.counts) + 1)
        outcome = Outcome(outcome.plan, *refit(walk, outcome.plan))
    if job.settings.quantize != GPTQ:
        return outcome
    from axolotl_loram.pruning.rounding import fit_rounding

    assert job.packing is not None  # as quantize is set
    walk = job.walk(work, "rounding", layer_count(job.config))
    replaced, rounding = fit_rounding(walk, outcome.plan, outcome.replaced, job.packing)
    return replace(outcome, replaced=replaced, rounding=rounding)


def choose_units(job: Job, work: Work) -> PruningPlan:
    """Score the units and keep the best, of each layer or of all."""
    settings, family, counts = job.settings, family_of(job.config), job.sketch.counts
    kept: dict[str, np.ndarray] = {}
    if not counts:
        return job.sketch
    criterion, evidence = CRITERIA[settings.method], job.evidence(work, list(counts))
    criterion.score(evidence)
    scores = {layer: evidence.load(layer) for layer in counts}
    so_far = PruningPlan(job.config, {}, job.sketch.base)
    for group in family.groups:
        having = [layer for layer, count in counts.items() if group.kind in count]
        own = {layer: scores[layer][group.kind] for layer in having}
        if group.inside:  # of the experts that are kept
            own = {layer: rows[so_far.kept_experts(layer)] for layer, rows in own.items()}
        chosen = choose(
            own,
            {layer: counts[layer][group.kind] for layer in having},
            settings.allocation == "global",
            criterion.comparable,
            {layer: group.fewest(evidence.sizes(layer)) for layer in having},
        )
        kept |= {family.entry(layer, group): units for layer, units in chosen.items()}
        so_far = replace(so_far, kept=dict(kept))
    return so_far


def _make_sparse(job: Job, work: Work, sparsity: float | str) -> Outcome:
    layers = sparse_layers(job.config, sparsity, *job.settings.protected)
    CRITERIA[job.settings.method].zero(job.evidence(work, layers), sparsity)
    made = list(load_sparse(work, layers))
    masks = {name: facts["mask"] for name, _, facts in made}
    counted = {name: facts["nonzero"] for name, _, facts in made}
    return Outcome(
        PruningPlan(job.config, {}, job.sketch.base, masks),
        {name: tensor for name, tensor, _ in made},
        zeros=sparse_summary(job.config, counted),
    )


def _write_rest(
    base_folder: Path, job: Job, outcome: Outcome, folder: Path, files: dict[str, str]
) -> dict[str, Any]:
    """Write config, tokenizer, plan and record beside the weights."""
    plan, calibration = outcome.plan, job.calibration
    config = _pruned_config(base_folder, plan)
    config.pop("auto_map", None)  # names code of the base's repository, which is not copied
    quantized = {"quantization_config": job.packing.settings} if job.packing else {}
    write_json(folder / "config.json", {**config, **quantized})
    copy_files(base_folder, folder, (*TOKENIZER_PATTERNS, "generation_config.json"))
    plan.save(folder)
    for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in files:  # the weights' are known, and large
            files[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    written = Checkpoint(folder)
    record = Record(
        Kind.PRUNED_MODEL,
        plan.base,
        plan.digest,
        pruning=job.settings.model_dump(),
        calibration=calibration.record() if calibration else None,
        refit=dict(outcome.refit) or None,
        rounding=dict(outcome.rounding) or None,
        alignments=[],
        parameters={**summary(plan.config, plan.counts), **outcome.zeros},
        weight_bytes=written.nbytes,
        fingerprint=weights_fingerprint(written),
        vocabulary=vocabulary_digest(folder),
        versions=versions(),
        files=dict(sorted(files.items())),
    )
    record.save(folder)
    return record.as_json()
