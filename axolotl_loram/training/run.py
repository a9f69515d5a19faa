"""One training run: which models it is about, and what is settled before it starts."""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.lora_names import is_saved_whole
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.pairing import check_narrowed, check_pair, check_recorded_base
from axolotl_loram.architecture.plan import Base, PruningPlan
from axolotl_loram.architecture.record import RECORD_FILE, Kind, Record, losses_of, versions
from axolotl_loram.architecture.vocabulary import differ
from axolotl_loram.config import FillArgs
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.atomic import made_once
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.formats import Formats
from axolotl_loram.models.small_head import decide_formats
from axolotl_loram.pruning.cache import OWN_TEXT, own_text, prune_into_cache
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.fitted import Job
from axolotl_loram.recovery.recover import gather_adapter
from axolotl_loram.results.candidates import DEFAULT_OUTPUT, TRAINED_FOLDER
from axolotl_loram.text.axolotl_text import rl_of, token_rows
from axolotl_loram.training.checkpoints import choose_checkpoint, is_first_rank
from axolotl_loram.training.memory_log import predict_run
from axolotl_loram.training.serving import check_yaml
from axolotl_loram.training.sharding import (
    check_adapter_saves,
    check_offloading,
    settle_checkpointing,
)
from axolotl_loram.training.support import (
    check_preferences,
    check_upper_layers,
    switch_off_kernels,
    trains_masked,
)

