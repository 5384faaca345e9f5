"""Credentials kept out of sight: what a secret looks like in a URL or a message, and the text without it.

Credentials come by the means of the storage's own ecosystem (environment, profiles, fsspec's configuration); a URL that
carries some is refused, because URLs end up in plans, reports, run records and Prefect's database.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

HIDDEN = "***"

# scheme://user:password@host; a port is none, nor is the `::` of a chained URL, nor abfs' container@account
_USERINFO = re.compile(r"://[^\s/:@]*:(?!:|\d+(?:/|$))[^\s@]*@(?:[^\s/@]*@)*")
# https://token@host and s3://key@bucket: no password, but no mere name either, as it is in ssh://user@host; what is before the @
# is a container in abfs, and in hf://org/name@revision it is behind the host
_SECRET_USER = r"(?:[hH][tT][tT][pP][sS]?|[sS]3[aA]?)://"
_TOKEN = re.compile(rf"({_SECRET_USER})[^\s/?#:@]+@(?:[^\s/?#@]*@)*")
_NAME = (
    r"(?:sig|sas|key|pwd?|auth|"
    r"[\w.-]*(?:secret|passw|token|signature|credential|access_?key|account_?key|api_?key|[-_]key)[\w.-]*)"
)
_PARAMETER = re.compile(rf"((?:^|[?&;,\s'\"(]){_NAME}=)([^&;,\s'\")]+)", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|ACCESS_KEY|ACCOUNT_KEY|API_KEY|CONNECTION_STRING|AUTH_STRING|SAS",
    re.IGNORECASE,
)
_SECRET_FIELD = re.compile(
    r"\"[^\"]*(?:secret|key|token|passw|connection_string)[^\"]*\"\s*:\s*\"([^\"]+)\"",
    re.IGNORECASE,
)
# C0 and C1 without \t and \n; marks that turn the direction of reading; surrogates, which no encoding takes
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SHORTEST = 8  # a shorter value is as likely a word of the message


def has_credentials(url: str) -> bool:
    """Whether a URL carries a password (`user:password@`), a token or key as the user, or a parameter that is one of these or a
    signature."""
    query = url.partition("://")[2].partition("?")[2]  # a `?` before is no URL's
    in_front = _USERINFO.search(url) or _TOKEN.search(url)
    return bool(in_front or (query and _PARAMETER.search("?" + query)))


def without_credentials(url: str) -> str:
    """The URL itself. Raises ValueError, in a sentence without them, where it carries credentials."""
    if has_credentials(url):
        raise ValueError(
            f"The URL {redact(url)} carries credentials: give them by the environment, a profile or fsspec's configuration "
            "(docs/storage.md), and the URL without them."
        )
    return url


def _any_case(pattern: str) -> str:
    return re.sub(r"(?<!\\)[a-z]", lambda found: f"[{found[0]}{found[0].upper()}]", pattern)


# what `without_credentials` takes, in the dialect of JSON schemas, which is JavaScript's as well: no flags
PUBLIC_PATTERN = (
    rf"^(?![\s\S]*{_USERINFO.pattern})(?![\s\S]*{_TOKEN.pattern})"
    rf"(?![\s\S]*://[^?]*\?(?:[\s\S]*[?&;,\s'\"(])?{_any_case(_NAME)}=[^&;,\s'\")])"
)


def redact(text: str) -> str:
    """The text with passwords, keys and signatures in URLs, and the environment's secret values, replaced by ***."""
    for value in sorted(_environment(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(f"://{HIDDEN}@", text)
    text = _TOKEN.sub(rf"\1{HIDDEN}@", text)
    return _PARAMETER.sub(rf"\1{HIDDEN}", text)


def printable(text: str) -> str:
    """The text as a terminal may be given it: control and bidirectional characters, and halves of pairs, as `\\x1b` and the like.

    Names of files and models are other people's: an escape sequence in one would move the cursor or recolour the screen.
    Line breaks and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _environment() -> Iterator[str]:
    """The values that the environment's names say are secret."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and not name.upper().endswith(("_FILE", "_ID")):
            parts = [
                value,
                *(part.partition("=")[2] for part in value.split(";") if "key=" in part.lower()),
            ]
            yield from (part for part in parts if len(part) >= _SHORTEST)
        if name.startswith("FSSPEC_"):
            yield from (found for found in _SECRET_FIELD.findall(value) if len(found) >= _SHORTEST)
