"""Fitting a recovered adapter: each layer of the base is to change as the pruned model's did.

With its adapter, layer ℓ of the pruned model changes its output by Δᴾ(h) = Pℓ(h; A, B) − Pℓ(h). The
base's layer with the recovered adapter changes by something else: its pruned units do not move with
the kept ones, for which those had learnt to stand in. Where pruning took outputs of an adapted
projection, the rows of B are free; they are fitted on calibration text h,

    min over B'  Σ ‖Bℓ(h; A, B') − Bℓ(h) − Δᴾ(h)‖² / Σ ‖Δᴾ(h)‖² + λ Σ ‖s (B' − B) A x‖² / Σ ‖Δᴾ(h)‖²

by L-BFGS (the layer is not linear in B'). All else stays as trained, bit for bit. Layers come in
order, h being what the base with the adapter fitted so far makes of the text. One layer of each
model is in memory; a layer's fit is kept only where it lowers the error on text not seen in it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import axolotl_loram.models.per_layer  # noqa: F401  (builds the pruned layers)
from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.pairing import check_narrowed, check_pair
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import FillArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import Work, unfinished
from axolotl_loram.files.tensors import Checkpoint
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.stream import LayerStream, States, seen_inputs
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.refit import split
from axolotl_loram.recovery.adapter import Adapter
from axolotl_loram.recovery.lora import Loras, added, below, pairs_of, read_loras
from axolotl_loram.recovery.recover import default_output, recover
from axolotl_loram.recovery.scatter import Moved
from axolotl_loram.text.calibration import Calibration, load_calibration

LOG = logging.getLogger(__name__)
ITERATIONS = 8
RIDGE = 1e-2
"""λ."""


def fit(
    walk: Walk, pruned: LayerStream, plan: PruningPlan, full: Loras, narrow: Loras
) -> dict[str, Any]:
    """Fit the recovered adapter in place.

    Args:
        walk: Through the base's layers, up to the last that is pruned.
        pruned: The pruned model's layers.
        plan: The plan.
        full: The recovered adapter, zero at pruned features.
        narrow: The adapter as trained.

    Returns:
        Layer → its errors on held-out text before and after, relative to Σ ‖Δᴾ‖², and whether the
        fit was accepted.
    """
    facts: dict[str, Any] = {}
    for index in plan.counts:  # by an earlier process, which was interrupted
        if walk.work.has(_step(index)):
            _take_back(walk.work, index, full, facts)
    for index, layer in walk:
        prefix = f"{walk.stream.family.layers}.{index}."
        name, own = prefix.rstrip("."), below(full, prefix)
        if index in plan.counts and name not in facts and _free(own):
            fitter = LayerFit(walk, index, layer, own)
            fitter.aim(pruned, below(narrow, prefix))
            facts[name] = fitter.run()
            full |= {prefix + path: lora for path, lora in fitter.adapter.items()}
            fitted = {prefix + path: full[prefix + path].b for path in fitter.masks}
            arrays = {path: ("F32", b.numpy(force=True)) for path, b in fitted.items()}
            walk.work.save(_step(index), arrays, {"layer": name, **facts[name]})
        with torch.no_grad(), added(layer, below(full, prefix)), walk.advanced(index, layer):
            pass
    return facts


def _step(index: int) -> str:
    return f"fitted-{index}"


def _take_back(work: Work, index: int, full: Loras, facts: dict[str, Any]) -> None:
    """What an earlier process fitted for a layer."""
    stored, about = work.load(_step(index))
    facts[about.pop("layer")] = about
    for path, tensor in stored.items():
        lora = full[path]
        full[path] = replace(lora, b=torch.from_numpy(tensor.read().view("<f4")).to(lora.b))


def _free(adapter: Loras) -> dict[str, torch.Tensor]:
    """Path → 1 for the rows of B that pruning took, (outputs, 1), where it took some."""
    masks = {}
    for path, lora in adapter.items():
        kept = lora.kept(0)
        if kept is not None:
            masks[path] = torch.ones(len(lora.b), 1, device=lora.b.device)
            masks[path][torch.from_numpy(kept)] = 0
    return masks


class LayerFit:
    """Fits one layer of the base."""

    def __init__(self, walk: Walk, index: int, layer: nn.Module, adapter: Loras) -> None:
        self.walk, self.index, self.layer, self.adapter = walk, index, layer, adapter
        self.masks = _free(adapter)
        self.fitted, self.held_out = split(len(walk.tokens))
        shape = (*walk.tokens.shape, walk.stream.hidden_size)
        file = walk.work.folder / f"wanted-{index}.states"
        self.wanted, self.energy = States(file, shape, torch.float32), 0.0

    @torch.no_grad()
    def aim(self, pruned: LayerStream, narrow: Loras) -> None:
        """Write down the outputs to reach, Bℓ(h) + Δᴾ(h)."""
        theirs = pruned.layer(self.index)
        with self.wanted.written() as append:
            for batch in self.walk.batches():
                hidden = self._inputs(batch)
                without = pruned.run(self.index, theirs, hidden)
                with added(theirs, narrow):
                    change = pruned.run(self.index, theirs, hidden) - without
                append(self.walk.stream.run(self.index, self.layer, hidden) + change)
                self.energy += change.float().square().sum().item()
        self.energy = max(self.energy / len(self.walk.tokens), 1e-30)

    def run(self) -> dict[str, Any]:
        """Fit; the adapter stays as it was where that helps nothing on held-out text."""
        start, before = self.adapter, self.error(self.held_out)
        steps = {path: torch.zeros_like(start[path].b, requires_grad=True) for path in self.masks}
        white = self._whitened()
        optimizer = torch.optim.LBFGS(
            list(steps.values()), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
        )

        def moved() -> Loras:
            own = {p: self.masks[p] * steps[p] @ white[p] for p in steps}
            return start | {p: replace(start[p], b=start[p].b + own[p]) for p in steps}

        def loss() -> float:
            optimizer.zero_grad()
            total = 0.0
            for batch in self.walk.batches(self.fitted):
                self.adapter = moved()
                part = self._error(batch) / len(self.fitted)
                part.backward()
                total += part.item()
            penalty = RIDGE * self._size(steps, start)
            penalty.backward()
            return total + penalty.item()

        with torch.enable_grad():
            optimizer.step(loss)
        with torch.no_grad():
            self.adapter = moved()
        after = self.error(self.held_out)
        if not after < before:
            LOG.warning("layer %d keeps its zeros: fitted, it came no closer", self.index)
            self.adapter = start
        self.wanted.file.unlink()
        return {
            "heldout_error_before": before,
            "heldout_error_after": after,
            "accepted": after < before,
        }

    @torch.no_grad()
    def error(self, samples: list[int]) -> float:
        """Σ ‖Bℓ(h; A, B) − Bℓ(h) − Δᴾ(h)‖² / Σ ‖Δᴾ(h)‖² on the samples."""
        total = sum(self._error(batch).item() for batch in self.walk.batches(samples))
        return total / len(samples)

    def _error(self, batch: list[int]) -> torch.Tensor:
        """The sum over a batch, relative to the mean sequence's Σ ‖Δᴾ(h)‖²."""
        wanted = self.wanted.read(batch).to(self.walk.stream.device)
        with added(self.layer, self.adapter):
            found = self.walk.stream.run(self.index, self.layer, self._inputs(batch))
        return (found.float() - wanted).square().sum() / self.energy

    def _size(self, steps: dict[str, torch.Tensor], start: Loras) -> torch.Tensor:
        """Σ ‖s (B' − B) A x‖², relative as the errors are."""
        tokens = self.walk.tokens.shape[1]
        sizes = [
            (start[path].scale * self.masks[path] * step).square().sum()
            for path, step in steps.items()
        ]
        return torch.stack(sizes).sum() * tokens / self.energy

    @torch.no_grad()
    def _whitened(self) -> dict[str, torch.Tensor]:
        """Path → L⁻¹ with L Lᵀ = mean of A x xᵀ Aᵀ, (r, r): steps times it are of equal weight."""
        sums = {path: torch.zeros(()) for path in self.masks}
        count = 0

        def see(path: str, inputs: torch.Tensor) -> None:
            low = nn.functional.linear(inputs.flatten(0, -2).float(), self.adapter[path].a)
            sums[path] = sums[path].to(low.device) + low.T @ low

        with added(self.layer, self.adapter), seen_inputs(self.layer, list(self.masks), see):
            for batch in self.walk.batches(self.fitted):
                self.walk.stream.run(self.index, self.layer, self._inputs(batch))
                count += len(batch) * self.walk.tokens.shape[1]
        return {path: _inverse_root(total / count) for path, total in sums.items()}

    def _inputs(self, batch: list[int]) -> torch.Tensor:
        return self.walk.inputs(self.index).read(batch).to(self.walk.stream.device)