LOG = logging.getLogger(__name__)
STARTS_ANEW = ("dpo", "ipo", "kto")
"""Trainers that Axolotl hands a new adapter's config, never an adapter."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        output: The user's output_dir, which will hold the recovered adapter.
        masked: Whether the update is confined to the weights that sparse pruning left.
        merges: Whether the result is wanted as a model too, with the masked update added.
        fill: Puts something else than zeros into the recovered adapter, on the rank that recovers.
        memory: What was predicted, and in the end measured.
        steps: How many are "done" and "planned".
        trained_shapes: Name → shape of what is trained (see `recovery.whole`).
    """

    base: Base
    pruned: Path
    plan: PruningPlan
    output: Path
    warm_start: str | None
    hub_model_id: str | None
    formats: Formats
    masked: bool = False
    merges: bool = False
    fill: Job | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    trained_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    anchor: dict[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> Path:
        """Folder of the adapter as trained, and of the checkpoints."""
        return self.output / TRAINED_FOLDER

    def follow(self, state: Any) -> None:
        """Keep what the trainer's state says of steps and losses, for the record."""
        self.steps.update(done=state.global_step, planned=state.max_steps)
        self.history[:] = losses_of(state.log_history)

    def write_record(self, folder: Path) -> None:
        """Write down in a folder under which plan its adapter is trained, and how far it is."""
        training = {
            "pruned_model": str(self.pruned),
            "warm_start": self.warm_start,
            "memory": self.memory,
            "versions": versions(),
            "steps": self.steps,
            "history": self.history,
            **({"anchor": self.anchor} if self.anchor else {}),
        }
        Record(
            Kind.TRAINED_ADAPTER, self.base, self.plan.digest, masked=self.masked, training=training
        ).save(folder, in_use=True)


def begin_training(cfg: Any) -> Run:
    """Find or make the pruned model, check that it fits, and change cfg to train on it.

    Raises:
        LoRAMError: The pruned model does not belong to base_model, or cannot be trained on.
    """
    section = LoRAMConfig.model_validate(dict(cfg.loram))
    check_adapter_saves(cfg)
    check_offloading(cfg)
    settle_checkpointing(cfg)
    if cfg.rl in STARTS_ANEW and cfg.lora_model_dir:
        raise LoRAMError(
            f"expected no lora_model_dir with rl: {rl_of(cfg)}, found {cfg.lora_model_dir}: "
            "Axolotl 0.19 passes over it there, and would train a new adapter; merge it into the "
            "base first, and prune that"
        )
    model, revision = str(cfg.base_model), cfg.revision_of_model
    if section.serve_with:
        check_yaml(cfg, section, load_config(model, revision))
    if section.pruned_model_path:
        pruned = find_folder(section.pruned_model_path, section.pruned_model_revision)
        formats = decide_formats(section, cfg, pruned)
    else:
        assert section.pruning is not None  # the schema saw to it
        formats = decide_formats(section, cfg, None)
        check_preferences(cfg, section.pruning.whole_layers)
        rows = functools.partial(token_rows, cfg, section.pruning.seed)
        pruned = prune_into_cache(model, revision, section.pruning, section.cache_dir, rows)
    plan = PruningPlan.load(pruned)
    check_pair(pruned, plan, model, revision)
    check_preferences(cfg, bool(plan.removed))
    if plan.removed:
        check_upper_layers(cfg, section, plan)
    masked = trains_masked(section, plan)
    _check_modules_to_save(cfg, plan)
    run = Run(
        Base(model, revision),
        pruned.resolve(),
        plan,
        Path(cfg.output_dir),
        cfg.lora_model_dir,
        cfg.hub_model_id,
        formats,
        masked,
        merges=section.recovery == "masked",
        fill=_filling(section, cfg, pruned, plan),
        memory={"predicted": predict_run(cfg, plan, formats), "measured": {}},
    )
    _check_same_plan(run)
    if run.pruned in (run.output.resolve(), run.trained.resolve()):
        raise LoRAMError(
            "expected output_dir to be another folder than the pruned model's, found "
            f"{run.output}: the adapter would be written into the model"
        )
    choose_checkpoint(cfg, run.trained, "plan", plan.digest)
    if run.masked:
        switch_off_kernels(cfg)
    if run.warm_start:
        cfg.lora_model_dir = str(gather_warm_start(run, run.warm_start))
    # A folder needs no revision: cfg keeps the base's, which the tokenizer is loaded at.
    cfg.base_model = cfg.base_model_config = str(run.pruned)
    cfg.output_dir = str(run.trained)
    cfg.hub_model_id = None  # the trainer would upload the adapter as trained
    return run


def _filling(section: LoRAMConfig, cfg: Any, pruned: Path, plan: PruningPlan) -> Job | None:
    """What will fill the recovered adapter, with all that it reads; cfg is still the base's."""
    if section.fill == "zeros":
        return None
    check_narrowed(pruned, plan, "to fill from")
    if not is_first_rank():
        return None
    length = min(512, int(cfg.sequence_len or 512))
    settings = FillArgs(fill=section.fill, calibration_path=OWN_TEXT, calibration_length=length)
    base = find_folder(str(cfg.base_model), cfg.revision_of_model)
    Checkpoint(base)  # its weights are needed when training has ended: better said now
    rows = functools.partial(token_rows, cfg, settings.seed)
    calibration = own_text(settings, base, rows, shrink=True)
    work = Path(cfg.output_dir, "fitting")
    return Job(settings, plan, base, pruned.resolve(), work, calibration=calibration)


def gather_warm_start(run: Run, adapter: str) -> Path:
    """The full-size adapter cut to the pruned model, by whichever rank comes first."""
    folder = find_folder(adapter, patterns=["adapter_*", RECORD_FILE])
    start = Adapter.open(folder)
    made_for = start.record.base.fingerprint if start.record.base else None
    if differ(made_for, run.plan.base.fingerprint):
        raise LoRAMError(
            f"expected a warm start for {run.plan.base.id}, found {adapter}, recovered for another "
            "model of the same size: give an adapter of this base as lora_model_dir"
        )
    return made_once(
        run.trained / "warm-start",
        [start.weights.fingerprint(), start.settings, run.plan.digest],
        lambda output: gather_adapter(start, run.plan, str(run.pruned), output),
    )


def use_recovered_adapter(cfg: Any) -> None:
    """Outside training, let lora_model_dir be the recovered adapter in output_dir.

    A lora_model_dir that the user gives stays, unless it is the one that the run in output_dir
    started from: then the result of the run is meant.

    Raises:
        LoRAMError: output_dir holds no recovered adapter, or lora_model_dir an unrecovered one.
    """
    output = Path(str(cfg.output_dir or DEFAULT_OUTPUT))
    recovered = Record.load(output)
    started_from = (recovered.trained or {}).get("warm_start")
    if cfg.lora_model_dir and cfg.lora_model_dir != started_from:
        record = Record.load(Path(cfg.lora_model_dir))
        record.refuse_unrecovered(Path(cfg.lora_model_dir))
        check_recorded_base(record, str(cfg.base_model), cfg.revision_of_model)
        return
    if recovered.kind != Kind.RECOVERED_ADAPTER:
        raise LoRAMError(
            f"expected a recovered adapter in output_dir, found none in {output}: run `axolotl "
            f"train` first, or `axolotl-loram recover {output / TRAINED_FOLDER}/checkpoint-N` and "
            "pass --lora-model-dir"
        )
    check_recorded_base(recovered, str(cfg.base_model), cfg.revision_of_model)
    LOG.info("using the recovered adapter in %s", output)
    cfg.lora_model_dir = str(output)


def _check_modules_to_save(cfg: Any, plan: PruningPlan) -> None:
    """Refuse to train in whole a module that has lost features: BA is not all of its update."""
    for tensor in parameters(plan.config):
        around = list(itertools.accumulate(tensor.module.split("."), "{}.{}".format))
        for name in cfg.lora_modules_to_save or ():
            if tensor.kinds and any(is_saved_whole(module, [name]) for module in around):
                raise LoRAMError(
                    "expected lora_modules_to_save to name modules that pruning leaves whole, "
                    f"found {name}, which takes {tensor.module} too: adapt it by LoRA instead"
                )


def _check_same_plan(run: Run) -> None:
    """Refuse an output_dir whose checkpoints were trained on another pruned model."""
    recorded = Record.load(run.trained).plan
    if recorded not in (None, run.plan.digest):
        raise LoRAMError(
            f"expected output_dir to be new or of a run on this pruned model, found {run.trained} "
            f"trained under plan {recorded[:19]}…, not {run.plan.digest[:19]}…: choose another "
            "output_dir or remove it"
        )
