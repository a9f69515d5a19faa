"""The align stage: continual pre-training of a pruned model, all of its weights.

`base_model` names the pruned checkpoint. Axolotl's trainer works in output_dir/training; when it
ends, `assemble` makes the aligned checkpoint of what it saved, in output_dir.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.pairing import check_pruned, fingerprint_of
from axolotl_loram.architecture.plan import PLAN_FILE, PruningPlan
from axolotl_loram.architecture.record import Kind, Record
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder, stored_config
from axolotl_loram.files.quantized import format_of
from axolotl_loram.training.aligned import assemble, remove_weights
from axolotl_loram.training.checkpoints import choose_checkpoint, is_first_rank
from axolotl_loram.training.sharding import check_sharding

LOG = logging.getLogger(__name__)
TRAINING_FOLDER = "training"
NAMED = ("path", "name", "split", "data_files", "type", "field", "text_column", "revision", "skip")


@dataclass(frozen=True)
class Alignment:
    """One alignment run.

    Attributes:
        fingerprint: `Checkpoint.fingerprint` of the pruned model.
        outcome: What `loram.json` is to say about the alignment, added to as it becomes known.
    """

    model: str
    pruned: Path
    plan: PruningPlan
    output: Path
    section: LoRAMConfig
    fingerprint: str
    outcome: dict[str, Any] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)

    @property
    def trained(self) -> Path:
        """Folder of the trainer: its checkpoints, and in the end its weights."""
        return self.output / TRAINING_FOLDER

    def write_record(self, folder: Path, seconds: float) -> None:
        """Write down in a checkpoint of the trainer what it was trained from, and how long."""
        Record(
            Kind.ALIGNMENT,
            plan=self.plan.digest,
            fingerprint=self.fingerprint,
            pruned_model=self.model,
            seconds=seconds,
        ).save(folder, in_use=True)


def begin_alignment(cfg: Any) -> Alignment:
    """Check that base_model can be aligned as cfg says; let the trainer work in its own folder."""
    section = LoRAMConfig.model_validate(dict(cfg.loram))
    check_sharding(cfg)
    model, revision = str(cfg.base_model), cfg.revision_of_model
    plan = load_plan(model, revision)
    pruned = find_folder(model, revision).resolve()
    check_pruned(pruned, plan)
    fingerprint = fingerprint_of(pruned)
    run = Alignment(model, pruned, plan, Path(cfg.output_dir), section, fingerprint)
    _check_output(run)
    choose_checkpoint(cfg, run.trained, "fingerprint", fingerprint)
    if is_first_rank():
        remove_weights(run.trained)  # Axolotl takes those of an earlier end for its own
    cfg.base_model = cfg.base_model_config = str(pruned)
    cfg.output_dir = str(run.trained)
    named = cfg.pretraining_dataset or cfg.datasets or []
    data = [{"path": named}] if isinstance(named, str) else list(named)
    cfg.load_best_model_at_end = False  # by default true; the record is of the last step
    run.outcome.update(
        objective="next-token",
        data=[named_data(entry) for entry in data],
        learning_rate=float(cfg.learning_rate),
        lr_scheduler=str(getattr(cfg.lr_scheduler, "value", cfg.lr_scheduler or "cosine")),
        teacher=None,
    )
    return run


def load_plan(model: str, revision: str | None) -> PruningPlan:
    """The plan of the pruned model that base_model names; its weights are not fetched for that.

    Raises:
        LoRAMError: It is no pruned model, or one that cannot be aligned.
    """
    folder = find_folder(model, revision, ["config.json", "loram*"])
    if not (folder / PLAN_FILE).exists():
        raise LoRAMError(
            f"expected base_model to be a pruned checkpoint with `stage: align`, found {model} "
            f"without {PLAN_FILE}: name the folder that `axolotl-loram prune` wrote"
        )
    plan = PruningPlan.load(folder)
    plan.check_runs_alone(model, "its layers are the original's, there is nothing to align")
    if format_of(stored_config(str(folder))):
        raise LoRAMError(
            f"expected a pruned checkpoint in 16 or 32 bits with `stage: align`, found {model} in "
            "4 bits: align the one pruned without `quantize`, and quantize the result in training"
        )
    if plan.masks:
        raise LoRAMError(
            f"expected a pruned checkpoint that lost whole units with `stage: align`, found {model}"
            " with sparse weights: training all weights would fill its zeros"
        )
    return plan


def finish_alignment(run: Alignment) -> None:
    """Make the aligned checkpoint of what the trainer saved, in output_dir.

    Raises:
        LoRAMError: The trainer did no step, or saved no whole and finite model.
    """
    steps = run.outcome.get("steps", 0)
    if not steps:
        raise LoRAMError(
            f"expected at least one step of training, found none: the data in {run.outcome['data']}"
            " do not fill a step"
        )
    assemble(run.trained, run.pruned, run.output, run.outcome, run.frozen)
    losses = run.outcome["heldout_loss"]
    LOG.info(
        "%s is %s aligned by %d steps on %s tokens%s",
        run.output,
        run.model,
        steps,
        f"{run.outcome['tokens']:,}",
        f": held-out loss {losses['before']:.4f} → {losses['after']:.4f}" if losses else "",
    )


def _check_output(run: Alignment) -> None:
    if run.pruned in (run.output.resolve(), run.trained.resolve()):
        raise LoRAMError(
            f"expected output_dir to be another folder than base_model, found {run.output}: the "
            "pruned model would be overwritten while it is needed"
        )
    kind = Record.load(run.output).kind
    if kind not in (None, Kind.PRUNED_MODEL):
        raise LoRAMError(
            f"expected output_dir to be new or of an alignment, found {run.output} with a {kind}: "
            "choose another output_dir"
        )


def named_data(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a YAML says about one data set, as far as it identifies the text."""
    said = {key: entry.get(key) for key in NAMED if entry.get(key)}
    return json.loads(json.dumps(said, default=str))


def check_one_step(cfg: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse training data that does not fill a single step; no more than that is read."""
    needed = cfg.micro_batch_size * cfg.gradient_accumulation_steps * (cfg.world_size or 1)
    packed = cfg.sample_packing and not (cfg.streaming or cfg.pretraining_dataset)
    wanted = needed * cfg.sequence_len
    count = tokens = 0
    for row in rows if packed else islice(rows, needed):
        count, tokens = count + 1, tokens + len(row["input_ids"])
        if packed and tokens >= wanted:
            return
    if packed or count < needed:
        raise LoRAMError(
            f"expected data for at least one step of {needed} × {cfg.sequence_len} tokens, found "
            f"{tokens} tokens in {count} sequences: name more data, or make the batch smaller"
        )


def label_tokens(rows: Iterable[Mapping[str, Any]]) -> int:
    """Tokens that a loss over these rows looks at."""
    labels = (row.get("labels", row["input_ids"]) for row in rows)
    return sum(int(token) != -100 for row in labels for token in row)


def seconds_before(checkpoint: str | None) -> float:
    """Seconds that training took before it was interrupted."""
    return (Record.load(Path(checkpoint)).seconds or 0.0) if checkpoint else 0.0


def heldout_losses(log: Iterable[Mapping[str, Any]], steps: int) -> dict[str, float] | None:
    """From a trainer's log, held-out losses before the first step and after the last, or None."""
    losses = {row["step"]: float(row["eval_loss"]) for row in log if "eval_loss" in row}
    if 0 not in losses or steps not in losses or not steps:
        return None
    return {"before": losses[0], "after": losses[steps]}
