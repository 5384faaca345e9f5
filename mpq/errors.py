"""The one exception that a user may see: a sentence that says what was wrong, what was expected and what to do."""

from __future__ import annotations

from mpq.redaction import redact


class MpqError(ValueError):
    """A mistake in the input or the environment, told in one sentence; the CLI prints it and exits with 2.

    Credentials that a library's own message or a URL would bring in are taken out: sentences end up in logs.
    """

    def __init__(self, sentence: str = ""):
        super().__init__(redact(sentence))
