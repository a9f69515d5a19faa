"""During training: how the adapter, recovered as it is by now, does on the original model.

Rank 0 alone does it, with the base in memory beside the pruned model; in data-parallel training the
other ranks wait for it at the next step. The adapter goes the way that it goes in the end: it is
saved, recovered and put on the base by PEFT, in a temporary folder. What is trained is not touched,
and random numbers go on as if nothing had been.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from axolotl_loram.architecture.config_json import layer_fields
from axolotl_loram.config_loram import LoRAMConfig
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_local_weights
from axolotl_loram.files.tensors import ADAPTER_FILE, Checkpoint
from axolotl_loram.memory.zero import zero_stage
from axolotl_loram.recovery.recover import recover
from axolotl_loram.recovery.whole import broken_tensors
from axolotl_loram.results.candidates import load_model, with_adapter
from axolotl_loram.results.evaluate import BATCH_SIZE, GPU_BATCH_SIZE, LONGEST
from axolotl_loram.results.perplexity import document_losses, fitting
from axolotl_loram.results.statistics import exp, mean_loss
from axolotl_loram.text.heldout import HeldOut, from_rows, held_out
from axolotl_loram.training.run import Run

LOG = logging.getLogger(__name__)
LOSS, PERPLEXITY = "eval_loram_recovered_loss", "eval_loram_recovered_perplexity"
KEY = "evaluate_recovered_every"
ON_GPUS = ("liger_rms_norm", "liger_layer_norm", "liger_rope", "liger_glu_activation")
"""Settings by which models of a class compute with kernels of Triton, the base as well."""


def check_can_evaluate(cfg: Any) -> None:
    """Refuse `evaluate_recovered_every` where it cannot work; cfg still names the base.

    Raises:
        LoRAMError: The adapter is spread over ranks, or there are no weights, memory or text, or
            the base, on a CPU, would compute with kernels for GPUs.
    """
    section = cfg.loram or {}
    if not section.get(KEY):
        return
    if cfg.fsdp or cfg.fsdp_config or zero_stage(cfg.deepspeed) == 3:
        raise LoRAMError(
            f"expected the whole adapter on each rank for `{KEY}`, found FSDP or ZeRO-3, which "
            "spread it: use ZeRO-2 or DDP, or evaluate checkpoints afterwards"
        )
    on_gpus = [key for key in ON_GPUS if cfg[key]]
    if on_gpus and section.get("evaluate_recovered_device", "cpu") == "cpu":
        raise LoRAMError(
            f"expected no `{on_gpus[0]}` with the base on a CPU for `{KEY}`: its kernels run on "
            "GPUs only; set evaluate_recovered_device: cuda, or leave it out"
        )
    if not section.get("evaluate_recovered_path"):
        if cfg.rl or cfg.reward_model or cfg.process_reward_model:
            raise LoRAMError(
                f"expected text for `{KEY}`, found pairs and rewards alone: name a file by "
                "evaluate_recovered_path"
            )
        if not (cfg.val_set_size or cfg.test_datasets):
            raise LoRAMError(
                f"expected held-out text for `{KEY}`, found none: give evaluate_recovered_path, "
                "val_set_size or test_datasets"
            )
    weights = find_local_weights(str(cfg.base_model), cfg.revision_of_model)
    if weights is None:
        raise LoRAMError(
            f"expected the weights of {cfg.base_model} on this machine for `{KEY}`, found none: "
            "download them, or take the option out"
        )
    dtype_that_fits(weights, section.get("evaluate_recovered_device") or "cpu")


def dtype_that_fits(weights: Path, device: str) -> str:
    """What to hold the base in: float32 on a CPU with memory for that, else "auto" (as stored).

    Raises:
        LoRAMError: Not even the weights as stored fit.
    """
    tensors = Checkpoint(weights).tensors.values()
    stored = sum(tensor.nbytes for tensor in tensors)
    wide = 4 * sum(tensor.nbytes // tensor.bits.itemsize for tensor in tensors)
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    if stored > free:
        raise LoRAMError(
            f"expected room for the base's {stored / 2**30:.2f} GiB on {device} for `{KEY}`, found "
            f"{free / 2**30:.2f} GiB free: take the option out, and run `axolotl-loram evaluate` "
            "where it fits"
        )
    return "float32" if device == "cpu" and wide <= free else "auto"


class RecoveredEvaluation(TrainerCallback):
    """Logs loss and perplexity of the base with the adapter recovered, every n steps.

    Args:
        trainer: Whose adapter; what is found goes through its `log`.
        run: The training run.
        section: The `loram:` section.
    """

    def __init__(self, trainer: Any, run: Run, section: LoRAMConfig) -> None:
        self.trainer, self.run = trainer, run
        self.every = section.evaluate_recovered_every or 0
        self.source = section.evaluate_recovered_path
        self.limit = section.evaluate_recovered_documents
        self.device = section.evaluate_recovered_device
        self.batch_size = BATCH_SIZE.get(self.device, GPU_BATCH_SIZE)
        self.base: Any = None
        self.held: HeldOut | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the base, and see where it starts."""
        if state.is_world_process_zero:
            with random_state_kept():
                self.held = self._held_out()
                weights = find_local_weights(self.run.base.id, self.run.base.revision)
                assert weights is not None  # check_can_evaluate saw to it
                dtype = dtype_that_fits(weights, self.device)
                self.base = load_model(self.run.base.id, self.run.base.revision, self.device, dtype)
            self._log(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where it is time to, and after the last step."""
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if state.is_world_process_zero and due:
            self._log(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the base, before the adapter is recovered or merged."""
        self.base = None

    def _log(self, state: Any, control: Any) -> None:
        with random_state_kept():
            loss = self.loss()
        wanted = control.should_log  # logging by the way must not stand in for the trainer's own
        self.trainer.log({LOSS: loss, PERPLEXITY: exp(loss) or math.inf})
        control.should_log = wanted

    def loss(self) -> float:
        """Mean loss of the base with the adapter as it is by now, in nats per token."""
        held, run = self.held, self.run
        assert held is not None
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        confined = run.pruned if run.masked and run.merges else None
        with tempfile.TemporaryDirectory(prefix="axolotl-loram-") as scratch:
            trained, recovered = Path(scratch, "trained"), Path(scratch, "recovered")
            model.save_pretrained(trained)
            if broken_tensors(Checkpoint(trained, ADAPTER_FILE).tensors):
                return math.nan  # said here, not refused: training goes on
            recover(trained, str(run.pruned), recovered, base=run.base, of_run=True)
            with with_adapter(self.base, recovered, confined) as adapted:
                losses, self.batch_size = fitting(
                    self.batch_size, lambda size: document_losses(adapted, held, size)
                )
        return mean_loss(losses)["loss"]

    def _held_out(self) -> HeldOut:
        config = layer_fields(self.run.plan.config, None)
        length = min(LONGEST, config.get("max_position_embeddings") or LONGEST)
        reader = self.trainer.processing_class
        tokenizer = getattr(reader, "tokenizer", reader)  # of a processor of images
        vocabulary = max(config["vocab_size"], len(tokenizer))  # with what training adds
        common: dict[str, Any] = {"length": length, "vocabulary_size": vocabulary}
        if self.source:
            return held_out(self.source, "in_domain", tokenizer, limit=self.limit, **common)
        data = self.trainer.eval_dataset
        columns = getattr(data, "column_names", None) or []
        if not {"input_ids", "labels"} <= set(columns):
            raise LoRAMError(
                f"expected held-out rows with input_ids and labels for `{KEY}`, found "
                f"{', '.join(columns) or 'none'}: name a file by evaluate_recovered_path"
            )
        some = data.select(range(min(self.limit, len(data))))
        rows = ((row["input_ids"], row["labels"]) for row in some)
        return from_rows(rows, "validation", "in_domain", "the run's held-out data", **common)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Let random numbers go on afterwards as if nothing had been drawn."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
