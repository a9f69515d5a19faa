"""`plan --stage align`: what aligning a pruned model takes of each GPU and each node under ZeRO.

Full-parameter training: weights, gradients and optimizer as `zero` says; activations as autograd
keeps them where the weights themselves are trained. Nothing here was measured on a GPU; the
assumed parts are named so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_loram.architecture.model import Tensor
from axolotl_loram.config import PruningArgs
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.activations import FLOAT32, Activations
from axolotl_loram.memory.gpus import that_hold
from axolotl_loram.memory.layout import Layer, Layout, part_of
from axolotl_loram.memory.planner import sizes
from axolotl_loram.memory.predict import GIB, assumed
from axolotl_loram.memory.request import Request, options_of, read_yaml
from axolotl_loram.memory.settings import TrainingArgs, settings_of
from axolotl_loram.memory.weights import Storage
from axolotl_loram.memory.zero import Held, Weight, Zero, held, read_zero
from axolotl_loram.tables import columns, lines

PROCESS_BYTES = 2 * GIB
"""Assumed, not measured on a GPU: host memory of a rank's Python, PyTorch and CUDA."""
TRANSIENT = ("gathered weights", "largest gradient")
"""What a rank has no more when its optimizer steps."""


@dataclass(frozen=True)
class AlignRequest:
    """An alignment to be planned, on `nodes` machines of `gpus` GPUs, and so ranks, each."""

    model: Request
    zero: Zero
    nodes: int
    gpus: int
    train_lm_head: bool


def is_alignment(model: str, stage: str | None) -> bool:
    """Whether `plan` is asked for alignment: by `--stage`, or else by an Axolotl YAML."""
    if stage is None and model.endswith((".yml", ".yaml")):
        return (read_yaml(Path(model)).get("loram") or {}).get("stage") == "align"
    return stage == "align"


def align_request(
    model: str,
    revision: str | None,
    options: Mapping[str, Any],
    deepspeed: str | None,
    nodes: int = 1,
    gpus: int = 1,
) -> AlignRequest:
    """From a model, or from an Axolotl YAML of an alignment; arguments as `request.request`'s.

    There is a DeepSpeed config beside, by default what the YAML names, and GPUs of each node.

    Raises:
        LoRAMError: A number is below 1, or there is no (valid) DeepSpeed config.
    """
    for name, number in {"--nodes": nodes, "--gpus-per-node": gpus}.items():
        if number < 1:
            raise LoRAMError(f"expected {name} of at least 1, found {number}")
    pruning, training = options_of(options)
    cfg = read_yaml(Path(model)) if model.endswith((".yml", ".yaml")) else {}
    file = deepspeed or cfg.get("deepspeed")
    if not isinstance(file, str):
        raise LoRAMError(
            "expected a DeepSpeed config with --stage align, found none: give --deepspeed FILE, "
            "such as deepspeed_configs/zero3_offload_optimizer.json"
        )
    base = str(cfg.get("base_model") or model)
    revision = revision or cfg.get("revision_of_model")
    run = TrainingArgs.parse(**(settings_of(cfg) if cfg else {}) | training)
    asked = Request(
        base,
        revision,
        PruningArgs.parse(**pruning).resolve() if pruning else None,
        None if pruning else (base, revision),
        run,
        "loram",
    )
    head = bool((cfg.get("loram") or {}).get("train_lm_head"))
    return AlignRequest(asked, read_zero(Path(file)), nodes, gpus, head)


class FullActivations(Activations):
    """Activations where the weights themselves are trained, without autocast (DeepSpeed's bf16)."""

    def moments(self, layout: Layout, lora_parameters: int = 0) -> dict[str, tuple[int, int]]:
        """As with LoRA, but that the first norm is trained too."""
        found = super().moments(layout, lora_parameters)
        if self.run.gradient_checkpointing:
            return found
        first = self.run.tokens * (layout.hidden + 1) * FLOAT32
        return {name: (kept + first, logits) for name, (kept, logits) in found.items()}

    def outside_bytes(self, layout: Layout) -> int:
        """What the last norm's own weight needs, besides."""
        return (
            super().outside_bytes(layout) + self.run.tokens * layout.hidden * self.run.compute_bytes
        )

    def _lora(self, layer: Layer) -> int:
        """Bytes per token of the inputs of linear modules, one for all that read the same."""
        inputs = {
            tensor.module.split(".")[-2] + str(tensor.dims[1]): tensor for tensor in layer.linears
        }
        return sum(
            tensor.shape[1] * self.run.compute_bytes
            for tensor in inputs.values()
            if not self._is_kept(layer, tensor)
        )

    def _norm(self, tensor: Tensor, layer: Layer) -> int:
        """The norm's own weight needs what it multiplies, too."""
        kept = super()._norm(tensor, layer)
        values = kept // FLOAT32 - 1 if kept else 0
        return kept + values * self.run.compute_bytes


def weights_of(layout: Layout, train_lm_head: bool) -> list[Weight]:
    """A model's parameters, as `zero` counts them; of tied embeddings both are the lm_head."""
    head = layout.lm_head or layout.embedding
    return [
        Weight(
            math.prod(tensor.shape),
            trained=train_lm_head or tensor != head,
            decays=part_of(tensor) not in ("norms", "biases"),
            count=count,
        )
        for tensor, count in layout.tensors
    ]


