"""The one exception that a user may see: a sentence that says what was wrong, what was expected and what to do."""

from __future__ import annotations


class MpqError(ValueError):
    """A mistake in the input or the environment, told in one sentence; the CLI prints it and exits with 2."""
