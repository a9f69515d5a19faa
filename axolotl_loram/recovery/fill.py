"""Recovery beyond zeros: what a recovered adapter holds for the features that were pruned.

`normal` is the reference code's `normA`: the columns of A that pruning took are drawn from
N(0, (1/r)²) (its r is 8). `corrected` follows EMLoC (arXiv 2506.12015): with the rows of Q an
orthonormal basis of A's rows, B takes back what the base's weight W and the pruned model's Wᴾ (zero
where pruned) differ by along it, (W + s B' A) Qᵀ = (Wᴾ + s B A) Qᵀ, each direction of Q by at most
`LIMIT` times what the adapter itself does along it. `fitted` is in `fit`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import axolotl_loram.models.per_layer  # noqa: F401  (builds the pruned layers)
from axolotl_loram.architecture.config_json import load_config
from axolotl_loram.architecture.lora_names import named_model
from axolotl_loram.architecture.model import layer_weights
from axolotl_loram.architecture.pairing import check_pair
from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.config import FillArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.find import find_folder
from axolotl_loram.files.progress import Progress, no_progress
from axolotl_loram.files.resumable import unfinished
from axolotl_loram.files.tensors import Checkpoint, read_json
from axolotl_loram.models.device import choose_device
from axolotl_loram.models.stream import LayerStream
from axolotl_loram.models.walk import Walk
from axolotl_loram.recovery.fitted import fit, fittable
from axolotl_loram.recovery.lora import Adapter, below, read_loras
from axolotl_loram.recovery.recover import Filler, default_output, read_adapter_config, recover
from axolotl_loram.recovery.scatter import Moved
from axolotl_loram.text.calibration import Calibration, load_calibration

LIMIT = 3.0
"""EMLoC's λ."""


