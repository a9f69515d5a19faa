"""LoRAM for Axolotl: train LoRA on a pruned model, run it on the original (arXiv 2502.13533)."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LoRAMArgs", "LoRAMPlugin", "__version__"]

_LAZY = {"LoRAMPlugin": "axolotl_loram.plugin", "LoRAMArgs": "axolotl_loram.config"}


def __getattr__(name: str) -> Any:
    """Import the plugin on first use, so that the command line starts without torch (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_LAZY[name]), name)
    except ImportError as error:
        # Axolotl drops a plugin whose import raises ImportError, and then trains the original
        # model as if nothing had been asked for: any other error stops it.
        raise RuntimeError(
            f"axolotl_loram.{name} could not be imported ({error}); expected an environment with "
            "axolotl 0.19: install axolotl-loram again, with what it depends on"
        ) from error
