"""LoRAM for Axolotl: train LoRA on a pruned model, run it on the original (arXiv 2502.13533)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_loram.api import (
        evaluate,
        export,
        inspect,
        load_pruned,
        plan_memory,
        prune,
        publish,
        recover,
    )
    from axolotl_loram.architecture.plan import PruningPlan
    from axolotl_loram.errors import LoRAMError
    from axolotl_loram.plugin import LoRAMPlugin

__version__ = "0.1.0"
__all__ = [
    "LoRAMError",
    "LoRAMPlugin",
    "PruningPlan",
    "__version__",
    "evaluate",
    "export",
    "inspect",
    "load_pruned",
    "plan_memory",
    "prune",
    "publish",
    "recover",
]

_ELSEWHERE = {
    "LoRAMError": "axolotl_loram.errors",
    "LoRAMPlugin": "axolotl_loram.plugin",
    "PruningPlan": "axolotl_loram.architecture.plan",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts at once (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_ELSEWHERE.get(name, "axolotl_loram.api")), name)
    except ImportError as error:
        # Axolotl drops a plugin whose import raises ImportError, and then trains the original
        # model as if nothing had been asked for: any other error stops it.
        raise RuntimeError(
            f"axolotl_loram.{name} could not be imported ({error}); expected an environment with "
            "axolotl 0.19: install axolotl-loram again, with what it depends on"
        ) from error


def __dir__() -> list[str]:
    """The public names too, before they are imported."""
    return sorted({*globals(), *__all__})
