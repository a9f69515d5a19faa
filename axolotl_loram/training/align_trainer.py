"""The trainer of the align stage: what is frozen, what is counted, and what is measured."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from axolotl_loram.architecture.config_json import sizes_of
from axolotl_loram.architecture.record import versions
from axolotl_loram.errors import LoRAMError
from axolotl_loram.training.align import Alignment, heldout_losses, label_tokens, seconds_before
from axolotl_loram.training.memory_log import measure_run, start_measuring

LOG = logging.getLogger(__name__)


def prepare_trainer(run: Alignment, cfg: Any, trainer: Any) -> None:
    """Freeze what stays the base's, count tokens, and measure the loss before and after.

    Raises:
        LoRAMError: The tokenizer made the vocabulary another than the plan's.
    """
    _check_vocabulary(run, trainer.model)
    _freeze_head(run, trainer.model)
    _count_tokens(trainer)
    if trainer.eval_dataset is None:
        LOG.warning(
            "no loss is measured on held-out data: name some as val_set_size or test_datasets"
        )
    trainer.add_callback(
        AlignmentCallback(run, trainer, seconds_before(cfg.resume_from_checkpoint))
    )


def _check_vocabulary(run: Alignment, model: Any) -> None:
    """Axolotl resizes the vocabulary to a tokenizer that has more tokens."""
    weight = model.get_input_embeddings().weight
    found = getattr(weight, "ds_shape", weight.shape)[0]
    expected = sizes_of(run.plan.config)["vocabulary"]
    if found != expected:
        raise LoRAMError(
            f"expected the vocabulary of the pruned model ({expected} tokens), found {found} after "
            "Axolotl resized it: use only special_tokens and tokens that the tokenizer has"
        )


def _freeze_head(run: Alignment, model: Any) -> None:
    """Freeze the lm_head, as the paper does; it is the embedding too where they are tied."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    if not run.section.train_lm_head:
        head.requires_grad_(False)
        if head is embedding:
            LOG.info("the embedding is not trained: it is the lm_head, which stays as it is")
    run.outcome["trained"] = {"lm_head": head.requires_grad, "embedding": embedding.requires_grad}
    run.frozen.extend(n for n, weight in model.named_parameters() if not weight.requires_grad)


def _count_tokens(trainer: Any) -> None:
    """Let the trainer count the tokens of all ranks, without padding, in its state.

    A checkpoint holds that state, so that no token counts twice. Under sample packing Axolotl's
    attention masks number the samples in a row, which the trainer would add up.
    """
    trainer.args.include_num_input_tokens_seen = "non_padding"
    count = trainer._track_num_input_tokens

    def count_ones(inputs: Any) -> None:
        mask = inputs.get("attention_mask")
        count(inputs if mask is None else {**inputs, "attention_mask": mask != 0})

    trainer._track_num_input_tokens = count_ones


class AlignmentCallback(TrainerCallback):
    """Evaluates before the first step and after the last; notes what was done."""

    def __init__(self, run: Alignment, trainer: Any, seconds: float) -> None:
        self.run, self.trainer, self.before = run, trainer, seconds
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption too."""
        return self.before + time.monotonic() - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the loss on the held-out data measured, unless training goes on.

        A run that ended between its last checkpoint and the aligned one has no step left: resumed,
        the trainer would do one too many.
        """
        if state.global_step >= state.max_steps:
            LOG.info("all %d steps are done", state.global_step)
            self.trainer._run_epoch = lambda **epoch: None
            control.should_training_stop = True
        args.eval_on_start = self.trainer.eval_dataset is not None and not state.global_step
        start_measuring()
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the loss on the held-out data measured after the last step."""
        if state.global_step >= state.max_steps and self.trainer.eval_dataset is not None:
            control.should_evaluate = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note in the checkpoint what it was trained from."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.run.write_record(folder, self.seconds)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what was done."""
        losses = heldout_losses(state.log_history, state.global_step)
        rows = self.trainer.eval_dataset
        self.run.outcome.update(
            steps=state.global_step,
            tokens=int(state.num_input_tokens_seen),
            world_size=args.world_size,
            warmup_steps=int(args.get_warmup_steps(state.max_steps)),
            heldout_loss=losses and {**losses, "tokens": label_tokens(rows)},
            seconds=round(self.seconds, 1),
            memory=measure_run(),
            versions=versions(),
        )
