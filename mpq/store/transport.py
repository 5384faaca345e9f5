"""How bytes travel to and from fsspec file systems: opened, tried again where that helps, failures told in one sentence.

Retrying is done here and nowhere else: the clients' own retries are switched off, because two of them on top of each
other multiply (five attempts of botocore's in each of five of s3fs's took minutes to say that a server is down).
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from mpq.errors import MpqError
from mpq.redaction import redact, without_credentials

log = logging.getLogger("mpq")
T = TypeVar("T")

ATTEMPTS = 7  # waits of up to 0.25, 0.5, 1, 2, 4 and 8 s between them
OBJECT_STORES = {"s3", "s3a", "abfs", "abfss", "az", "adl", "gs", "gcs"}

_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_CODES = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "RequestLimitExceeded",
    "ServerBusy",
    "OperationTimedOut",
    "500",
    "502",
    "503",
    "504",
}
# by name: botocore, aiohttp and azure are there only where their extra is installed
_SPOILT = {"FlexibleChecksumError", "ChecksumError"}
_CONNECTION = {
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ClientConnectionError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ProxyConnectionError",
    "ClientPayloadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "FSTimeoutError",
    *_SPOILT,
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ClientAuthenticationError",
    "ProfileNotFound",
}
_NO_CONTAINER = {"NoSuchBucket", "ContainerNotFound"}
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired"}
# what a disk or this process has run out of, and what helps
_FULL = {
    errno.ENOSPC: "the disk is full; make room, then run again: what is whole is re-used",
    errno.EDQUOT: "your quota there is used up; make room, then run again: what is whole is re-used",
    errno.EROFS: "the file system is mounted read-only; choose another place, or mount it so that it can be written",
    errno.EMFILE: "this process has too many files open; raise its limit (`ulimit -n`)",
    errno.ENFILE: "this machine has too many files open; end what holds them, or raise the limit (`sysctl fs.file-max`)",
    errno.ENAMETOOLONG: "the name is too long for the file system; choose a shorter place",
    errno.EIO: "the disk reports an error of its own; look at the system's log",
    errno.ESTALE: "the network file system has lost it; mount it again",
}


def refuse_credentials(url: str) -> None:
    """Raise MpqError, in a sentence without them, where the URL carries credentials."""
    try:
        without_credentials(url)
    except ValueError as error:
        raise MpqError(str(error)) from None


def absolute(url: str) -> str:
    """The URL itself, of a local path the one that every folder knows it by."""
    return url if "://" in url else Path(url).absolute().as_uri()


def open_filesystem(
    url: str, options: Mapping[str, Any], what: str = "store"
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or local path, and the path in it; sentences call it `what`. Raises MpqError where there is none
    or the URL carries credentials.
    """
    refuse_credentials(url)
    url = absolute(url)
    protocol = url.partition("://")[0]
    options = dict(options)
    if protocol in ("s3", "s3a"):
        own = {
            **fsspec.config.conf.get(protocol, {}).get("config_kwargs", {}),
            **options.get("config_kwargs", {}),
        }
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 1}, **own}
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except (
        Exception
    ) as error:  # file systems are other people's code: their constructors raise what they like
        raise MpqError(
            f"The {what} {url} cannot be opened ({why(error)}): expected an fsspec URL such as file:///data/mpq or s3://bucket/mpq, "
            "credentials from the environment (docs/storage.md)."
        ) from None
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    policy = getattr(
        getattr(getattr(fs, "service_client", None), "_config", None), "retry_policy", None
    )
    if policy is not None:  # Azure's waits 15 s before its first second attempt
        policy.total_retries = 0
    return fs, str(root).rstrip("/")


def carry(operation: Callable[[], T], url: str, doing: str, what: str = "store") -> T:
    """Run one operation on what lies at `url`, trying again with backoff where that helps.

    Sentences call it `what` and say that it cannot be `doing`: "read" or "written".

    Raises FileNotFoundError where a file is not there, MpqError for everything else that stays wrong.
    """
    try:
        for attempt in Retrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.25, max=8),
            stop=stop_after_attempt(_attempts()),
            before_sleep=lambda state: _log_retry(state, f"{what} {url}"),
            reraise=True,
        ):
            with attempt:
                return operation()
    except FileNotFoundError as error:
        if not _codes(error) & _NO_CONTAINER:
            raise
        raise _sentence(error, url, doing, what) from None
    except MpqError:
        raise
    except Exception as error:
        raise _sentence(error, url, doing, what) from None
    raise AssertionError("tenacity ends in a result or an exception")


