"""Layer-wise alignment: each pruned layer learns to give what the base's layer gives.

One layer of the pruned and of the base model are in memory at a time; the hidden states of both
lie on disk. A layer's inputs come from the pruned model so far, with the layers before it aligned;
its targets from the base alone, so that it also takes back what the layers before it left. All of
its weights are trained. They are kept only where they come closer on sequences that it has not
seen, after they are rounded to what they are stored in.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

import axolotl_loram.models.per_layer  # noqa: F401  (builds the pruned layers)
from axolotl_loram import __version__
from axolotl_loram.architecture.config_json import sizes_of, with_defaults
from axolotl_loram.architecture.model import layer_pieces
from axolotl_loram.architecture.pairing import check_narrowed, check_pair
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.architecture.record import versions
from axolotl_loram.config import LayerwiseArgs
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import Work, check_free, resumable
from axolotl_loram.files.tensors import Checkpoint, StoredTensor
from axolotl_loram.files.untrusted import copy_files, read_json
from axolotl_loram.models.bits import TORCH_DTYPES, to_bits
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.gather import write_weights
from axolotl_loram.pruning.refit import split
from axolotl_loram.text.calibration import Calibration, load_calibration
from axolotl_loram.training.aligned import CARRIED, aligned_record

LOG = logging.getLogger(__name__)
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Pair:
    """The folders of base and pruned model, and the plan that binds them."""

    plan: PruningPlan
    base: Path
    pruned: Path

    @property
    def unchanged(self) -> PruningPlan:
        """A plan that leaves the pruned model as it is: to write it with."""
        config = with_defaults(read_json(self.pruned / "config.json"))
        return PruningPlan(config, {}, self.plan.base)


def align_layers(
    pruned: str,
    output: Path,
    settings: LayerwiseArgs,
    base: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Write an aligned checkpoint: the pruned one, with its layers trained; returns its record.

    Interrupted, it leaves what it has done beside `output`, and goes on from there when it is
    called again with the same arguments. The base is by default what the plan names, the text what
    `settings` name.

    Raises:
        LoRAMError: The models do not belong together, or cannot be aligned.
    """
    pair = _find(pruned, base)
    device = choose_device(settings.device)
    calibration = calibration or load_calibration(settings, pair.base)
    checkpoint, start = Checkpoint(pair.pruned), time.time()
    identity = {
        "version": __version__,
        "pruned": checkpoint.fingerprint(),
        "plan": pair.plan.digest,
        "base": pair.plan.base.fingerprint,
        "settings": {**settings.model_dump(), "device": device},
        "calibration": calibration.record(),
    }
    states = calibration.tokens.size * sizes_of(pair.plan.config)["hidden"] * 4
    remedy = "make room, choose another disk, or align on fewer --calibration-samples"
    check_free(output, identity, 4 * states + 2 * checkpoint.nbytes, remedy)
    with resumable(output, identity, overwrite) as work:
        replaced, errors = _align(pair, work, settings, device, calibration.tokens, progress)
        files = write_weights(checkpoint, pair.unchanged, work.result, progress, replaced)
        alignment = {
            **_described(settings, calibration, errors),
            "teacher": {k: v for k, v in asdict(pair.plan.base).items() if k != "fingerprint"},
            "seconds": round(time.time() - start, 1),
            "versions": versions(),
        }
        return _write_rest(pair, work.result, files, alignment)


def _find(pruned: str, base: str | None) -> Pair:
    folder = find_folder(pruned)
    plan = PruningPlan.load(folder)
    plan.check_runs_alone(pruned, "its layers are the original's, there is nothing to align")
    check_narrowed(folder, plan, "to align")
    revision = plan.base.revision if base is None else None
    check_pair(folder, plan, base or plan.base.id, revision)
    return Pair(plan, find_folder(base or plan.base.id, revision), folder)


