"""An Axolotl plugin for tests: each rank writes down the batches it trains on, and may be killed.

Environment: WITNESS, the folder to write in; KILL_RANK and KILL_STEP, the rank that gets SIGKILL
after that many steps; HOLD_STEP, after how many steps all wait to be interrupted.
"""

import json
import os
import signal
import time
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin

RANK = os.environ.get("RANK", "0")


class WitnessPlugin(BasePlugin):
    """Wraps the trainer's step; makes runs comparable, and possible without an accelerator."""

    def load_datasets(self, cfg, preprocess=False):
        """Axolotl 0.19 puts the model of rank n on accelerator n, which is not there."""
        if cfg.world_size > 1 and not cfg.fsdp_config:
            cfg.device_map = {"": "cpu"}

    def pre_lora_load(self, cfg, model):
        """The same A in every run: Axolotl does not seed it."""
        torch.manual_seed(cfg.seed)

    def post_trainer_create(self, cfg, trainer):
        """Let every batch be written down before it is trained on."""
        step = trainer.training_step

        def witnessed(model, inputs, *args, **kwargs):
            done = trainer.state.global_step
            if (RANK, str(done)) == (os.environ.get("KILL_RANK"), os.environ.get("KILL_STEP")):
                os.kill(os.getpid(), signal.SIGKILL)
            if str(done) == os.environ.get("HOLD_STEP"):
                Path(os.environ["WITNESS"], f"held-{RANK}").touch()
                for _ in range(1200):
                    time.sleep(0.1)
            with Path(os.environ["WITNESS"], f"rank-{RANK}.jsonl").open("a") as file:
                rows = inputs.get("input_ids", torch.empty(0)).tolist()  # pairs have other names
                file.write(json.dumps({"step": done, "rows": rows}) + "\n")
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = witnessed
