"""Whether a run has anything to learn: a label that is masked is in no loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import StoredTensor
from axolotl_loram.recovery.whole import is_untrained
from axolotl_loram.training.distil import IGNORED

LOG = logging.getLogger(__name__)
CURE = "see train_on_inputs, roles_to_train, the data's type and sequence_len"


def warn_of_masked_labels(trainer: Any) -> None:
    """Say before the first step that no row has a label, as the trainer's collator hands it on.

    Looks until it finds one; not at streams, of which a look would take rows away. The first label
    of a row is none: nothing comes before it.
    """
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__") or not len(rows) or "labels" not in rows[0]:
        return
    named = ("input_ids", "attention_mask", "labels", "position_ids")
    alone = ({name: row[name] for name in named if name in row} for row in rows)
    if not any((trainer.data_collator([row])["labels"][:, 1:] != IGNORED).any() for row in alone):
        LOG.warning(
            "all labels of all %d rows are masked: nothing will be learnt; %s", len(rows), CURE
        )


def check_learnt(history: Iterable[Mapping[str, Any]], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse what came of a run in which no loss ever was anything but 0, and nothing was learnt.

    A loss of 0 alone is no proof: GRPO's is one where it learns.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses and not any(losses) and is_untrained(tensors):
        raise LoRAMError(
            f"expected a loss to learn from, found 0 at all {len(losses)} logged steps: every "
            f"label is masked; {CURE}"
        )
