"""The one exception that users see, and its kind for wrong settings."""

from __future__ import annotations

LONGEST = 1000
"""Characters of a sentence."""


class LoRAMError(ValueError):
    """Wrong input: one sentence that says what was expected, what was found, and what to do.

    Not an ImportError and not an OSError, so no caller up the stack swallows it. Values from files
    may be part of it: line breaks become spaces, and what is very long is shortened in the middle.
    """

    def __init__(self, sentence: str) -> None:
        line = " ".join(sentence.split())
        super().__init__(line if len(line) < LONGEST else f"{line[:600]} … {line[-200:]}")


class WrongUse(LoRAMError):
    """A setting that does not exist or is not allowed, found before any work began."""


def not_finite(name: str) -> LoRAMError:
    """The error for a stored weight that holds a NaN or an infinity."""
    return LoRAMError(
        f"expected finite weights, found NaN or infinity in {name}: the base model is damaged"
    )