def align_plan(asked: AlignRequest) -> dict[str, Any]:
    """Bytes per GPU and per node.

    Raises:
        LoRAMError: The model is not to be had, or a buffer for NVMe is too small.
    """
    _, pruned, counted = sizes(asked.model)
    layout, run, zero = Layout.of(pruned), asked.model.run, asked.zero
    ranks = asked.nodes * asked.gpus
    weights = weights_of(layout, asked.train_lm_head)
    found = held(weights, zero, ranks, layout.hidden, run.compute_bytes, run.optimizer)
    return {
        **counted,
        "stage": "align",
        "nodes": asked.nodes,
        "gpus_per_node": asked.gpus,
        "trained_parameters": sum(w.values * w.count for w in weights if w.trained),
        "training": run.model_dump(include=SETTINGS),
        "deepspeed": asdict(zero) | zero.settled(layout.hidden),
        "gpu": _device(layout, run, found),
        "node": _node(layout, asked, found),
    }


SETTINGS = {
    *("sequence_len", "micro_batch_size", "optimizer", "gradient_checkpointing"),
    *("attention", "cross_entropy", "precision"),
}


def _device(layout: Layout, run: TrainingArgs, found: Held) -> dict[str, Any]:
    """One GPU: parts, moments and peak."""
    count = FullActivations(without_lora(run), Storage(native=run.compute_bytes))
    live = count.moments(layout)
    fixed = sum(found.device.values())
    moments = {name: fixed + sum(moment) for name, moment in live.items()}
    lasting = sum(size for name, size in found.device.items() if name not in TRANSIENT)
    moments["step"] = lasting + found.step
    allocated = max(moments.values())
    beside = assumed(allocated, found.device.get("weights", 0))
    return {
        "parts": found.device,
        "activation_bytes": max(kept for kept, _ in live.values()),
        "logits_bytes": max(logits for _, logits in live.values()),
        "step_bytes": found.step,
        "moments": moments,
        "allocated_bytes": allocated,
        **beside,
        "fits": that_hold(beside["peak_bytes"]),
    }


def without_lora(run: TrainingArgs) -> TrainingArgs:
    """The run without what only LoRA has: its kernels, its dropout, its float32 weights."""
    return run.model_copy(
        update={"fused_kernels": False, "lora_dropout": 0.0, "lora_float32": False}
    )


def _node(layout: Layout, asked: AlignRequest, found: Held) -> dict[str, Any]:
    """One node: host memory and disk. The first has the files that only the first rank writes."""
    compute, ranks = asked.model.run.compute_bytes, asked.gpus
    host = {name: size * ranks for name, size in found.host.items()}
    host["processes (assumed)"] = PROCESS_BYTES * ranks
    stored = sum(math.prod(tensor.shape) * count for tensor, count in layout.tensors) * compute
    stacked = compute * sum(
        math.prod(tensor.shape) * count
        for tensor, count in layout.tensors
        if part_of(tensor) == "experts"
    )
    return {
        "host": host,
        "host_bytes": sum(host.values()),
        "host_rounding_bytes": found.rounded_bytes * ranks,
        "loading": {"page_cache_bytes": stored, "stacked_experts_bytes": stacked},
        "disk": {name: size * ranks for name, size in found.disk.items()},
        "disk_bytes": sum(found.disk.values()) * ranks,
        "checkpoint_bytes": {
            "first_node": found.checkpoint * ranks + found.checkpoint_first,
            "other_nodes": found.checkpoint * ranks,
        },
    }


def align_report(result: Mapping[str, Any]) -> str:
    """What `align_plan` returns, for people."""
    gpu, node = result["gpu"], result["node"]
    structured = ("training", "deepspeed", "gpu", "node")
    counted = lines({name: value for name, value in result.items() if name not in structured})
    training = ", ".join(f"{name} {value}" for name, value in result["training"].items() if value)
    device = {
        **gpu["parts"],
        "activations": gpu["activation_bytes"],
        "logits": gpu["logits_bytes"],
        "float32 gradients in the step": gpu["step_bytes"],
        "CUDA context (assumed)": gpu["context_bytes"],
        "allocator slack (assumed)": gpu["slack_bytes"],
        "peak": gpu["peak_bytes"],
    }
    host = {**node["host"], "in all": node["host_bytes"]}
    host["page-locked buffers rounded up, at most"] = node["host_rounding_bytes"]
    disk = {**node["disk"], "a checkpoint: first node": node["checkpoint_bytes"]["first_node"]}
    disk["a checkpoint: each other node"] = node["checkpoint_bytes"]["other_nodes"]
    loading = {
        "page cache (given back when needed)": node["loading"]["page_cache_bytes"],
        "stacked experts, on the first rank": node["loading"]["stacked_experts_bytes"],
    }
    tables = {
        "each GPU, GiB": device,
        "host memory of each node, GiB": host,
        "host memory while loading, first node, GiB": loading,
        "disk of each node, GiB": disk,
    }
    fits = f"fits: {', '.join(gpu['fits']) or 'none of the GPUs that are known'}"
    return "\n\n".join([counted, training, *map(_table, tables, tables.values()), fits, NOTE])


NOTE = (
    "Weights, gradients and optimizer are exact; gathered weights, activations and logits are not "
    "at their\nhighest at once, nor is the step: the peak is the worst moment. Nothing here was "
    "measured on a GPU."
)


def _table(title: str, parts: Mapping[str, int]) -> str:
    shown = {name: [f"{size / GIB:.2f}"] for name, size in parts.items() if size}
    return columns({title: [""], **shown})
