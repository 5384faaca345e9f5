"""The one exception that a user may see: a sentence that says what was wrong, what was expected and what to do."""

from __future__ import annotations

from importlib.util import find_spec

from mpq.redaction import printable, redact

# what is installed by an extra alone: module → extra
EXTRAS = {
    "prefect": "pipeline",
    "gurobipy": "gurobi",
    "datasets": "datasets",
    "matplotlib": "figures",
    "lm_eval": "eval",
    "s3fs": "s3",
    "adlfs": "azure",
    "prefect_dask": "dask",
    "prefect_ray": "ray",
    "compressed_tensors": "export",
    "torchao": "torchao",
}


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
        or any(said in str(error) for said in ("DefaultCPUAllocator", "Cannot allocate memory"))
    )


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing_extra(module: str, what: str = "this") -> MpqError:
    """The sentence for a module that an extra of mpq would install; `what` needs it."""
    return MpqError(
        f"{module} is not installed, which {what} needs: pip install 'mpq[{EXTRAS[module]}]'."
    )


def require(module: str, what: str) -> None:
    """Raise MpqError, naming the extra to install, unless the module is there. Nothing is loaded."""
    if find_spec(module) is None:
        raise missing_extra(module, what)
