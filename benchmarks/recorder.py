"""An Axolotl plugin that keeps what a run trains on: its batches as the model gets them.

Name it as `plugins: [recorder.RecorderPlugin]`, with this folder in PYTHONPATH; it writes
`batches.pt` into the run's output_dir. RECORDER_START names a PEFT adapter whose weights the run
then starts with: Axolotl draws LoRA's start without a seed.
"""

import os
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from peft import load_peft_weights, set_peft_model_state_dict


class RecorderPlugin(BasePlugin):
    """Stands in front of the trainer's `training_step`."""

    def post_trainer_create(self, cfg, trainer):
        """The model has its LoRA, and no step was taken yet."""
        start = os.environ.get("RECORDER_START")
        if start:
            set_peft_model_state_dict(trainer.model, load_peft_weights(start, device="cpu"))
        self.batches, self.folder, self.step = [], Path(cfg.output_dir), trainer.training_step
        trainer.training_step = self.recorded

    def recorded(self, model, inputs, *rest):
        """A step; gradient accumulation makes one of several batches."""
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        return self.step(model, inputs, *rest)

    def post_train(self, cfg, model):
        """Write the batches."""
        torch.save(self.batches, self.folder / "batches.pt")
