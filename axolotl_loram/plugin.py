"""The Axolotl plugin: substitutes the pruned model for training, and recovers the adapter after.

The order of Axolotl's hooks decides where things happen (axolotl 0.19):

* `register` sees every command's YAML, but cannot tell `train` from `evaluate`: it refuses what
  cannot work, and prepares `merge-lora`, which leaves a mark.
* `load_datasets(preprocess=False)` is called by `train` alone, on each rank, before the model:
  there the pruned model takes the base's place. The tokenizer stays the base's, so that
  `preprocess` and `train` agree on the prepared data set.
* `post_model_build` sees the model as loaded: there it is held against its config. Embedding and
  lm_head are put into fewer bits as soon as Axolotl has settled the vocabulary's size.
* `post_trainer_create` sees the model with its LoRA, which preference trainers add themselves,
  before the first step: there a sparse model's update is confined, and the lm_head frozen in the
  align stage. After it, callbacks that need the trainer are asked for.
* `post_train_unload` comes after the trainer has saved everything, with the process group gone:
  there global rank 0 recovers the adapter from the files, or makes the aligned checkpoint of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.telemetry.manager import FIELDS_TO_REDACT
from transformers import TrainerCallback

import axolotl_loram.models.per_layer  # noqa: F401  (teaches transformers the pruned model's layers)
from axolotl_loram.architecture.config_json import family_of, is_tied, load_config
from axolotl_loram.architecture.counts import summary
from axolotl_loram.architecture.lora_names import ORIGINAL, split_name
from axolotl_loram.architecture.model import embedding_module
from axolotl_loram.config import ADAPTERS
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.models import patches
from axolotl_loram.models.masked import confine
from axolotl_loram.models.per_layer import check_widths
from axolotl_loram.models.small_head import prepare_packed, store_small_once_sized
from axolotl_loram.models.untie import untie_adapted
from axolotl_loram.recovery.merge import merge_masked
from axolotl_loram.recovery.plain_base import plain_base
from axolotl_loram.recovery.recover import Filler, recover
from axolotl_loram.recovery.servable import verdicts
from axolotl_loram.recovery.servers import Subject
from axolotl_loram.recovery.whole import check_complete, trained_shapes
from axolotl_loram.results.publish import publish_adapter
from axolotl_loram.results.secrets import without_secrets
from axolotl_loram.text.axolotl_text import training_data
from axolotl_loram.training.align import (
    Alignment,
    begin_alignment,
    check_one_step,
    finish_alignment,
)
from axolotl_loram.training.align_trainer import prepare_objective, prepare_trainer
from axolotl_loram.training.anchor import prepare_anchor
from axolotl_loram.training.checkpoints import NodeCallback, is_first_rank
from axolotl_loram.training.labels import check_learnt, warn_of_masked_labels
from axolotl_loram.training.memory_log import correct_prediction, measure_run, start_measuring
from axolotl_loram.training.monitor import RecoveredEvaluation, check_can_evaluate
from axolotl_loram.training.recoverable import check_recoverable
from axolotl_loram.training.run import Run, begin_training, use_recovered_adapter
from axolotl_loram.training.serving import check_adapter_to_be
from axolotl_loram.training.sharding import check_offloads
from axolotl_loram.training.support import aligns, check_router_losses, check_supported

LOG = logging.getLogger(__name__)
MERGED_FOLDER = "merged"
PLAIN_FOLDER = "merged-base"
MERGED_BY_SHARDS = ("lora_A.weight", "lora_B.weight", "weight", ORIGINAL)
NOT_ANCHORED = (
    "trained on the pruned model's own loss: with the original at hand, `pruning: {units: layers}` "
    "and `anchor: base` in loram: kept 0.94 of LoRA's gain in log perplexity instead of 0.67 at "
    "the bytes of ratio 0.5 on SmolLM2 and GSM8K, 0.93 instead of 0.83 elsewhere (docs/anchored.md)"
)


class LoRAMPlugin(BasePlugin):
    """`plugins: [axolotl_loram.LoRAMPlugin]`: train small, infer large."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self.alignment: Alignment | None = None

    def get_input_args(self) -> str:
        """The schema of the `loram:` section."""
        return "axolotl_loram.config_loram.LoRAMArgs"

    def register(self, cfg: Any) -> None:
        """Refuse what cannot work, and keep merge-lora from quantizing the original weights."""
        _log_as_axolotl_does()
        patches.keep_errors_from_telemetry(FIELDS_TO_REDACT)
        check_supported(cfg)
        patches.load_fp8()
        if aligns(cfg):
            return
        cfg.adapter = ADAPTERS[cfg.adapter]
        if cfg.merge_lora:
            use_recovered_adapter(cfg)
            _merge_all_of_it(cfg)
            _patch_merge(cfg)
            cfg.adapter, cfg.load_in_4bit, cfg.load_in_8bit = "lora", False, False

    def on_config_validation_error(self, cfg: Any) -> None:
        """Leave Axolotl as it was before `register`: another configuration may follow."""
        patches.undo()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Put the pruned model in the base's place: of all commands, only `train` comes here."""
        if preprocess:
            return None
        if not aligns(cfg):
            check_can_evaluate(cfg)
            self.run = begin_training(cfg)
            return None
        self.alignment = begin_alignment(cfg)
        data = training_data(cfg)
        if is_first_rank():
            check_one_step(cfg, data.train_dataset)
        return data

    def pre_model_load(self, cfg: Any) -> None:
        """Outside training, give the original base its recovered adapter."""
        if self.run is None and not aligns(cfg) and not cfg.merge_lora:  # `register` did
            use_recovered_adapter(cfg)

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Before merge-lora merges: what is tied, and adapted apart, becomes two."""
        if cfg.merge_lora:
            untie_adapted(model)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Make sure that the model about to be trained is the pruned one."""
        if self.alignment is not None:
            check_widths(model)
        if self.run is not None:
            from axolotl.monkeypatch import lora_kernels

            check_widths(model)
            check_router_losses(model.config, self.run.plan)
            patches.plain_projections(model, lora_kernels)
            prepare_packed(model, self.run.pruned, cfg.torch_dtype)
            store_small_once_sized(model, self.run.formats)
            counted = summary(self.run.plan.config, self.run.plan.counts)
            LOG.info(
                "training on the pruned model in %s: %s of %s parameters",
                self.run.pruned,
                f"{counted['pruned_parameters']:,}",
                f"{counted['base_parameters']:,}",
            )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Hold what will be trained against recovery; prepare masks, the loss, an alignment."""
        if self.alignment is not None:
            prepare_trainer(self.alignment, cfg, trainer)
            prepare_objective(self.alignment, trainer)
        if self.run is None:
            return
        self.run.trained_shapes.update(trained_shapes(trainer.model))
        adapter = check_recoverable(self.run, trainer.model)
        section = LoRAMConfig.model_validate(dict(cfg.loram))
        check_adapter_to_be(adapter, section, self.run.plan.config)
        if cfg.layer_offloading:
            check_offloads(trainer)
        warn_of_masked_labels(trainer)
        correct_prediction(self.run.memory["predicted"], trainer.model, cfg)
        if self.run.masked:
            confine_update(self.run, trainer.model)
        if section.anchor == "base":
            found = prepare_anchor(self.run, section.anchor_path, section.cache_dir, trainer)
            self.run.anchor.update(found)
        else:
            LOG.info(NOT_ANCHORED)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """Record the plan with each checkpoint, and never train the original by accident."""
        if self.alignment is not None:
            return [NodeCallback()]  # `prepare_trainer` adds another, which needs the trainer
        return [LoRAMCallback(lambda: self.run), NodeCallback()]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Evaluate the recovered adapter during training, where the YAML wants that."""
        section = LoRAMConfig.model_validate(dict(cfg.loram))
        if self.run is None or not section.evaluate_recovered_every:
            return []
        return [RecoveredEvaluation(trainer, self.run, section)]

    def post_train_unload(self, cfg: Any) -> None:
        """Recover the adapter, or make the aligned checkpoint, in output_dir: one rank of all."""
        if self.alignment is not None and is_first_rank():
            finish_alignment(self.alignment)
        if self.run is None or not is_first_rank():
            return
        check_complete(self.run.trained, self.run.trained_shapes)
        check_learnt(self.run.history, Checkpoint(self.run.trained, ADAPTER_FILE).tensors)
        recover_after_training(self.run, _yaml_details(cfg))
        LOG.info("%s is the adapter for %s", self.run.output, self.run.base.id)
        if self.run.hub_model_id:
            sent = publish_adapter(self.run.output, self.run.hub_model_id)
            LOG.info("uploaded the adapter to %s", sent["url"])
        if self.run.merges:
            merge_after_training(self.run)


