"""What every stage shares: its key, caching by content, the store, a readable name. A stage itself is a pure function.

A stage takes references and plain values and returns {kind: table or (bytes, suffix)}. Wrapped, it becomes a Prefect task that
is cached by the store alone, which knows the entries on any machine and beside any server. A batch is a stage of many entries of
one kind.

A stage's key is the content of everything that goes into it, plus the code that it runs through (store/code.py). A stage that
depends on less says so where it is defined: `free` names inputs that decide how something is computed and not what, `key` says in
full what counts.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed

from mpq.errors import MpqError
from mpq.store.code import code_version
from mpq.store.entries import Damaged, Store, TableRef, content_key

References = dict[str, TableRef]
Output = Mapping[str, "pl.DataFrame | tuple[bytes, str]"]
# flow: beside the flow, on its own threads; workers: anywhere; accelerator: where one is free, and alone on it
On = Literal["flow", "workers", "accelerator"]

# Prefect warns at each task that a limit on its time cannot interrupt one blocking call: true, and ours are many short ones
logging.getLogger("prefect.task_runs").addFilter(
    lambda record: not str(record.msg).startswith("Timeout of %s seconds configured")
)


@dataclass(frozen=True)
class Stage:
    """A function as a stage: what it is called, what it writes, where it runs, and what its key holds."""

    name: str
    kinds: tuple[str, ...]
    task: Task[..., References]
    compute: Callable[..., Any]
    on: On
    free: frozenset[str]
    content: Callable[..., Any] | None

    def key(self, inputs: Mapping[str, Any]) -> str:
        """The key of its entries for these inputs."""
        if self.content:
            content = self.content(**inputs)
        else:
            content = {name: value for name, value in inputs.items() if name not in self.free}
        return _key(self.kinds, content, self.compute)


def _key(kinds: Sequence[str], content: Any, compute: Callable[..., Any]) -> str:
    return content_key(kinds, content_of(content), code_version(compute))


def content_of(value: Any) -> Any:
    """What of a value counts in a key: of a reference the hash of its data, of what has a `content` that, of the rest all."""
    if isinstance(value, TableRef):
        return value.sha256
    if hasattr(value, "content"):
        return content_of(value.content)
    if isinstance(value, Mapping):
        return {str(name): content_of(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [content_of(part) for part in value]
    return value


def _check_unchanged(inputs: Mapping[str, Any]) -> None:
    """Raise MpqError where an input that can change while it is used says that it did: what was computed is of something else."""
    for value in inputs.values():
        if hasattr(value, "check_unchanged"):
            value.check_unchanged()


class _Stored(Exception):
    """The stage that is running is in the store already."""

    def __init__(self, found: dict[str, TableRef | None]):
        super().__init__("stored")
        self.found = found


_ask: ContextVar[Callable[[], None] | None] = ContextVar("ask", default=None)


@contextmanager
def _asking(ask: Callable[[], None]) -> Iterator[None]:
    # a function, since tasks go to workers by value and a context variable cannot
    token = _ask.set(ask)
    try:
        yield
    finally:
        _ask.reset(token)


def stop_if_stored() -> None:
    """Inside a stage that has waited: end it here if another run has stored its tables meanwhile."""
    if ask := _ask.get():
        ask()


def stage(
    *kinds: str,
    name: str = "",
    on: On = "flow",
    free: Sequence[str] = (),
    key: Callable[..., Any] | None = None,
    reads_files: bool = False,
    **options: Any,
) -> Callable[[Callable[..., Output]], Stage]:
    """Make a stage that writes `kinds` from a function that computes them.

    Its task is called with the key, the store's URL, a label for people and the function's own arguments as `inputs`; it
    returns a reference for each kind. With `reads_files` what `key` says is of files that others may write to: it is asked
    again before anything is stored. `options` are Prefect's.
    """
    content = key

    def wrap(compute: Callable[..., Output]) -> Stage:
        @functools.wraps(compute, assigned=_NAMES, updated=())
        def run(key: str, store: str, label: str, inputs: dict[str, Any]) -> Any:
            where, log = Store(store), get_run_logger()

            def stop_if_stored() -> None:
                found = {kind: where.find(kind, key) for kind in kinds}
                if all(found.values()):
                    raise _Stored(found)

            try:
                stop_if_stored()
                log.info("%s: computing", label)
                with _asking(stop_if_stored):
                    output = compute(**inputs)
                _check_unchanged(inputs)
                if reads_files and content and _key(kinds, content(**inputs), compute) != key:
                    raise MpqError(
                        f"What {label} reads changed while it was read: run it again for what is there now."
                    )
                # of two runs that measured the same thing, both go on with what was stored first
                stop_if_stored()
            except _Stored as stored:
                log.info("%s: reused from %s", label, store)
                return Completed(name="Cached", message="Reused from the store", data=stored.found)
            upstream = _upstream(inputs)
            return {kind: _write(where, kind, key, output[kind], upstream, label) for kind in kinds}

        made = _task(run, compute.__name__, options)
        of = name or compute.__name__.replace("_", " ")
        return Stage(of, kinds, made, compute, on, frozenset(free), content)

    return wrap


def batch(
    kind: str, name: str = "", on: On = "accelerator", **options: Any
) -> Callable[[Callable[..., Iterator[tuple[str, pl.DataFrame]]]], Stage]:
    """Make a stage that computes many entries of one `kind`, each stored under a key of its own as soon as it is there.

    How entries are spread over tasks is in no entry's key, and whatever ends a task, what it had done stays. `inputs` has
    `wanted`, which maps the entries' keys to what is to be computed. The function gets these, a question `missing(key)` to ask
    before each one (another run may have stored it meanwhile), and yields (key, table). The task returns a reference for each key.
    """

    def wrap(compute: Callable[..., Iterator[tuple[str, pl.DataFrame]]]) -> Stage:
        @functools.wraps(compute, assigned=_NAMES, updated=())
        def run(key: str, store: str, label: str, inputs: dict[str, Any]) -> Any:
            where, log = Store(store), get_run_logger()
            found, computed = dict[str, TableRef](), 0

            def missing(entry: str) -> bool:
                if entry not in found and (ref := where.find(kind, entry)):
                    found[entry] = ref
                return entry not in found

            for entry, frame in compute(**inputs, missing=missing):
                _check_unchanged(inputs)
                computed += 1
                if missing(entry):  # of two runs, both go on with what was stored first
                    found[entry] = _write(where, kind, entry, frame, _upstream(inputs), label)
            reused = len(inputs["wanted"]) - computed
            log.info("%s: %d computed, %d reused from %s", label, computed, reused, store)
            if computed:
                return {entry: found[entry] for entry in inputs["wanted"]}
            return Completed(name="Cached", message="Reused from the store", data=found)

        made = _task(run, compute.__name__, options)
        of = name or compute.__name__.replace("_", " ")
        return Stage(of, (kind,), made, compute, on, frozenset(), lambda wanted, **_: list(wanted))

    return wrap


def folder(
    there: Callable[..., bool],
    name: str = "",
    on: On = "flow",
    free: Sequence[str] = (),
    **options: Any,
) -> Callable[[Callable[..., None]], Stage]:
    """Make a stage that writes a folder outside of the store: nothing is done while `there(key, **inputs)`.

    The function gets its key to leave in the folder. `free` and `options` are as in `stage`.
    """

    def wrap(compute: Callable[..., None]) -> Stage:
        @functools.wraps(compute, assigned=_NAMES, updated=())
        def run(key: str, store: str, label: str, inputs: dict[str, Any]) -> Any:
            log = get_run_logger()
            if there(key, **inputs):
                log.info("%s: there already", label)
                return Completed(name="Cached", message="There already", data={})
            log.info("%s: computing", label)
            compute(key=key, **inputs)
            return {}

        made = _task(run, compute.__name__, options)
        return Stage(name or compute.__name__, (), made, compute, on, frozenset(free), None)

    return wrap


_NAMES = ("__name__", "__qualname__", "__doc__", "__module__")


def _task(run: Callable[..., Any], name: str, options: dict[str, Any]) -> Task[..., References]:
    del run.__wrapped__  # type: ignore[attr-defined]
    return task(
        name=name,
        task_run_name="{label}",
        # Prefect unpickles a result file that says so, and whoever may write there would run code here: the store knows all of it
        persist_result=False,
        cache_policy=NO_CACHE,
        retry_condition_fn=is_worth_a_retry,
        **options,
    )(run)


def is_worth_a_retry(task: Any, task_run: Any, state: Any) -> bool:
    """A user's mistake stays one however often it is tried."""
    try:
        state.result()
    except MpqError:
        return False
    except Exception:
        return True
    return False


