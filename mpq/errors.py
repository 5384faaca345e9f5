"""The one exception that a user may see: a sentence that says what was wrong, what was expected and what to do."""

from __future__ import annotations

from mpq.redaction import printable, redact


class MpqError(ValueError):
    """A mistake in the input or the environment, told in one sentence; the CLI prints it and exits with 2.

    Credentials that a library's own message or a URL would bring in are taken out: sentences end up in logs. So are characters
    that would steer the terminal.
    """

    def __init__(self, sentence: str = ""):
        super().__init__(printable(redact(sentence)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised it: torch has a class of error for a GPU's, a text for the CPU's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
