"""What DeepSpeed's ZeRO holds where: bytes per rank on the device, in host memory and on disk.

Pure arithmetic, read in DeepSpeed 0.18.9 (`runtime/zero/stage3.py`, `stage_1_and_2.py`,
`runtime/swap_tensor`). c is the bytes of a weight in the computation (2 in bf16, 4 in float32); the
master weights, the states and the gradients that the optimizer reads are float32. Per trained
parameter of a rank's share:

* weights c; stage 1 and 2 hold all weights on every device;
* master weights 4 (none under stage 3 in float32 without offload), AdamW's moments 8;
* accumulated gradients c (or `data_types.grad_accum_dtype`), which an offloaded optimizer moves to
  host memory, also where its states are on NVMe;
* float32 gradients 4: with the optimizer offloaded they stay in host memory (on NVMe: on disk);
  without, they are there for one sub-group at a time, during the step.

Frozen parameters take c and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from axolotl_loram.errors import LoRAMError
from axolotl_loram.files.untrusted import check_types, read_json
from axolotl_loram.memory.optimizers import optimizer_bytes

FLOAT32 = 4
DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
PLACES = ("none", "cpu", "nvme")
ALIGNMENT = 2
"""Stage 1 and 2 pad a group of parameters to a multiple of so many values for each rank."""


@dataclass(frozen=True)
class Weight:
    """`count` parameters that are alike; the Trainer groups them by whether weight decays."""

    values: int
    trained: bool = True
    decays: bool = True
    count: int = 1


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed config says of ZeRO; numbers of values where a name says no bytes.

    "auto" stands for what transformers fills in, from the hidden size.
    """

    stage: int
    optimizer: str = "none"
    parameters: str = "none"
    pinned_optimizer: bool = False
    reduce_bucket: int | None = None
    prefetch_bucket: int | None = None
    persistent_below: int | None = None
    live: int = 10**9
    sub_group: int = 10**9
    overlaps: bool = False
    gradient_bytes: int | None = None
    optimizer_buffers: int = 4
    parameter_buffers: int = 5
    parameter_buffer: int = 10**8
    parameters_in_host: int = 10**9

    def settled(self, hidden: int) -> dict[str, int]:
        """Sizes with "auto" filled in as transformers 5.16 does."""
        auto = {
            "reduce_bucket": hidden * hidden,
            "prefetch_bucket": int(0.9 * hidden * hidden),
            "persistent_below": 10 * hidden,
        }
        named = {name: getattr(self, name) for name in auto}
        return {name: auto[name] if value is None else value for name, value in named.items()}


def read_deepspeed(named: Any) -> dict[str, Any]:
    """A DeepSpeed configuration: of a file or a link to one, or as Axolotl has it in memory.

    Raises:
        LoRAMError: There is no such file, or it holds something else.
    """
    if isinstance(named, str | os.PathLike):
        return read_json(Path(named), linked=True)
    return dict(named.to_dict() if hasattr(named, "to_dict") else named or {})


def zero_stage(named: Any) -> int:
    """The stage of ZeRO that such a configuration (or None) asks for; 0 without one.

    Raises:
        LoRAMError: As `read_deepspeed`.
    """
    section = read_deepspeed(named).get("zero_optimization")
    stage = section.get("stage") if isinstance(section, Mapping) else 0
    return int(stage) if isinstance(stage, int) else 0


def read_zero(file: Path) -> Zero:
    """What a DeepSpeed config file says of ZeRO.

    Raises:
        LoRAMError: There is no such file, it is no DeepSpeed config, or it partitions nothing.
    """
    config = read_deepspeed(file)
    section = config.get("zero_optimization")
    if not isinstance(section, dict):
        raise LoRAMError(
            f"expected {file} to be a DeepSpeed config with zero_optimization, found none: give "
            "one such as deepspeed_configs/zero3.json"
        )
    nested = (dict, type(None))
    check_types(section, dict.fromkeys(("offload_optimizer", "offload_param"), nested), file)
    check_types(config, {"data_types": nested}, file)
    return zero_of(section, config.get("data_types") or {}, str(file))