def _references(value: Any) -> list[TableRef]:
    if isinstance(value, TableRef):
        return [value]
    if isinstance(value, Mapping):
        return [ref for v in value.values() for ref in _references(v)]
    if isinstance(value, list | tuple):
        return [ref for v in value for ref in _references(v)]
    return []


def _upstream(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ref.key for ref in _references(inputs)))


def _write(
    store: Store, kind: str, key: str, data: Any, upstream: tuple[str, ...], label: str
) -> TableRef:
    more: dict[str, Any] = {"upstream": upstream, "provenance": {"stage": label}}
    if isinstance(data, pl.DataFrame):
        return store.write_table(kind, key, data, **more)
    return store.write_bytes(kind, key, *data, **more)


def read(ref: TableRef) -> pl.DataFrame:
    """The table behind a reference."""
    return Store(ref.store).read_table(ref)


def read_together(refs: Sequence[TableRef]) -> pl.DataFrame:
    """The tables behind references as one; columns that only some have are null in the others."""
    return pl.concat([read(ref) for ref in refs], how="diagonal_relaxed")


def read_json(ref: TableRef) -> Any:
    """The JSON behind a reference."""
    return json.loads(Store(ref.store).read_bytes(ref))


__all__ = [
    "Damaged",
    "On",
    "Output",
    "References",
    "Stage",
    "batch",
    "content_of",
    "folder",
    "read",
    "read_json",
    "read_together",
    "stage",
    "stop_if_stored",
]
