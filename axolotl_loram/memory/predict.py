"""Memory of a training run, predicted from configs alone: what each method takes, and what fits.

Everything is bytes on one device that holds the whole model. The weights are exact; LoRA weights,
their gradients and the optimizer's states too; activations are what PyTorch keeps for transformers'
and PEFT's code (`activations`). The CUDA context and the allocator's slack are assumptions until
they are measured on a GPU, and so is, with them, the peak.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from axolotl_loram.architecture.config_json import Config
from axolotl_loram.architecture.counts import keep_counts
from axolotl_loram.architecture.model import Tensor, changed, config_changes
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.activations import Activations
from axolotl_loram.memory.layout import Layout, Part
from axolotl_loram.memory.optimizers import optimizer_bytes
from axolotl_loram.memory.settings import TrainingArgs
from axolotl_loram.memory.trained import Trained
from axolotl_loram.memory.weights import BLOCK, FLOAT32, Format, Storage, weight_bytes

GIB = 2**30
METHODS = ("lora", "qlora", "loram", "qloram")
PRUNED = ("loram", "qloram")
CONTEXT_BYTES = 512 * 2**20
"""Assumed, not measured: what CUDA, cuBLAS and the kernels take before the first tensor."""
SLACK = 0.08
"""Assumed, not measured: what the allocator holds in gaps, as a share of all but the weights."""
STEPS = 1000
"""`smallest_ratio` looks at pruning ratios in steps of 1/1000."""


@dataclass(frozen=True)
class Prediction:
    """Bytes that one method takes. Activations and logits are not at their highest at once.

    Attributes:
        weights_device_bytes: Weights and their quantization states on the device.
        weights_host_bytes: Weights that stay in host memory.
        weights: Those on the device by part.
        lora_parameters: Trained parameters.
        lora_bytes: Their weights.
        gradient_bytes: Their gradients.
        optimizer_bytes: The optimizer's states.
        activation_bytes: Activations, where most of them are there at once.
        logits_bytes: What lm_head and the loss take.
        loading_bytes: What loading takes besides the weights, before there is anything else.
        context_bytes: CUDA context (assumed).
        slack_bytes: Gaps that the allocator holds (assumed).
        moments: What PyTorch has allocated in all at "loading", at the "loss", and in the backward
            pass of the "layer" that takes most.
        allocated_bytes: Peak of what PyTorch allocates, without context and slack.
        peak_bytes: Peak on the device.
    """

    weights_device_bytes: int
    weights_host_bytes: int
    weights: Mapping[Part, int]
    lora_parameters: int
    lora_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logits_bytes: int
    loading_bytes: int
    context_bytes: int
    slack_bytes: int
    moments: Mapping[str, int]
    allocated_bytes: int
    peak_bytes: int


def storage_of(method: str, run: TrainingArgs, tied: bool) -> Storage:
    """How a method stores its weights: `lm_head_format` and `embedding_format` are for pruned ones.

    `embeddings_skip_upcast` leaves both as PEFT casts them in a 4-bit model: in float32.
    """
    four_bit = method.startswith("q")
    native: Format = "float32" if four_bit and run.skips_upcast else "native"
    head, embedding = run.formats(four_bit, tied) if method in PRUNED else (native, native)
    linears: Format = "nf4" if four_bit else "native"
    if method == "lora" and run.load_in_8bit:  # LoRAM has no 8-bit form
        linears = "int8"
    packed = run.quantize_experts or (run.prequantized and method == "qloram")
    return Storage(
        linears=linears,
        lm_head=native if head == "native" else head,
        embedding=native if embedding == "native" else embedding,
        native=run.compute_bytes,
        block=run.block_size if method in PRUNED else BLOCK,
        experts=linears if packed else "native",
        double=run.double_quant,
    )


def predict(layout: Layout, run: TrainingArgs, method: str) -> Prediction:
    """What training a model by one of `METHODS` takes; `layout` is the base's for lora and qlora.

    Raises:
        LoRAMError: PEFT would refuse the targets of LoRA, or find none of them.
    """
    storage = storage_of(method, run, tied=layout.lm_head is None)
    weights = weight_bytes(layout, storage)
    trained = Trained.of(run, layout)
    shapes = [(shape, math.prod(shape), size, count) for shape, size, count in trained.shapes()]
    parameters = sum(values * count for _, values, _, count in shapes)
    lora = sum(values * size * count for _, values, size, count in shapes)
    states = sum(
        count * optimizer_bytes(run.optimizer, shape, size) for shape, _, size, count in shapes
    )
    live = Activations(run, storage, trained.rank).moments(trained.layout, parameters)
    fixed = weights.on_device + 2 * lora + states
    moments = {name: fixed + sum(moment) for name, moment in live.items()}
    loading = upcast_bytes(layout, run, storage)
    moments["loading"] = weights.on_device + loading
    allocated = max(moments.values())
    return Prediction(
        weights_device_bytes=weights.on_device,
        weights_host_bytes=weights.host,
        weights=weights.device,
        lora_parameters=parameters,
        lora_bytes=lora,
        gradient_bytes=lora,
        optimizer_bytes=states,
        activation_bytes=max(activations for activations, _ in live.values()),
        logits_bytes=max(logits for _, logits in live.values()),
        loading_bytes=loading,
        moments=moments,
        allocated_bytes=allocated,
        **assumed(allocated, weights.on_device),
    )


def assumed(allocated: int, weights: int) -> dict[str, int]:
    """What is assumed beside the bytes allocated, `weights` among them, and the peak with it."""
    slack = round(SLACK * (allocated - weights))
    peak = allocated + slack + CONTEXT_BYTES
    return {"context_bytes": CONTEXT_BYTES, "slack_bytes": slack, "peak_bytes": peak}


def upcast_bytes(layout: Layout, run: TrainingArgs, storage: Storage) -> int:
    """Bytes that loading takes besides the weights as they are stored in training.

    Embedding and lm_head come onto the device in the compute dtype (unless the checkpoint has them
    in 4 bits), and are put into smaller formats there. What stays native of them, Axolotl makes
    float32, one after the other, and turns back (`ModelLoader._configure_embedding_dtypes`).
    """
    stored = weight_bytes(layout, storage).device
    both: dict[Part, tuple[Tensor, Format]] = {"embedding": (layout.embedding, storage.embedding)}
    if layout.lm_head is not None and not (run.prequantized and storage.lm_head == "nf4"):
        both["lm_head"] = (layout.lm_head, storage.lm_head)
    values = {part: math.prod(tensor.shape) for part, (tensor, _) in both.items()}
    native = [values[part] for part, (_, form) in both.items() if form == "native"]
    arriving = sum(values.values()) * run.compute_bytes
    upcast = sum(native) * FLOAT32
    if native and run.precision == "bf16":
        upcast += max(native) * run.compute_bytes
    upcast += sum(stored[part] for part, (_, form) in both.items() if form != "native")
    return max(0, max(arriving, upcast) - sum(stored[part] for part in both))


def compare(
    base: Config, pruned: Config, run: TrainingArgs, methods: Collection[str] = METHODS
) -> dict[str, Prediction]:
    """Methods side by side, by default all four."""
    layouts = {True: Layout.of(pruned), False: Layout.of(base)}
    return {method: predict(layouts[method in PRUNED], run, method) for method in methods}


Units = Collection[str] | None
"""Kinds of unit to remove; None for all but the optional ones."""


def pruned_config(
    config: Config, ratio: float, protected: tuple[int, int], units: Units = None
) -> dict[str, Any]:
    """The config of `config`'s model pruned at a uniform ratio."""
    return changed(config, config_changes(config, keep_counts(config, ratio, *protected, units)))