def zero_of(section: Mapping[str, Any], data_types: Mapping[str, Any], file: str) -> Zero:
    """`zero_optimization` of a DeepSpeed config, with DeepSpeed's defaults.

    Raises:
        LoRAMError: The stage is 0 or unknown, or it offloads what or where DeepSpeed does not.
    """
    stage = section.get("stage", 0)
    if stage not in (1, 2, 3):
        raise LoRAMError(
            f"expected zero_optimization.stage 1, 2 or 3 in {file}, found {stage!r}: without ZeRO "
            "every GPU holds everything, and `plan` needs no DeepSpeed config"
        )
    optimizer, parameters = (
        section.get(f"offload_{what}") or {} for what in ("optimizer", "param")
    )
    places = tuple(str(what.get("device", "none")) for what in (optimizer, parameters))
    for what, place in zip(("optimizer", "param"), places, strict=True):
        least = 3 if what == "param" or place == "nvme" else 1
        if place not in PLACES or (place != "none" and stage < least):
            raise LoRAMError(
                f"expected offload_{what} to none, cpu or nvme (parameters, and anything to nvme, "
                f"under stage 3 only), found {place} under stage {stage} in {file}"
            )
    accumulated = data_types.get("grad_accum_dtype")
    return Zero(
        stage,
        optimizer=places[0],
        parameters=places[1],
        pinned_optimizer=bool(optimizer.get("pin_memory")),
        reduce_bucket=_size(section, "reduce_bucket_size", 5 * 10**8),
        prefetch_bucket=_size(section, "stage3_prefetch_bucket_size", 5 * 10**7),
        persistent_below=_size(section, "stage3_param_persistence_threshold", 10**5),
        live=_number(section, "stage3_max_live_parameters", 10**9),
        sub_group=_number(section, "sub_group_size", 10**9),
        overlaps=bool(section.get("overlap_comm", stage == 3)),
        gradient_bytes=DTYPES.get(str(accumulated)) if accumulated else None,
        optimizer_buffers=_number(optimizer, "buffer_count", 4),
        parameter_buffers=_number(parameters, "buffer_count", 5),
        parameter_buffer=_number(parameters, "buffer_size", 10**8),
        parameters_in_host=_number(parameters, "max_in_cpu", 10**9),
    )


def _size(section: Mapping[str, Any], name: str, default: int) -> int | None:
    return None if section.get(name) == "auto" else _number(section, name, default)


def _number(section: Mapping[str, Any], name: str, default: int) -> int:
    """A number of a DeepSpeed config, where 1e9 is a usual way to write one."""
    value = section.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise LoRAMError(
            f"expected a number as {name} in the DeepSpeed config, found {value!r:.80}: correct it"
        )
    return int(value)


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds, by what they are.

    Attributes:
        device: On the device, all through a step.
        step: On the device besides, while the optimizer steps.
        host: In host memory.
        pinned: Page-locked buffers among those in host memory, each.
        disk: In NVMe files.
        checkpoint: In the rank's own files of a checkpoint; `checkpoint_first` in those that only
            the first rank writes.
    """

    device: dict[str, int] = field(default_factory=dict)
    step: int = 0
    host: dict[str, int] = field(default_factory=dict)
    pinned: tuple[int, ...] = ()
    disk: dict[str, int] = field(default_factory=dict)
    checkpoint: int = 0
    checkpoint_first: int = 0

    @property
    def rounded_bytes(self) -> int:
        """Bytes that PyTorch adds where it rounds page-locked buffers up to a power of two."""
        return sum(2 ** math.ceil(math.log2(size)) - size for size in self.pinned if size)


def share(weights: Iterable[Weight], stage: int, ranks: int) -> int:
    """Values of one rank's share: of every parameter (stage 3), or of each group of them."""
    weights = list(weights)
    if stage == 3:
        return sum(math.ceil(weight.values / ranks) * weight.count for weight in weights)
    groups = [
        sum(weight.values * weight.count for weight in weights if weight.decays == decays)
        for decays in (True, False)
    ]
    return sum(math.ceil(group / (ALIGNMENT * ranks)) * ALIGNMENT for group in groups)


def held(
    weights: Iterable[Weight], zero: Zero, ranks: int, hidden: int, compute: int, optimizer: str
) -> Held:
    """What one rank holds of the model, its gradients and its optimizer.

    Args:
        weights: The model's parameters.
        zero: What the DeepSpeed config says.
        ranks: GPUs in all.
        hidden: Hidden size, which "auto" sizes follow.
        compute: Bytes of a weight in the computation.
        optimizer: By Axolotl's name; an offloaded one is DeepSpeed's own Adam in float32.
    """
    weights = list(weights)
    own = share([weight for weight in weights if weight.trained], zero.stage, ranks)
    states = optimizer_bytes(optimizer if zero.optimizer == "none" else "adamw_torch", (own,))
    rank = _Rank(weights, zero, ranks, hidden, compute, own, states)
    found = rank.stage3() if zero.stage == 3 else rank.stage12()
    total = compute * _values(weights)
    first = total if zero.stage == 3 else 2 * total  # DeepSpeed keeps the weights once more
    frozen = [weight for weight in weights if not weight.trained]
    fragments = compute * share(frozen, 3, ranks) if zero.stage == 3 else 0
    ours = own * FLOAT32 + states + fragments
    return replace(found, checkpoint=ours, checkpoint_first=first)


def _values(weights: Iterable[Weight]) -> int:
    return sum(weight.values * weight.count for weight in weights)


