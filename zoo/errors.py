"""The error that this package raises for bad input, and parts of messages."""

LONGEST = 2000


class ZooError(ValueError):
    """Bad input. The message is one line: the field, the value and what is allowed.

    Values in it may come from a damaged file: line breaks become spaces, and the middle of a message of more than `LONGEST`
    characters is omitted.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}")


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message; those of the cause, if torch.compile raised it."""
    error = getattr(error, "inner_exception", error)
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def counted(number: int, noun: str) -> str:
    """Return "1 token", "2 tokens", "2 entries" or "2 passes"."""
    if number != 1:
        noun = noun.removesuffix("y") + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith(("s", "ch")) else "s")
    return f"{number} {noun}"
