"""The error that this package raises for bad input."""


class ZooError(ValueError):
    """Bad input. The message is one line: the field, the value and what is allowed."""
