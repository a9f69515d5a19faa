"""The memory of a training run: predicted when it starts, measured when it ends."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.optimizers import optimizer_bytes
from axolotl_loram.memory.predict import GIB, Prediction, assumed, compare, predict
from axolotl_loram.memory.settings import TrainingArgs, settings_of
from axolotl_loram.models.formats import Formats

LOG = logging.getLogger(__name__)


def predict_run(cfg: Mapping[str, Any], plan: PruningPlan, formats: Formats) -> dict[str, Any]:
    """Say and return what a run on a pruned model will take.

    Args:
        cfg: Axolotl's cfg, with its defaults filled in.
        plan: Of the pruned model.
        formats: What its lm_head and embedding are kept in.

    Returns:
        For the run's record: the method, `Prediction` as a dict, and that of all four methods for
        the same settings; empty where a setting is not known to the planner, which is said too.
    """
    method = "qloram" if cfg.get("load_in_4bit") else "loram"
    try:
        kept = {"lm_head_format": formats.lm_head, "embedding_format": formats.embedding}
        run = TrainingArgs.parse(**(settings_of(cfg) | kept))
        prediction = predict(Layout.of(plan.pruned_config), run, method)
        # The other methods take their own default formats: this run's would not be theirs.
        others = compare(plan.config, plan.pruned_config, TrainingArgs.parse(**settings_of(cfg)))
    except LoRAMError as error:
        LOG.warning("the memory of this run is not predicted: %s", error)
        return {}
    LOG.info("memory predicted for %s on a GPU: %s", method, _said(prediction))
    methods = {name: asdict(other) for name, other in others.items()}
    methods[method] = asdict(prediction)
    return {"method": method, **methods[method], "methods": methods}


def correct_prediction(found: dict[str, Any], model: Any, cfg: Mapping[str, Any]) -> None:
    """Put what a model really trains into what `predict_run` returned, and say so if it differs.

    That is asked before the first step, of weights that ZeRO-3 may have sharded.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    shapes = [(tuple(getattr(w, "ds_shape", w.shape)), w.element_size()) for w in trained]
    parameters = sum(math.prod(shape) for shape, _ in shapes)
    lora = sum(math.prod(shape) * size for shape, size in shapes)
    if not found or (parameters, lora) == (found["lora_parameters"], found["lora_bytes"]):
        return
    LOG.warning(
        "%s parameters are trained, not %s as predicted: the record has the true numbers",
        f"{parameters:,}",
        f"{found['lora_parameters']:,}",
    )
    name = settings_of(cfg).get("optimizer", TrainingArgs().optimizer)
    states = sum(optimizer_bytes(name, shape, size) for shape, size in shapes)
    more = 2 * (lora - found["lora_bytes"]) + states - found["optimizer_bytes"]
    moments = {
        moment: size if moment == "loading" else size + more
        for moment, size in found["moments"].items()
    }
    allocated = max(moments.values())
    true = {
        "lora_parameters": parameters,
        "lora_bytes": lora,
        "gradient_bytes": lora,
        "optimizer_bytes": states,
        "moments": moments,
        "allocated_bytes": allocated,
        **assumed(allocated, found["weights_device_bytes"]),
    }
    found |= true
    found["methods"][found["method"]] |= true


def _said(prediction: Prediction) -> str:
    worst = max(prediction.moments, key=prediction.moments.__getitem__)
    return (
        f"{prediction.allocated_bytes / GIB:.2f} GiB allocated at most, at the {worst} (weights "
        f"{prediction.weights_device_bytes / GIB:.2f}, LoRA with gradients and optimizer "
        f"{(2 * prediction.lora_bytes + prediction.optimizer_bytes) / GIB:.2f}); with context and "
        f"slack, which are assumed, {prediction.peak_bytes / GIB:.2f} GiB"
    )


def start_measuring() -> dict[str, Any]:
    """Forget the peak from before training, and return it, where that can be done."""
    import torch

    if not torch.cuda.is_available():
        return {}
    loading = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"max_allocated_before_training_bytes": loading}


def measure_run() -> dict[str, Any]:
    """Say and return the peak since `start_measuring`: on the GPU, or of the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "max_allocated_bytes": torch.cuda.max_memory_allocated(),
            "max_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
        said = "%.2f GiB allocated and %.2f GiB reserved at most on %s"
        sizes = found["max_allocated_bytes"] / GIB, found["max_reserved_bytes"] / GIB
        LOG.info(f"memory measured: {said}", *sizes, found["device"])
        return found
    peak = _peak_rss()
    LOG.info("memory measured: %.2f GiB resident at most (process on a CPU)", peak / GIB)
    return {"device": "cpu", "max_resident_process_bytes": peak}


def _peak_rss() -> int:
    """Peak resident memory of this process since it began, Python and libraries included."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
