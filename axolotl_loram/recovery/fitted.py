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

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.files.resumable import Work
from axolotl_loram.models.stream import LayerStream, States, seen_inputs
from axolotl_loram.models.walk import Walk
from axolotl_loram.pruning.refit import split
from axolotl_loram.recovery.lora import Adapter, LoRA, added, below

LOG = logging.getLogger(__name__)
ITERATIONS = 8
RIDGE = 1e-2
"""λ."""


def fit(
    walk: Walk, pruned: LayerStream, plan: PruningPlan, full: Adapter, narrow: Adapter
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


def _take_back(work: Work, index: int, full: Adapter, facts: dict[str, Any]) -> None:
    """What an earlier process fitted for a layer."""
    stored, about = work.load(_step(index))
    facts[about.pop("layer")] = about
    for path, tensor in stored.items():
        lora = full[path]
        full[path] = replace(lora, b=torch.from_numpy(tensor.read().view("<f4")).to(lora.b))


def _free(adapter: Adapter) -> dict[str, torch.Tensor]:
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

    def __init__(self, walk: Walk, index: int, layer: nn.Module, adapter: Adapter) -> None:
        self.walk, self.index, self.layer, self.adapter = walk, index, layer, adapter
        self.masks = _free(adapter)
        self.fitted, self.held_out = split(len(walk.tokens))
        shape = (*walk.tokens.shape, walk.stream.hidden_size)
        file = walk.work.folder / f"wanted-{index}.states"
        self.wanted, self.energy = States(file, shape, torch.float32), 0.0

    @torch.no_grad()
    def aim(self, pruned: LayerStream, narrow: Adapter) -> None:
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

        def moved() -> Adapter:
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

    def _size(self, steps: dict[str, torch.Tensor], start: Adapter) -> torch.Tensor:
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


def fittable(adapter: Adapter) -> list[LoRA]:
    """The LoRA of layers that lost outputs: what can be fitted."""
    return [lora for lora in adapter.values() if lora.kept(0) is not None]
