"""What the align stage minimizes: next-token loss, or the divergence from what the base says.

The trainer computes the loss by its own hook for that (`compute_loss_func`), from the logits of the
whole model: whatever shards or wraps it stays as it is. Only the tokens of the batch are looked at
before, to find what the base said of them. Evaluation keeps the next-token loss, so that the
held-out losses of all objectives compare.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from axolotl_loram.architecture.pairing import check_base, check_base_tokenizer, fingerprint_of
from axolotl_loram.architecture.plan import SCHEMA_VERSION
from axolotl_loram.files.atomic import made_once
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.progress import progress_bar
from axolotl_loram.models.device import choose_device
from axolotl_loram.pruning.cache import cache_folder
from axolotl_loram.training.align import Alignment
from axolotl_loram.training.distil import IGNORED, Targets, distillation_loss
from axolotl_loram.training.teacher import Teacher, data_digest, distinct, make_teacher

LOG = logging.getLogger(__name__)


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
    teacher = Teacher(_outputs(run, folder, trainer))
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
        compute_loss = self.trainer.compute_loss

        def look_up_first(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.targets = None
            if model.training:
                tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
                self.targets = self.teacher.targets(tokens, mask)
            return compute_loss(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = look_up_first
        self.trainer.compute_loss_func = self.loss

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


def _outputs(run: Alignment, base: Path, trainer: Any) -> Path:
    """The folder of the base's outputs on the training data, made by whichever rank comes first."""
    section = run.section
    sequences = distinct(seen(trainer))
    device = choose_device()
    digest, top_k = data_digest(sequences), section.teacher_top_k
    identity = [SCHEMA_VERSION, fingerprint_of(base), digest, top_k, device]

    def make(folder: Path) -> None:
        LOG.info("computing what %s says of %d sequences", base, len(sequences))
        with progress_bar("teacher") as progress:
            make_teacher(base, sequences, folder, top_k, device, progress)

    return made_once(cache_folder(section.cache_dir) / "teacher", identity, make)


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