def _align(
    pair: Pair,
    work: Work,
    settings: LayerwiseArgs,
    device: str,
    tokens: np.ndarray,
    progress: Progress,
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Align layer after layer; returns the new tensors by name, and each layer's errors."""
    counts = pair.plan.counts
    original = LayerStream(Checkpoint(pair.base), pair.plan.config, device, dtype=torch.float32)
    config = pair.unchanged.config
    stream = LayerStream(Checkpoint(pair.pruned), config, device, dtype=torch.float32)
    walk = Walk(stream, work, tokens, "aligned", max(counts) + 1)
    done = progress(settings.steps * len(counts), "aligning", "step")
    done(settings.steps * sum(work.has(f"aligned-{index}") for index in counts))
    for index, layer in walk:
        base = Walk(original, work, tokens, "base", index + 1)
        for before, whole in base:
            with base.advanced(before, whole):
                pass
        arrays: dict[str, tuple[str, np.ndarray]] = {}
        facts: dict[str, Any] = {}
        if index in counts:
            trainer = LayerTrainer(walk, base, index, layer, settings)
            facts = trainer.train(done)
            arrays = trainer.stored() if facts["accepted"] else {}
        with walk.advanced(index, layer):
            work.save(f"aligned-{index}", arrays, facts)
    replaced: dict[str, StoredTensor] = {}
    errors: dict[str, Any] = {}
    for index in counts:
        tensors, facts = work.load(f"aligned-{index}")
        replaced |= tensors
        errors[f"{stream.family.layers}.{index}"] = facts
    return replaced, errors


class LayerTrainer:
    """Trains one layer of the pruned model."""

    def __init__(
        self, walk: Walk, base: Walk, index: int, layer: nn.Module, settings: LayerwiseArgs
    ) -> None:
        self.walk, self.index, self.layer, self.settings = walk, index, layer, settings
        self.inputs, self.targets = walk.inputs(index), base.inputs(index + 1)
        self.fitted, self.held_out = split(len(walk.tokens))

    def train(self, done: Any) -> dict[str, Any]:
        """Train all weights, and take them back where they come no closer on what is held out.

        Returns:
            Held-out errors before and after (of what was trained), and whether it was accepted.
        """
        before, start = self.error(), copy.deepcopy(self.layer.state_dict())
        with torch.enable_grad(), _trainable(self.layer) as weights:
            optimizer = torch.optim.AdamW(weights, self.settings.learning_rate, weight_decay=0.0)
            steps = self.settings.steps
            schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
            for batch in self._batches():
                self._relative_error(batch).mean().backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                done(1)
        for _, dtype, values in self._pieces():
            values.copy_(values.to(TORCH_DTYPES[dtype]))
        after = self.error()
        if not after < before:
            LOG.warning("layer %d stays as it was: trained, it came no closer", self.index)
            self.layer.load_state_dict(start)
        facts = {"heldout_error_before": before, "heldout_error_after": after}
        return {**facts, "accepted": after < before}

    @torch.no_grad()
    def error(self) -> float:
        """Mean over the held-out tokens of ‖y − y*‖² / ‖y*‖²."""
        errors = [self._relative_error(batch) for batch in self.walk.batches(self.held_out)]
        return torch.cat([error.flatten() for error in errors]).mean().item()

    def stored(self) -> dict[str, tuple[str, np.ndarray]]:
        """Stored tensor name → dtype and bits of the layer as it is now."""
        return {name: (dtype, to_bits(values, dtype)) for name, dtype, values in self._pieces()}

    def _relative_error(self, batch: list[int]) -> torch.Tensor:
        """Error of each token, relative to its own target: the next norm divides by that."""
        device = self.walk.stream.device
        wanted = self.targets.read(batch).to(device)
        found = self.walk.stream.run(self.index, self.layer, self.inputs.read(batch).to(device))
        return (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)

    def _batches(self) -> Iterator[list[int]]:
        """Samples for each step: all that are fitted, in an order drawn anew each time."""
        drawn = np.random.default_rng([self.settings.seed, self.index])
        size = min(self.settings.batch_size, len(self.fitted))
        left: list[int] = []
        for _ in range(self.settings.steps):
            if len(left) < size:
                left = drawn.permutation(self.fitted).tolist()
            batch, left = left[:size], left[size:]
            yield batch

    def _pieces(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Each weight as checkpoints store it: name, dtype, and a view of its values."""
        stream, parameters = self.walk.stream, dict(self.layer.named_parameters())
        prefix = f"{stream.family.layers}.{self.index}."
        for name, pieces in layer_pieces(stream.config, self.index).items():
            values = parameters.get(name.removeprefix(prefix))
            for expert, stacked in enumerate(pieces if values is not None else []):
                assert values is not None
                own = values.data if stacked[0].expert is None else values.data[expert]
                rows = own.split([piece.shape[0] for piece in stacked]) if own.ndim else [own]
                for piece, part in zip(stacked, rows, strict=True):
                    yield piece.name, stream.checkpoint[piece.name].dtype, part


@contextmanager
def _trainable(layer: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The layer's weights, with gradients in the block."""
    weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _described(
    settings: LayerwiseArgs, calibration: Calibration, errors: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of the alignment, but for what surrounds it."""
    fitted, _ = split(len(calibration.tokens))
    batch = min(settings.batch_size, len(fitted))
    return {
        "objective": "layerwise",
        "data": calibration.record(),
        "steps": settings.steps,
        "tokens": settings.steps * batch * calibration.tokens.shape[1],
        "world_size": 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_steps": round(WARMUP * settings.steps),
        "trained": {"lm_head": False, "layers": len(errors)},
        "heldout_loss": None,
        "layers": dict(errors),
    }


def layer_summary(alignment: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer-wise alignment gained: means over the layers of the held-out errors."""
    layers = alignment["layers"].values()
    kept = [f"heldout_error_{'after' if f['accepted'] else 'before'}" for f in layers]
    before = [facts["heldout_error_before"] for facts in layers]
    after = [facts[name] for facts, name in zip(layers, kept, strict=True)]
    return {
        "layers_accepted": sum(facts["accepted"] for facts in layers),
        "layers_tried": len(layers),
        "heldout_error_before": round(sum(before) / len(before), 6),
        "heldout_error_after": round(sum(after) / len(after), 6),
        "tokens": alignment["tokens"],
        "seconds": alignment["seconds"],
    }


def _write_rest(
    pair: Pair, folder: Path, files: dict[str, str], alignment: dict[str, Any]
) -> dict[str, Any]:
    """Copy what is not weights, and add the alignment to the record."""
    copy_files(pair.pruned, folder, CARRIED)
    record = aligned_record(pair.pruned, folder, files, alignment)
    record.save(folder)
    return record.as_json()
