"""The memory of a training run: predicted when it starts, measured when it ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from axolotl_loram.architecture.plan import PruningPlan
from axolotl_loram.errors import LoRAMError
from axolotl_loram.memory.layout import Layout
from axolotl_loram.memory.predict import GIB, Prediction, compare, predict
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
    methods = {name: other.as_dict() for name, other in others.items()}
    methods[method] = prediction.as_dict()
    return {"method": method, **methods[method], "methods": methods}


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