def _inverse_root(moment: torch.Tensor) -> torch.Tensor:
    """L⁻¹ of a Cholesky factor, made safe where some of A reads nothing."""
    floor = 1e-4 * moment.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(moment), device=moment.device)
    return torch.linalg.inv(torch.linalg.cholesky(moment + floor * eye))


@dataclass(frozen=True)
class Job:
    """One fit: the settings, and the two models on this machine.

    Attributes:
        work: Beside this path, under hidden names, hidden states go, with room for three times the
            calibration text's; what an interrupted fit has done stays there.
        calibration: Text to fit on, by default what the settings name.
    """

    settings: FillArgs
    plan: PruningPlan
    base: Path
    pruned: Path
    work: Path
    progress: Progress = no_progress
    calibration: Calibration | None = None

    @property
    def device(self) -> str:
        """Where to compute."""
        return choose_device(self.settings.device)

    def streams(self) -> tuple[LayerStream, LayerStream]:
        """The layers of the base and of the pruned model, in float32: changes are small."""
        base = LayerStream(Checkpoint(self.base), self.plan.config, self.device, False, torch.float)
        config = load_config(str(self.pruned))
        pruned = LayerStream(Checkpoint(self.pruned), config, self.device, False, torch.float)
        return base, pruned

    def fill(
        self, moved: list[Moved], config: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What `recover` asks: new bits by tensor name, and the record.

        Raises:
            LoRAMError: As `check_free_rows`.
        """
        check_free_rows(moved)
        full = read_loras(moved, config, full_size=True, device=self.device)
        narrow = read_loras(moved, config, full_size=False, device=self.device)
        base, pruned = self.streams()
        calibration = self.calibration or load_calibration(self.settings, self.base)
        identity = {
            "adapter": _digest(narrow),
            "plan": self.plan.digest,
            "calibration": calibration.record(),
            "device": self.device,
        }
        with unfinished(self.work, identity) as work:
            stop = max(self.plan.counts) + 1
            walk = Walk(base, work, calibration.tokens, "fitting", stop, self.progress)
            layers = fit(walk, pruned, self.plan, full, narrow)
        bits = {name: values for lora in full.values() for name, values in lora.bits().items()}
        return bits, {"method": "fitted", "calibration": calibration.record(), "layers": layers}


def _digest(adapter: Loras) -> str:
    digest = hashlib.sha256()
    for name, lora in sorted(adapter.items()):
        digest.update(f"{name} {lora.scale}".encode())
        for matrix in (lora.a, lora.b):
            digest.update(matrix.float().numpy(force=True).tobytes())
    return digest.hexdigest()


def recover_fitted(
    adapter: Path,
    settings: FillArgs,
    pruned_model: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """`recover`, whose arguments these are, with B fitted to text where features were pruned.

    The text is by default what `settings` name. In what is returned, "fill" has each layer's
    errors.

    Raises:
        LoRAMError: Base, pruned model and adapter do not belong together, or cannot be fitted.
    """
    opened = Adapter.open(adapter)
    pruned = find_folder(pruned_model or opened.model)
    plan = PruningPlan.load(pruned)
    check_narrowed(pruned, plan, "to fill from")
    check_pair(pruned, plan, plan.base.id, plan.base.revision)
    base = find_folder(plan.base.id, plan.base.revision)
    work = default_output(adapter).with_name(f"fitting-{adapter.name}")
    job = Job(settings, plan, base, pruned, work, progress, calibration)
    return recover(opened, str(pruned), output, overwrite=overwrite, fill=job.fill)


def check_free_rows(moved: Sequence[Moved]) -> None:
    """Refuse an adapter in which nothing can be filled."""
    if all(b.features[0] is None for _, b in pairs_of(moved).values()):
        raise LoRAMError(
            "expected LoRA on a projection that lost outputs (such as up_proj or v_proj) to fit, "
            "found none: recover this adapter with zeros"
        )