class LoRAMCallback(TrainerCallback):
    """Stops training that did not come through `axolotl train`; records the plan on save."""

    def __init__(self, current_run: Callable[[], Run | None]) -> None:
        self.current_run = current_run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train the original model; record the plan for an adapter saved on interrupt."""
        run = self.current_run()
        if run is None:
            raise LoRAMError(
                "expected training to be started by `axolotl train`, found another caller, for "
                "which base_model was not replaced by the pruned model, nor output_dir by the "
                "trainer's: use `axolotl train`"
            )
        run.memory["measured"] = start_measuring()
        if state.is_world_process_zero:
            _record(run, state, Path(args.output_dir))
            patches.before_exit_on_interrupt(lambda: _record(run, state, Path(args.output_dir)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to the record the losses, and what memory training took."""
        run = self.current_run()
        if run is not None and state.is_world_process_zero:
            run.memory["measured"] |= measure_run()
            _record(run, state, Path(args.output_dir))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the plan in the checkpoint that was just saved."""
        run, folder = self.current_run(), Path(args.output_dir, f"checkpoint-{state.global_step}")
        if run is not None and state.is_world_process_zero and folder.is_dir():
            _record(run, state, folder)


def _record(run: Run, state: Any, folder: Path) -> None:
    run.follow(state)
    run.write_record(folder)


def _log_as_axolotl_does() -> None:
    """Let this package's log lines appear where, and as, Axolotl's do."""
    ours, axolotl = logging.getLogger("axolotl_loram"), logging.getLogger("axolotl")
    ours.handlers, ours.level, ours.propagate = axolotl.handlers, axolotl.level, False


def _merge_all_of_it(cfg: Any) -> None:
    """Have PEFT merge what Axolotl's merging by shards (0.19) leaves out without a word."""
    if not Path(cfg.lora_model_dir, ADAPTER_FILE).is_file():
        return
    config = load_config(str(cfg.base_model), cfg.revision_of_model)
    tensors, family = Checkpoint(Path(cfg.lora_model_dir), ADAPTER_FILE).tensors, family_of(config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    (verdict,) = verdicts(Subject({}, shapes, config), ["merge-lora"])
    if not verdict.serves:
        raise LoRAMError(
            f"expected an adapter that can be merged, found {verdict.because[0]}, or use PEFT"
        )
    embeddings = (embedding_module(config), "lm_head") if is_tied(config) else ()
    renamed = ("lm_head",) if family.stored_name("lm_head.weight") != "lm_head.weight" else ()
    one_by_one = tuple(f".{weight.module}" for weight in family.layer if weight.each)
    left_out = [
        name
        for name, (module, part) in ((name, split_name(name)) for name in tensors)
        if part not in MERGED_BY_SHARDS
        or module in renamed
        or module in embeddings
        or module.partition(".base_layer")[0].endswith(one_by_one)
    ]
    if left_out:
        LOG.info("merging by `merge_method: legacy`: by shards, %s would be left out", left_out[0])
        cfg.merge_method = "legacy"


def recover_after_training(run: Run, card: str) -> None:
    """Recover the adapter into output_dir, with zeros first: they are there if a fit fails."""

    def once(fill: Filler | None = None) -> None:
        recover(
            run.trained,
            str(run.pruned),
            run.output,
            run.base,
            update=True,
            card=card,
            fill=fill,
            of_run=True,
        )

    once()
    if run.fill is not None:
        with progress_bar("recovery") as progress:
            once(replace(run.fill, progress=progress).fill)


def confine_update(run: Run, model: Any) -> None:
    """Confine every adapter of the model to the weights that pruning left.

    Raises:
        LoRAMError: The model has no LoRA on such weights.
    """
    adapters = getattr(model, "peft_config", {})  # a reference adapter may be beside
    count = sum(confine(model, run.plan, run.pruned, name) for name in adapters)
    if not count:
        raise LoRAMError(
            "expected LoRA on weights that pruning made sparse, found none: adapt linear layers "
            "(lora_target_linear: true), or train with `masked: false`"
        )
    LOG.info("confined the update of %d layers to the weights that pruning left", count)


def merge_after_training(run: Run) -> None:
    """Write the original with the masked update to output_dir/merged."""
    output = run.output / MERGED_FOLDER
    with progress_bar("merging") as progress:
        merge_masked(run.trained, str(run.pruned), output, run.base, True, progress, of_run=True)
    LOG.info("%s is %s with the masked update", output, run.base.id)


def _patch_merge(cfg: Any) -> None:
    """Have `axolotl merge-lora` merge into plain weights, and find the parts of towers."""
    from axolotl.cli import merge_lora
    from axolotl.cli.utils import lora_merge

    family = family_of(load_config(cfg.base_model, cfg.revision_of_model))
    names = {f"^{re.escape(theirs)}": name for name, theirs in family.stored if family.section}
    patches.merge_without_nf4(merge_lora)
    patches.find_language_tower(lora_merge, names)
    patches.merge_into(merge_lora, _base_to_merge_into)


@contextmanager
def _base_to_merge_into(cfg: Any) -> Iterator[str]:
    place = Path(cfg.output_dir) / PLAIN_FOLDER
    stored_in = str(cfg.torch_dtype) if cfg.merge_method == "legacy" else None
    with (
        progress_bar("dequantizing") as progress,
        plain_base(cfg.base_model, cfg.revision_of_model, place, progress, stored_in) as base,
    ):
        yield base


def _yaml_details(cfg: Any) -> str:
    """The YAML of the run, for the model card, without secrets."""
    file = Path(str(cfg.axolotl_config_path or ""))
    if not file.is_file():
        return ""
    text = without_secrets(file.read_text(encoding="utf-8"))
    return f"<details><summary>Axolotl config</summary>\n\n```yaml\n{text}\n```\n\n</details>\n"