def smallest_ratio(
    config: Config,
    run: TrainingArgs,
    protected: tuple[int, int],
    budget: int,
    method: str,
    units: Units = None,
) -> float:
    """The smallest pruning ratio, in steps of 1/1000, at which a run fits; 0 where it does whole.

    Args:
        config: The base's config.
        run: Settings of the run.
        protected: Layers that stay whole at the start and the end.
        budget: Bytes on the device.
        method: "loram" or "qloram".
        units: Kinds of unit to remove.

    Raises:
        LoRAMError: No ratio fits; the message says what the largest ratio leaves, by part.
    """
    if predict(Layout.of(config), run, method).peak_bytes <= budget:
        return 0.0

    def at(step: int) -> Prediction:
        narrow = pruned_config(config, step / STEPS, protected, units)
        return predict(Layout.of(narrow), run, method)

    most = largest_step(config, protected, units)
    floor = at(most)
    if floor.peak_bytes > budget:
        raise LoRAMError(_no_ratio(budget, method, most / STEPS, floor))
    # Peaks fall as ratios rise.
    fits = bisect_left(range(1, most), True, key=lambda step: at(step).peak_bytes <= budget)
    return (1 + fits) / STEPS


def largest_step(config: Config, protected: tuple[int, int], units: Units) -> int:
    """The largest ratio, in steps, that leaves every layer a unit of each kind."""

    def is_too_large(step: int) -> bool:
        try:
            keep_counts(config, step / STEPS, *protected, units)
        except LoRAMError:
            return True
        return False

    most = bisect_left(range(1, STEPS), True, key=is_too_large)
    if not most:
        keep_counts(config, 1 / STEPS, *protected, units)  # says what is wrong with the model
    return most


def _no_ratio(budget: int, method: str, ratio: float, floor: Prediction) -> str:
    parts = {"weights": floor.weights_device_bytes}
    if max(floor.moments, key=floor.moments.__getitem__) == "loading":
        parts["embeddings while loading"] = floor.loading_bytes
    else:
        parts["LoRA with gradients and optimizer"] = 2 * floor.lora_bytes + floor.optimizer_bytes
        parts["activations and logits"] = floor.allocated_bytes - sum(parts.values())
    parts["context and slack (assumed)"] = floor.context_bytes + floor.slack_bytes
    listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
    return (
        f"expected a pruning ratio at which {method} fits {budget / GIB:.4g} GiB, found none: at "
        f"the largest, {ratio}, it takes {floor.peak_bytes / GIB:.2f} GiB ({listed}): lower "
        "--sequence-len or --micro-batch-size, turn on --gradient-checkpointing, choose "
        "--cross-entropy cut or smaller formats, or a larger GPU"
    )
