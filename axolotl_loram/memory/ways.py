"""`plan --compare`: the ways to train LoRA on a model, side by side, with a bound on their speed.

Each way has what it holds (`Way`), what a step computes and moves, and from these a bound: as if a
card did nothing but matrix products at its full rate, read each weight once for each pass, and
carried what has to come over PCIe, all at the same time. The longest of the three is the bound; no
run is faster (but for a clock above the rated one), real ones are slower.

Ways that are not of this package, as read in their code: FSDP2 gathers a layer from all GPUs for
the forward pass and again for the backward pass, and keeps what is outside the layers. ZeRO-3 with
everything offloaded brings each weight from host memory for both passes of each micro-batch, at
least. Axolotl 0.19's `layer_offloading` has the whole model on the device first; then it brings
each layer for both passes (one once more, `tests/memory/test_ways.py` counts its hooks), and copies
it back each time. A streaming trainer (RoundPipe) takes all micro-batches of a step through a layer
while it is there, so that weights come twice in a step, and keeps the layers' inputs in host
memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from axolotl_loram.architecture.config_json import Config, removed_layers
from axolotl_loram.architecture.model import Tensor
from axolotl_loram.architecture.ties import config_of
from axolotl_loram.config_shares import Ratio, spelled
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.cluster import PROCESS_BYTES, weights_of
from axolotl_loram.memory.compute import Flops, training_flops
from axolotl_loram.memory.data import anchor_costs, stored_bytes
from axolotl_loram.memory.gpus import Card, card_of
from axolotl_loram.memory.layout import Layer, Layout, part_of
from axolotl_loram.memory.planner import not_counted, sizes
from axolotl_loram.memory.predict import (
    CONTEXT_BYTES,
    METHODS,
    PRUNED,
    STEPS,
    Prediction,
    assumed,
    largest_step,
    predict,
    pruned_config,
    smallest_ratio,
    storage_of,
)
from axolotl_loram.memory.request import Request
from axolotl_loram.memory.trained import Trained
from axolotl_loram.memory.weights import Storage, weight_bytes
from axolotl_loram.memory.zero import Weight, Zero, held

ZERO3 = Zero(3, optimizer="cpu", parameters="cpu", pinned_optimizer=True, overlaps=True)
"""As deepspeed_configs/zero3_offload_all.json."""
ON_DEVICE = 3
"""Layers that `layer_offloading` has on the device at once: the last, this one and the next."""
AS_WAYS = ("deepspeed", "fsdp", "fsdp_config", "layer_offloading")
"""What a YAML may name that is a way of its own here."""
LEFT_OUT = (
    "kernels below the card's rate, and whatever is no matrix product",
    "the traffic of activations, and of 4 bits that are unpacked",
    "waiting of one for another: all is taken to overlap",
    "the optimizer, reading and preparing data, checkpoints, evaluation",
    "reading from disk (its bytes are given, its speed is not known), and pruning",
    "a host whose memory is slower than PCIe; a clock above the rated one",
)


@dataclass(frozen=True)
class Way:
    """What one way takes.

    Attributes:
        pruning_ratio: Where the model is pruned, at which ratio, if at one.
        device_bytes: Peak of each GPU, context and slack included.
        host_bytes: What host memory has to hold, 2 GiB a process assumed. What the kernel keeps of
            files that were read is not in it.
        disk_bytes: Read of the model before the first step.
        up_bytes: To each GPU over PCIe in a step, `down_bytes` from it.
        weight_bytes: Of weights that each GPU reads from its memory in a step.
        exact: Whether it trains the model itself in 16 bits.
        anchor: What `anchor: base` takes before the first step (`anchor_costs`); empty without.
    """

    name: str
    gpus: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    weight_bytes: int
    flops: Flops
    up_bytes: int = 0
    down_bytes: int = 0
    pruning_ratio: Ratio | None = None
    exact: bool = False
    anchor: dict[str, Any] = field(default_factory=dict)

    def bound(self, card: Card, tokens: int) -> dict[str, float]:
        """Seconds that a step of so many tokens on each GPU takes at least, by what takes them."""
        return {
            "compute": self.flops.total * tokens / (card.tflops * 1e12),
            "memory": self.weight_bytes / (card.bandwidth * 1e9),
            "pcie": max(self.up_bytes, self.down_bytes) / card.pcie_bytes,
        }


def compare_ways(asked: Request, gpu: str, gpus: int) -> dict[str, Any]:
    """All the ways, as JSON, on a card in `CARDS`: one of it, but for FSDP2, which has `gpus`.

    Raises:
        LoRAMError: The card is not known, or the model is not to be had or no language model.
    """
    card = card_of(gpu)
    if gpus < 2:
        raise LoRAMError(f"expected at least 2 GPUs for FSDP2 to shard over, found --gpus {gpus}")
    found = _Ways(asked, card)
    tokens = asked.run.tokens * asked.run.gradient_accumulation_steps
    rows = [_row(way, card, tokens, asked) for way in found.all(gpus)]
    anchor = rows[METHODS.index(asked.adapter)]["anchor"]
    return {
        "model_type": found.config["model_type"],
        "training": asked.run.model_dump(),
        "card": {"name": gpu, "memory_bytes": card.memory_bytes, **asdict(card)},
        "data": asdict(asked.data),
        "step_tokens": tokens,
        **({"anchor": anchor} if anchor else {}),
        "not_counted": [what for what in not_counted(asked, found.config) if what not in AS_WAYS],
        "ways": rows,
        "bound_leaves_out": list(LEFT_OUT),
    }


def _row(way: Way, card: Card, tokens: int, asked: Request) -> dict[str, Any]:
    """A way with its bound."""
    seconds = way.bound(card, tokens)
    slowest = max(seconds, key=seconds.__getitem__)
    speed = way.gpus * tokens / seconds[slowest]
    before = 0.0
    if way.anchor:  # at least: the base's weights come over PCIe once for each part of the data
        computed = way.anchor["flops"] / (card.tflops * 1e12)
        before = max(computed, way.anchor["read_bytes"] / card.pcie_bytes)
    return {
        **asdict(way),
        "flops_per_token": way.flops.total,
        "fits": way.device_bytes <= card.memory_bytes,
        "disk_bytes": way.disk_bytes + way.anchor.get("read_bytes", 0),
        "pcie_bytes": way.up_bytes + way.down_bytes,
        "bound_seconds": seconds,
        "bound_by": slowest,
        "bound_tokens_per_second": speed,
        "bound_hours": (asked.data.trained / speed + before) / 3600,
    }


class _Ways:
    """Makes the rows for one request and card."""

    def __init__(self, asked: Request, card: Card) -> None:
        self.asked, self.run, self.card = asked, asked.run, card
        self.config: Config = (
            sizes(asked)[0] if asked.pruned else config_of(asked.model, asked.revision)
        )
        self.base = Layout.of(self.config)
        self.flops = training_flops(self.run, self.base)
        self.lora, self.qlora = (predict(self.base, self.run, m) for m in ("lora", "qlora"))
        self.model_bytes = stored_bytes(self.base)

    def all(self, gpus: int) -> list[Way]:
        """The rows."""
        whole = {"lora": self.lora, "qlora": self.qlora}
        resident = [self.resident(method, self.base, found) for method, found in whole.items()]
        resident += [self.pruned(method) for method in PRUNED]
        others = (self.fsdp(gpus), self.zero3(), self.layer_offloading(), self.streaming())
        return [*resident, *others]

    def resident(self, method: str, layout: Layout, found: Prediction) -> Way:
        """A model that stays on one GPU."""
        run, storage = self.run, self.storage(method, layout)
        rows = layout.hidden * run.compute_bytes if found.weights_host_bytes else 0
        anchored, upper = self.asked.anchor if method in PRUNED else None, None
        if anchored and removed_layers(sizes(self.asked)[1]):
            upper = layout
        again = bool(anchored) and upper is None
        costs = anchor_costs(self.base, run, self.asked.data, upper) if anchored == "here" else {}
        return Way(
            NAMES[method],
            1,
            found.peak_bytes,
            found.weights_host_bytes + PROCESS_BYTES,
            stored_bytes(layout),
            self.read(layout, storage, anchored=again),
            training_flops(run, layout, again),
            up_bytes=rows * run.tokens * run.gradient_accumulation_steps,
            exact=method == "lora",
            anchor=costs,
        )

    def pruned(self, method: str) -> Way:
        """LoRAM or QLoRAM, at the ratio that is named, or else the smallest that fits."""
        asked, ratio = self.asked, self.asked.pruning.ratio if self.asked.pruning else None
        if asked.budget is not None and asked.pruning is not None:
            ratio = self.fitting(method, asked.budget)
            protected, units = asked.pruning.protected, asked.pruning.kinds
            config = pruned_config(self.config, ratio, protected, units) if ratio else self.config
        else:
            config = sizes(asked)[1]
        layout = Layout.of(config)
        way = self.resident(method, layout, predict(layout, self.run, method))
        disk, storage = way.disk_bytes, self.storage(method, layout)
        if self.run.prequantized:
            packed = weight_bytes(layout, storage)
            disk = packed.on_device + packed.host
        if not asked.pruned and ratio != 0:  # pruning reads the base
            disk += self.model_bytes
        said = "" if ratio is None else f" at {spelled(ratio)}" if ratio else ", nothing to prune"
        return replace(way, name=way.name + said, disk_bytes=disk, pruning_ratio=ratio)

    def fitting(self, method: str, budget: int) -> float:
        """The smallest ratio that fits, or the largest there is."""
        assert self.asked.pruning is not None
        protected, units = self.asked.pruning.protected, self.asked.pruning.kinds
        try:
            return smallest_ratio(self.config, self.run, protected, budget, method, units)
        except LoRAMError:
            return largest_step(self.config, protected, units) / STEPS

    def fsdp(self, gpus: int) -> Way:
        """Layers in 4 bits, sharded; what is outside them is gathered once and stays.

        Where the shards do not fit, they are in host memory (`offload_params`).
        """
        found, storage, run = self.qlora, self.storage("qlora", self.base), self.run
        layers = self.layer_bytes(storage)
        total = sum(layer.count * size for layer, size in layers)
        outside = found.weights_device_bytes - total
        trained = 2 * found.lora_bytes + found.optimizer_bytes
        gathered = 2 * max(size for _, size in layers) + outside
        received = 2 * total * run.gradient_accumulation_steps + outside
        name = f"FSDP2 + QLoRA on {gpus} GPUs"
        device = self.peak(gathered + (total + trained) // gpus, found)
        moved = received * (gpus - 1) // gpus
        host = found.weights_device_bytes  # the first rank has all of it while it loads
        if device > self.card.memory_bytes:
            name, host = f"{name}, offloaded", host + trained
            device, moved = self.peak(gathered, found), received
        return Way(
            name,
            gpus,
            device,
            host + gpus * PROCESS_BYTES,
            self.model_bytes,
            self.read(self.base, storage),
            self.flops,
            up_bytes=moved,
            down_bytes=received * (gpus - 1) // gpus,
        )

    def zero3(self) -> Way:
        """All weights and the optimizer in host memory, in 16 bits, on one GPU."""
        run, found = self.run, self.lora
        frozen = [replace(weight, trained=False) for weight in weights_of(self.base, False)]
        trained = [
            Weight(math.prod(shape), count=count)
            for shape, _, count in Trained.of(run, self.base).shapes()
        ]
        own = held([*frozen, *trained], ZERO3, 1, self.base.hidden, run.compute_bytes, "adamw")
        untied = self.base.lm_head is not None  # of its embedding, a step needs rows alone
        moved = self.model_bytes - (2 * math.prod(self.base.embedding.shape) if untied else 0)
        return Way(
            "ZeRO-3, all offloaded",
            1,
            self.peak(sum(own.device.values()), found),
            sum(own.host.values()) + PROCESS_BYTES,
            self.model_bytes,
            self.read(self.base, self.storage("lora", self.base)),
            self.flops,
            up_bytes=2 * moved * run.gradient_accumulation_steps,
            down_bytes=found.gradient_bytes * run.gradient_accumulation_steps,
            exact=True,
        )

    def layer_offloading(self) -> Way:
        """QLoRA: the packed weights of the layers go to host memory, their scales stay."""
        found, storage, run = self.qlora, self.storage("qlora", self.base), self.run
        moved = [
            (layer.count, sum(_packed(storage, tensor) for tensor in layer.tensors))
            for layer in self.base.layers
        ]
        total, largest = sum(count * size for count, size in moved), max(size for _, size in moved)
        trained = 2 * found.lora_bytes + found.optimizer_bytes
        fixed = found.weights_device_bytes - total + ON_DEVICE * largest + trained
        loading = found.moments["loading"] + CONTEXT_BYTES
        each = (2 * total + largest) * run.gradient_accumulation_steps
        return Way(
            "QLoRA with layer_offloading",
            1,
            max(self.peak(fixed, found), loading),
            total + PROCESS_BYTES,
            self.model_bytes,
            self.read(self.base, storage),
            self.flops,
            up_bytes=each,
            down_bytes=each,
        )

    def streaming(self) -> Way:
        """16 bits in host memory; layers come twice in a step, for all of its micro-batches."""
        run = self.run.model_copy(update={"gradient_checkpointing": True})
        storage, base, c = self.storage("lora", self.base), self.base, run.compute_bytes
        found = self.lora if run == self.run else predict(base, run, "lora")
        head = storage.bytes_of(base.head)
        layers = self.layer_bytes(storage)
        total = sum(layer.count * size for layer, size in layers)
        states = run.tokens * run.gradient_accumulation_steps * base.hidden * c
        inputs = base.depth * states
        two = 2 * max(head, *(size for _, size in layers))
        kept_once = base.depth * run.tokens * base.hidden * c  # they are in host memory
        trained = 2 * found.lora_bytes + found.optimizer_bytes
        return Way(
            "streaming trainer (RoundPipe-like)",
            1,
            self.peak(two + 2 * states - kept_once, found),
            self.model_bytes + trained + inputs + PROCESS_BYTES,
            self.model_bytes,
            self.read(base, storage, passes=3),
            training_flops(run, base),
            up_bytes=2 * total + head + inputs + 2 * found.lora_bytes,
            down_bytes=inputs + found.gradient_bytes,
            exact=True,
        )

    def peak(self, fixed: int, found: Prediction) -> int:
        """With what a step takes beside weights and what is trained, context and slack."""
        trained = 2 * found.lora_bytes + found.optimizer_bytes
        own = found.weights_device_bytes + trained
        step = max(size for name, size in found.moments.items() if name != "loading") - own
        weights = min(fixed + step, fixed - trained)
        return assumed(fixed + step, weights)["peak_bytes"]

    def storage(self, method: str, layout: Layout) -> Storage:
        return storage_of(method, self.run, tied=layout.lm_head is None)

    def layer_bytes(self, storage: Storage) -> list[tuple[Layer, int]]:
        return [(layer, sum(map(storage.bytes_of, layer.tensors))) for layer in self.base.layers]

    def read(
        self, layout: Layout, storage: Storage, passes: int | None = None, anchored: bool = False
    ) -> int:
        """Bytes of weights read in a step: each once a pass, of experts those of one token."""
        passes = (passes or 2 + self.run.gradient_checkpointing) + anchored
        layers = sum(
            layer.count * sum(_seen(layer, tensor, storage) for tensor in layer.tensors)
            for layer in layout.layers
        )
        head = storage.bytes_of(layout.head)
        return self.run.gradient_accumulation_steps * (passes * layers + (2 + anchored) * head)


def _seen(layer: Layer, tensor: Tensor, storage: Storage) -> int:
    size = storage.bytes_of(tensor)
    return size * layer.routed // tensor.shape[0] if part_of(tensor) == "experts" else size


def _packed(storage: Storage, tensor: Tensor) -> int:
    """Bytes of what is a parameter: of 4 bits without their scales."""
    if storage.format_of(tensor) == "nf4":
        return math.ceil(math.prod(tensor.shape) / 2)
    return storage.bytes_of(tensor)


NAMES = {"lora": "LoRA", "qlora": "QLoRA", "loram": "LoRAM", "qloram": "QLoRAM"}
