"""The one exception that users see."""


class LoRAMError(ValueError):
    """Wrong input: one sentence that says what was expected, what was found, and what to do.

    Not an ImportError and not an OSError, so no caller up the stack swallows it.
    """