def read_file(url: str, what: str) -> bytes:
    """The bytes of the file at a URL or path; sentences call it `what`.

    Raises FileNotFoundError where it is not there, MpqError where it cannot be read or the URL carries credentials.
    """
    fs, path = open_filesystem(url, {}, what)
    return carry(lambda: bytes(fs.cat_file(path)), url, "read", what)


def _attempts() -> int:
    given = os.environ.get("MPQ_STORE_ATTEMPTS", str(ATTEMPTS))
    if not given.isdecimal() or not int(given):
        raise MpqError(
            f"MPQ_STORE_ATTEMPTS is {given!r}: expected how often an operation on the store is tried, 1 or more."
        )
    return int(given)


def _log_retry(state: RetryCallState, place: str) -> None:
    error = state.outcome.exception() if state.outcome else None
    seconds = state.next_action.sleep if state.next_action else 0.0
    log.warning(
        "The %s answers with %s: trying again in %.1f s",
        place,
        why(error) if error else "nothing",
        seconds,
    )


def is_passing(error: BaseException) -> bool:
    """Whether a failure may pass: connections refused, reset or cut short, time-outs, 5xx and slow-down answers."""
    for cause in _chain(error):
        if isinstance(cause, FileNotFoundError | PermissionError | MpqError):
            return False
        if status := _status(cause):
            return status in _TRY_AGAIN or bool(_codes_of(cause) & _CODES)
        if isinstance(cause, ConnectionError | TimeoutError | EOFError | http.client.HTTPException):
            return True
        if _names(cause) & _CONNECTION:
            return True
    return False


def why(error: BaseException) -> str:
    """The failure in one line, without credentials."""
    told = redact(" ".join(str(error).split("\n", 1)[0].split())).rstrip(". ")
    return (told if len(told) <= 200 else told[:199] + "…") or type(error).__name__


def advice_of(error: BaseException) -> str:
    """What helps where a disk or this process has run out of something; "" where that is not what is wrong."""
    known = (_FULL[c.errno] for c in _chain(error) if isinstance(c, OSError) and c.errno in _FULL)
    return next(known, "")


def _sentence(error: BaseException, url: str, doing: str, what: str) -> MpqError:
    local = url.startswith("file:") or "://" not in url
    if known := advice_of(error):
        advice = known
    elif _codes(error) & _SKEWED:
        advice = "this machine's clock differs from the service's; set it right (date -u)"
    elif _codes(error) & _NO_CONTAINER:
        advice = "there is no such bucket or container; create it first, or correct the URL"
    elif not local and any(
        isinstance(c, PermissionError) or _status(c) in (401, 403) or _names(c) & _NO_CREDENTIALS
        for c in _chain(error)
    ):
        advice = "access is refused; check that the credentials in the environment or profile may read, list and write there (docs/storage.md)"
    elif any(_names(c) & _SPOILT for c in _chain(error)):
        advice = f"tried {_attempts()} times; what arrives is not what its checksum is of, so look at what lies between (a proxy, the network)"
    elif is_passing(error):
        advice = f"tried {_attempts()} times; check that the service is reachable, then run again: what is whole is re-used"
    else:
        advice = f"check that it exists and that you may {'write to' if doing == 'written' else 'read'} it"
    return MpqError(f"The {what} {url} cannot be {doing} ({why(error)}): {advice}.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from: s3fs wraps botocore's, sometimes only as the context."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int:
    """The HTTP status that an exception carries, 0 for none: botocore's, azure's, aiohttp's or gcsfs's."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return 0


def _codes_of(error: BaseException) -> set[str]:
    response = getattr(error, "response", None)
    code = (
        response.get("Error", {}).get("Code")
        if isinstance(response, dict)
        else getattr(error, "error_code", None)
    )
    return {str(getattr(code, "value", code))} if code else set()


def _codes(error: BaseException) -> set[str]:
    return set().union(*(_codes_of(cause) for cause in _chain(error)))
