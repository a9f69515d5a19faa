"""An Axolotl plugin for tests: each rank writes down the batches it trains on, and may be killed.

Environment: WITNESS, the folder to write in; KILL_RANK and KILL_STEP, the rank that gets SIGKILL
after that many steps.
"""

import json
import os
import signal
from pathlib import Path

from axolotl.integrations.base import BasePlugin

RANK = os.environ.get("RANK", "0")


class WitnessPlugin(BasePlugin):
    """Wraps the trainer's step."""

    def post_trainer_create(self, cfg, trainer):
        """Let every batch be written down before it is trained on."""
        step = trainer.training_step

        def witnessed(model, inputs, *args, **kwargs):
            done = trainer.state.global_step
            if (RANK, str(done)) == (os.environ.get("KILL_RANK"), os.environ.get("KILL_STEP")):
                os.kill(os.getpid(), signal.SIGKILL)
            with Path(os.environ["WITNESS"], f"rank-{RANK}.jsonl").open("a") as file:
                rows = inputs["input_ids"].tolist()
                file.write(json.dumps({"step": done, "rows": rows}) + "\n")
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = witnessed
