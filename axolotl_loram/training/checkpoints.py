"""Checkpoints of the trainer: from which a run goes on, and nodes with disks of their own.

Axolotl's auto_resume_from_checkpoints takes the folder of the highest number, also where a kill
left it half written, and each rank looks by itself. Here it is a whole one, the same on all ranks.

Of a checkpoint, the trainer and DeepSpeed write `trainer_state.json`, `scheduler.pt` and `latest`
on global rank 0 only, and read them on every rank (transformers 5.16, DeepSpeed 0.18.9); Axolotl
has no key for `save_on_each_node`, which would also write weights that are not there. So they are
brought along. Its share of weights and optimizer each rank writes and reads by itself; without
DeepSpeed and FSDP there are none, and the adapter and its optimizer are brought too.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from axolotl_loram.architecture.lora_names import ADAPTER_CONFIG
from axolotl_loram.architecture.record import Record
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint

LOG = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"
"""What the trainer writes last into a checkpoint: where it is missing, the rest may be too."""
BROUGHT = ("scheduler.pt", "latest", "loram.json", STATE_FILE)
ADAPTERS = (ADAPTER_CONFIG, ADAPTER_FILE, "optimizer.pt")
"""What rank 0 alone writes of an adapter in training, without shares: hundreds of MB at most."""


def is_first_rank() -> bool:
    """Whether this process is global rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def number_of(checkpoint: Path) -> int:
    """The step that a folder `checkpoint-N` was written at."""
    return int(checkpoint.name.partition("-")[2])


def last_on_all_ranks(checkpoints: Sequence[Path]) -> str | None:
    """The latest of rank 0's whole checkpoints of which every rank has its share; all call this.

    Raises:
        LoRAMError: Rank 0 has some, and none is whole on all nodes.
    """
    latest_first = sorted(checkpoints, key=number_of, reverse=True)
    names = from_first_rank([str(path) for path in latest_first])
    present = _from_all_ranks([_has_share(Path(name)) for name in names])
    for name, *ranks in zip(names, *present, strict=True):
        if all(ranks):
            return name
    if names:
        missing = [rank for rank, found in enumerate(present) if not any(found)]
        raise LoRAMError(
            f"expected a checkpoint that every rank has its share of, found none: ranks {missing} "
            f"have no share of {names[0]}: bring the node's own files back, or start anew"
        )
    return None


def bring_state(checkpoint: Path) -> None:
    """Write what only rank 0 wrote of a checkpoint to disks that lack it; all ranks call this."""
    adapter = ADAPTERS if (checkpoint / ADAPTER_FILE).exists() else ()
    paths = [checkpoint / name for name in (*BROUGHT, *adapter)]
    found = {path.name: path for path in paths if path.exists()}
    state = from_first_rank({name: file.read_bytes() for name, file in found.items()})
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for name, content in state.items():
            file = checkpoint / name
            checkpoint.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
    from_first_rank(None)  # nobody reads before all are written


def from_first_rank(value: Any) -> Any:
    """The value that global rank 0 has."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def _from_all_ranks(value: list[Any]) -> list[list[Any]]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def _has_share(checkpoint: Path) -> bool:
    """Whether this rank finds its own file of DeepSpeed's, where there are such files."""
    rank = os.environ.get("RANK", "0")
    own = list(checkpoint.glob(f"global_step*/*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"))
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return bool(own) or not sharded


class NodeCallback(TrainerCallback):
    """Holds save_total_limit on the disks of other nodes, where the trainer deletes nothing."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete older shares, beyond the limit; one rank of each node but the first."""
        if args.save_total_limit and args.local_process_index == 0 and args.process_index != 0:
            for folder in surplus(Path(args.output_dir), state.global_step, args.save_total_limit):
                shutil.rmtree(folder, ignore_errors=True)


def surplus(folder: Path, step: int, limit: int) -> list[Path]:
    """Shares of checkpoints before `step` that are more than the limit, oldest first.

    Of a folder with a trainer's state rank 0 takes care.
    """
    found = [path for path in folder.glob("checkpoint-*") if not (path / STATE_FILE).exists()]
    older = sorted((path for path in found if number_of(path) < step), key=number_of)
    return older[: max(0, len(older) + 1 - limit)]


def choose_checkpoint(cfg: Any, folder: Path, key: str, value: str) -> None:
    """Settle in cfg which checkpoint in a folder training goes on from, the same for all ranks.

    In its `loram.json`, `key` is to be `value`: the model that it is trained from.

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
