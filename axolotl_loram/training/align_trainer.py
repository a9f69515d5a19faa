"""The trainer of the align stage: what is frozen, counted, measured and minimized.

The loss is next-token loss, or the divergence from what the base says. The trainer computes that by
its own hook (`compute_loss_func`), from the logits of the whole model: whatever shards or wraps it
stays as it is. Only the tokens of the batch are looked at before, to find what the base said of
them. Evaluation keeps the next-token loss, so that the held-out losses of all objectives compare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import TrainerCallback

from axolotl_loram.architecture.config_json import sizes_of
from axolotl_loram.architecture.pairing import check_base, check_base_tokenizer
from axolotl_loram.architecture.record import versions
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.models import patches
from axolotl_loram.training.align import Alignment, heldout_losses, label_tokens, seconds_before
from axolotl_loram.training.distil import IGNORED, Targets, distillation_loss
from axolotl_loram.training.memory_log import measure_run, start_measuring
from axolotl_loram.training.teacher import Teacher, kept_outputs

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

    A checkpoint holds that state, so that no token counts twice.
    """
    trainer.args.include_num_input_tokens_seen = "non_padding"
    patches.count_ones(trainer)


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
        """Have the loss on the held-out data measured, unless training goes on."""
        if state.global_step >= state.max_steps:
            LOG.info("all %d steps are done", state.global_step)
            patches.train_no_more(self.trainer)
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


def prepare_objective(run: Alignment, trainer: Any) -> None:
    """Have the trainer minimize what the `loram:` section says.

    Raises:
        LoRAMError: The teacher is not the base of the pruned model, or its outputs on the training
            data cannot be computed.
    """
    section = run.section
    if section.objective != "distillation":
        return
    base = run.plan.base
    model = section.teacher_path or base.id
    revision = section.teacher_revision if section.teacher_path else base.revision
    check_base(run.plan, model, revision)
    check_base_tokenizer(run.pruned, model, revision)
    folder = find_folder(model, revision)
    outputs = kept_outputs(
        "teacher", folder, seen(trainer), section.teacher_top_k, section.cache_dir
    )
    teacher = Teacher(outputs)
    run.outcome.update(
        objective="distillation",
        teacher={
            "id": model,
            "revision": revision,
            "top_k": teacher.record["top_k"],
            "next_token_share": section.next_token_share,
        },
    )
    Distillation(trainer, teacher, section.next_token_share).attach()


class Distillation:
    """Computes a trainer's loss from a teacher's outputs."""

    def __init__(self, trainer: Any, teacher: Teacher, share: float) -> None:
        self.trainer, self.teacher, self.share = trainer, teacher, share
        self.targets: Targets | None = None

    def attach(self) -> None:
        """Take the place of the trainer's loss."""
        patches.see_batches(self.trainer, self.look_up)
        self.trainer.compute_loss_func = self.loss

    def look_up(self, model: Any, inputs: dict[str, Any]) -> None:
        """Find what the teacher says of a batch that is trained on."""
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.targets = self.teacher.targets(tokens, mask) if model.training else None

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of a batch: the mean over the tokens of the whole batch, as the trainer's."""
        logits = outputs["logits"]
        if self.targets is None:
            own = self.trainer.model.loss_function
            vocabulary, items = logits.shape[-1], num_items_in_batch
            return own(logits, labels, vocab_size=vocabulary, num_items_in_batch=items)
        following = pad(labels[:, 1:], (0, 1), value=IGNORED)
        total = distillation_loss(logits, self.targets, following, self.share)
        return total / (
            (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        )


def seen(trainer: Any) -> Iterator[np.ndarray]:
    """Token ids of the rows that the run will see, without padding: of a stream, no others."""
    args, data = trainer.args, trainer.train_dataset
    needed = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    needed *= args.world_size
    streamed = not hasattr(data, "__len__")
    if not streamed and 0 < needed < len(data):
        LOG.warning(
            "the teacher reads all %d sequences, of which the run will see %d: name less data",
            len(data),
            needed,
        )
    for row in islice(data, needed) if streamed else data:
        ids = np.asarray(row["input_ids"])
        mask = row.get("attention_mask")
        yield ids if mask is None else ids[np.asarray(mask) != 0]