@dataclass(frozen=True)
class Job:
    """One filling: the settings, and the two models on this machine.

    Attributes:
        settings: How to fill.
        plan: The plan that binds the models.
        base: Folder of the base; None where `normal` fills, which does not look at it.
        pruned: Folder of the pruned model.
        work: Beside this path, under hidden names, hidden states go, with room for three times the
            calibration text's; what an interrupted fit has done stays there.
        progress: Shows how far it is.
        calibration: Text to fit on, by default what the settings name.
    """

    settings: FillArgs
    plan: PruningPlan
    base: Path | None
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
        assert self.base is not None
        base = LayerStream(Checkpoint(self.base), self.plan.config, self.device, False, torch.float)
        config = load_config(str(self.pruned))
        pruned = LayerStream(Checkpoint(self.pruned), config, self.device, False, torch.float)
        return base, pruned

    def fill(
        self, moved: list[Moved], config: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What `recover` asks: new bits by tensor name, and the record."""
        full = read_loras(moved, config, full_size=True, device=self.device)
        narrow = read_loras(moved, config, full_size=False, device=self.device)
        facts = FILLS[self.settings.fill](self, full, narrow)
        bits = {name: values for lora in full.values() for name, values in lora.bits().items()}
        return bits, {"method": self.settings.fill, **facts}


def _normal(job: Job, full: Adapter, narrow: Adapter) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(job.settings.seed)
    for lora in full.values():
        kept = lora.kept(1)
        if kept is not None:
            own = lora.a[:, kept].clone()
            noise = torch.randn(lora.a.shape, generator=drawn) / len(lora.a)
            lora.a = noise.to(lora.a)
            lora.a[:, kept] = own
    return {"seed": job.settings.seed}


@torch.no_grad()
def _corrected(job: Job, full: Adapter, narrow: Adapter) -> dict[str, Any]:
    base, pruned = job.streams()
    done = job.progress(len(job.plan.counts), "correcting", "layer")
    for index in job.plan.counts:
        ours, theirs = base.layer(index), pruned.layer(index)
        own = below(full, f"{base.family.layers}.{index}.")
        for weight in layer_weights(job.plan.config, index):
            if weight.module not in own or not weight.kinds:
                continue
            name = f"{weight.module}.{weight.parameter}"
            pair = ours.get_parameter(name), theirs.get_parameter(name)
            whole, small = (w.T if weight.transposed else w for w in pair)
            dims = weight.dims[::-1] if weight.transposed else weight.dims
            rows, columns = job.plan.features(dims, index)
            scattered = torch.zeros_like(whole)
            scattered[np.ix_(*map(_positions, (rows, columns), whole.shape))] = small
            lora = own[weight.module]
            lora.b = correct(lora.a, lora.b, whole - scattered, lora.scale)
        done(1)
    return {"limit": LIMIT}


def _positions(kept: np.ndarray | None, size: int) -> np.ndarray:
    return np.arange(size) if kept is None else kept


def correct(
    a: torch.Tensor, b: torch.Tensor, difference: torch.Tensor, scale: float, limit: float = LIMIT
) -> torch.Tensor:
    """EMLoC's correction of B.

    Args:
        a: A, (r, inputs).
        b: B, (outputs, r).
        difference: W − Wᴾ, (outputs, inputs).
        scale: LoRA's s.
        limit: Largest mean absolute correction along a direction, relative to the adapter's own.

    Returns:
        B', (outputs, r). With an infinite limit, (W + s B' A) and (Wᴾ + s B A) agree on A's rows.
    """
    left, values, basis = torch.linalg.svd(a, full_matrices=False)
    along = b @ left * values
    change = difference @ basis.T / scale
    size, most = change.abs().mean(0), limit * along.abs().mean(0)
    change = change * torch.where(size > most, most / size.clamp_min(1e-30), 1.0)
    inverse = torch.where(values > 1e-6 * values.max(), 1 / values.clamp_min(1e-30), 0.0)
    return b - change * inverse @ left.T


def _fitted(job: Job, full: Adapter, narrow: Adapter) -> dict[str, Any]:
    if not fittable(full):
        raise LoRAMError(
            "expected LoRA on a projection that lost outputs (such as up_proj or v_proj) to fit, "
            "found none: recover this adapter with zeros"
        )
    base, pruned = job.streams()
    calibration = job.calibration or load_calibration(job.settings, base.checkpoint.folder)
    identity = {
        "adapter": _digest(narrow),
        "plan": job.plan.digest,
        "calibration": calibration.record(),
        "device": job.device,
    }
    with unfinished(job.work, identity) as work:
        stop = max(job.plan.counts) + 1
        walk = Walk(base, work, calibration.tokens, "fitting", stop, job.progress)
        layers = fit(walk, pruned, job.plan, full, narrow)
    return {"calibration": calibration.record(), "layers": layers}


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for name, lora in sorted(adapter.items()):
        digest.update(f"{name} {lora.scale}".encode())
        for matrix in (lora.a, lora.b):
            digest.update(matrix.float().numpy(force=True).tobytes())
    return digest.hexdigest()


FILLS: Mapping[str, Callable[[Job, Adapter, Adapter], dict[str, Any]]] = {
    "normal": _normal,
    "corrected": _corrected,
    "fitted": _fitted,
}
"""How to fill a recovered adapter, in place; each returns what to record."""


def recover_filled(
    adapter: Path,
    settings: FillArgs,
    pruned_model: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """`recover`, with something else than zeros where features were pruned.

    Args:
        adapter: Folder of the adapter as trained.
        settings: What to put there.
        pruned_model: Folder or hub id of the pruned model; by default what the adapter names.
        output: Folder to write, by default `recover.default_output(adapter)`.
        overwrite: Replace what `output` holds.
        progress: Shows how far it is.
        calibration: Text to fit on, by default what `settings` names.

    Returns:
        What `recover` does; "fill" in it says how.

    Raises:
        LoRAMError: Base, pruned model and adapter do not belong together, or cannot be filled.
    """
    read_adapter_config(adapter)
    fill: Filler | None = None
    if settings.fill != "zeros":
        job = _find(settings, pruned_model or named_model(adapter), adapter, progress, calibration)
        fill = job.fill
    return recover(adapter, pruned_model, output, overwrite=overwrite, fill=fill)


def _find(
    settings: FillArgs,
    pruned_model: str,
    adapter: Path,
    progress: Progress,
    calibration: Calibration | None,
) -> Job:
    pruned = find_folder(pruned_model)
    plan = PruningPlan.load(pruned)
    check_fillable(pruned, plan)
    check_pair(pruned, plan, plan.base.id, plan.base.revision)
    base = find_folder(plan.base.id, plan.base.revision)
    work = default_output(adapter).with_name(f"fitting-{adapter.name}")
    return Job(settings, plan, base, pruned, work, progress, calibration)


def check_fillable(pruned: Path, plan: PruningPlan) -> None:
    """Refuse a pruned model that says nothing of the features that were pruned.

    Raises:
        LoRAMError: No units were removed from it, or its weights are in 4 bits.
    """
    if not plan.counts:
        raise LoRAMError(
            f"expected a model that units were removed from, found {pruned} with its layers whole: "
            "its adapter has no pruned features to fill"
        )
    if "quantization_config" in read_json(pruned / "config.json"):
        raise LoRAMError(
            f"expected a pruned model in 16 or 32 bits to fill from, found {pruned} in 4 bits: "
            "give the one it was made from with --pruned-model, or recover with zeros"
        )