@dataclass(frozen=True)
class _Rank:
    """One of the ranks: as `held`, with the values of its share and bytes of their states."""

    weights: list[Weight]
    zero: Zero
    ranks: int
    hidden: int
    compute: int
    own: int
    states: int

    @property
    def accumulated(self) -> int:
        """Bytes of an accumulated gradient."""
        return self.zero.gradient_bytes or self.compute

    @property
    def largest_gradient(self) -> int:
        """Bytes of the gradient of the largest trained weight."""
        return self.compute * max(weight.values for weight in self.weights if weight.trained)

    @property
    def optimizer(self) -> dict[str, int]:
        """What an optimizer keeps wherever it is."""
        return {"master weights": FLOAT32 * self.own, "optimizer": self.states}

    def stage12(self) -> Held:
        """Every device holds all weights; gradients (stage 2) and the optimizer are partitioned."""
        zero, own, compute, largest = self.zero, self.own, self.compute, self.largest_gradient
        padding = self.ranks * own - _values(weight for weight in self.weights if weight.trained)
        buckets = zero.settled(self.hidden)["reduce_bucket"] * (2 if zero.overlaps else 1)
        device = {
            "weights": compute * (_values(self.weights) + padding),
            "buckets": compute * buckets,
            "largest gradient": largest,
        }
        if zero.optimizer == "none":
            partitioned = own if zero.stage == 2 else own * self.ranks
            both = self.accumulated + compute  # accumulated, and a micro-batch's
            device |= {"gradients": both * partitioned, **self.optimizer}
            return Held(device, step=(self.accumulated + FLOAT32) * own)
        device["buffer of one gradient"] = largest
        host = self.optimizer | {
            "gradients": (FLOAT32 + self.accumulated) * own,
            "copy of the weights": compute * own,
            "buffer of one gradient": largest,
        }
        pinned = (FLOAT32 * own, FLOAT32 * own, compute * own, largest)
        return Held(device, host=host, pinned=pinned if zero.pinned_optimizer else ())

    def stage3(self) -> Held:
        """Weights are partitioned too, and gathered from all ranks for the modules that run."""
        zero, own, compute, weights = self.zero, self.own, self.compute, self.weights
        sizes, largest = zero.settled(self.hidden), max(weight.values for weight in weights)
        kept = _values(weight for weight in weights if weight.values <= sizes["persistent_below"])
        gathered = min(_values(weights), max(zero.live, largest + sizes["prefetch_bucket"]))
        device = {
            "weights kept whole": compute * kept,
            "gathered weights": compute * gathered,
            "bucket": compute * sizes["reduce_bucket"],
            "largest gradient": self.largest_gradient,
        }
        host: dict[str, int] = {}
        disk: dict[str, int] = {}
        pinned: list[int] = []
        if zero.parameters == "cpu":
            pinned.append(compute * own)  # DeepSpeed locks it whatever pin_memory says
        if zero.parameters == "nvme":
            check_buffer(zero, largest, self.ranks)
            buffers = compute * zero.parameter_buffers * zero.parameter_buffer
            trained = compute * min(own, zero.parameters_in_host)
            host |= {"weights": trained, "buffers of weights": buffers}
            pinned += [buffers, trained]
        place = {"none": device, "cpu": host, "nvme": disk}
        place[zero.parameters]["weights"] = compute * share(weights, 3, self.ranks)
        accumulated = self.accumulated * own
        group = min(own, zero.sub_group + math.ceil(largest / self.ranks))
        if zero.optimizer == "none":
            device |= {"gradients": accumulated, **self.optimizer}
            if compute == FLOAT32 and zero.parameters == "none":
                device["master weights"] = 0
            step = (self.accumulated + FLOAT32) * group
            return Held(device, step, host, tuple(pinned), disk)
        host["accumulated gradients"] = accumulated
        place[zero.optimizer] |= self.optimizer | {"gradients": FLOAT32 * own}
        if zero.optimizer == "nvme":
            host["buffers of the optimizer"] = FLOAT32 * zero.optimizer_buffers * group
            pinned += [FLOAT32 * group] * zero.optimizer_buffers
        elif zero.pinned_optimizer:
            pinned.append(FLOAT32 * own)
        if zero.pinned_optimizer:
            pinned.append(accumulated)
        return Held(device, host=host, pinned=tuple(pinned), disk=disk)


def check_buffer(zero: Zero, largest: int, ranks: int) -> None:
    """Refuse a buffer for parameters on NVMe that the largest share of one does not fit into."""
    needed = math.ceil(largest / ranks)
    if zero.parameter_buffer < needed:
        raise LoRAMError(
            f"expected offload_param.buffer_size of at least {needed:,}, a rank's share of the "
            f"largest weight ({largest:,} values), found {zero.parameter_buffer:,}: raise it"
        )
