"""The one exception that users see."""

from __future__ import annotations


class LoRAMError(ValueError):
    """Wrong input: one sentence that says what was expected, what was found, and what to do.

    Not an ImportError and not an OSError, so no caller up the stack swallows it.
    """


def not_finite(name: str) -> LoRAMError:
    """The error for a stored weight that holds a NaN or an infinity."""
    return LoRAMError(
        f"expected finite weights, found NaN or infinity in {name}: the base model is damaged"
    )
