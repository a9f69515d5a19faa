"""Which of the trainer's checkpoints a run goes on from: a whole one, and the same on all ranks.

Axolotl's auto_resume_from_checkpoints takes the folder of the highest number, also where a kill
left it half written, and each rank looks by itself.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.record import Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.training.checkpoints import (
    STATE_FILE,
    bring_state,
    is_first_rank,
    last_on_all_ranks,
    number_of,
)

LOG = logging.getLogger(__name__)


def choose_checkpoint(cfg: Any, folder: Path, key: str, value: str) -> None:
    """Settle in cfg which checkpoint training goes on from, the same for all ranks.

    Args:
        cfg: Axolotl's cfg.
        folder: Where the trainer's checkpoints are.
        key: What their `loram.json` names the model they were trained from by.
        value: What it says there for this run.

    Raises:
        LoRAMError: The one that is named is not whole, or of another run.
    """
    found = cfg.resume_from_checkpoint
    if not found and cfg.auto_resume_from_checkpoints:
        found = last_on_all_ranks(whole_checkpoints(folder))
        cfg.auto_resume_from_checkpoints = False
        cfg.resume_from_checkpoint = found
        LOG.info("resuming from %s", found or "no checkpoint: there is none that is whole")
    if not found:
        return
    bring_state(Path(found))
    if not is_first_rank():
        return
    problem = _problem(Path(found))
    if problem:
        raise LoRAMError(
            f"expected a whole checkpoint to resume from, found {found} {problem}: name another in "
            f"{folder}"
        )
    if getattr(Record.load(Path(found)), key) not in (None, value):
        raise LoRAMError(
            f"expected a checkpoint that was trained from this pruned model, found {found} of "
            "another: choose another output_dir"
        )


def whole_checkpoints(folder: Path) -> list[Path]:
    """The trainer's checkpoints that are whole, as far as this disk tells."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return [path for path in found if not _problem(path)]


def _problem(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, as a kill or a failing disk leaves it; None if it is whole.

    The trainer writes its state after weights, optimizer and random numbers.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if state["global_step"] != number_of(checkpoint):
            return f"with a {STATE_FILE} of step {state['global_step']}"
    except FileNotFoundError:
        return f"without {STATE_FILE}"
    except (ValueError, TypeError, KeyError):
        return f"with half of {STATE_FILE}"
    if (checkpoint / ADAPTER_FILE).exists():
        try:
            Checkpoint(checkpoint, ADAPTER_FILE)
        except LoRAMError:
            return f"with half of {ADAPTER_FILE}"
    return None
