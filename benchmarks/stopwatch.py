"""An Axolotl plugin that times the steps of a run on a CPU and takes its memory, and nothing else.

Name it as `plugins: [stopwatch.StopwatchPlugin]`, with this folder in PYTHONPATH; it writes
`stopwatch.json` into the run's output_dir.
"""

import json
import time
from pathlib import Path

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback


def resident(field: str) -> int:
    """Bytes of this process: VmRSS is what is resident now, VmHWM the peak of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let VmHWM begin again (Linux, proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


class Stopwatch(TrainerCallback):
    """Processor and wall seconds of each step; resident memory before loading, and at most."""

    def __init__(self, baseline: int):
        self.found: dict[str, object] = {"before_model_bytes": baseline}
        self.steps: list[tuple[float, float]] = []

    def on_train_begin(self, args, state, control, **_):
        """The model is loaded."""
        self.found["loading_peak_bytes"] = resident("VmHWM")
        forget_peak()

    def on_step_begin(self, args, state, control, **_):
        """Start the watch."""
        self.start = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """Stop it: the optimizer has stepped."""
        cpu, wall = self.start
        self.steps.append((time.process_time() - cpu, time.perf_counter() - wall))

    def on_train_end(self, args, state, control, **_):
        """Write what was found."""
        found = {**self.found, "peak_bytes": resident("VmHWM"), "steps": self.steps}
        Path(args.output_dir, "stopwatch.json").write_text(json.dumps(found), encoding="utf-8")


class StopwatchPlugin(BasePlugin):
    """Hooks `Stopwatch` into a run."""

    def pre_model_load(self, cfg):
        """Take what is resident without a model."""
        forget_peak()
        self.baseline = resident("VmRSS")

    def add_callbacks_pre_trainer(self, cfg, model):
        """The watch."""
        return [Stopwatch(self.baseline)]
