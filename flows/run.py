"""One run of a flow: its spec, its model, where its tasks run, and an account of what was computed and what re-used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from prefect import Task
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from mpq.devices import resolve
from mpq.errors import MpqError
from mpq.flows.place import Place, placed
from mpq.spec import EvaluationSpec, Objective, ObjectiveSpec, RunSpec, TextSpec, resolved
from mpq.store.entries import Damaged, Store
from mpq.store.transport import absolute
from mpq.tasks.checkpoint import Architecture, Weights, source_of
from mpq.tasks.device import timed_name
from mpq.tasks.progress import tracked
from mpq.tasks.stage import References, Stage
from mpq.tasks.timing import made_with

# what sets a task apart from its stage's others → its inputs
Calls = Mapping[str, Mapping[str, Any]]
Account = tuple[str, int, int, float]  # stage, tasks, of them cached, seconds
Listener = Callable[[str, int, int, float], None]

# a machine's tasks share its device one at a time anyway, and each thread would get an OpenMP team of its own
one_by_one: Any = ThreadPoolTaskRunner(max_workers=1)

_listener: Listener | None = None
_reader: Callable[[str], None] | None = None


@contextmanager
def listening(listener: Listener, reader: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` of each stage that ends in this process, `reader` what flows have to say: flow parameters must be
    plain data, a callback is none."""
    global _listener, _reader
    _listener, _reader = listener, reader
    try:
        yield
    finally:
        _listener = _reader = None


def announce(text: str) -> None:
    """Say something to whoever watches the flow: in its log, and on the terminal where it was started from one."""
    get_run_logger().info(text)
    if _reader:
        _reader(text)


@dataclass
class Subject:
    """The model of a run as its tasks get it. What is asked of the checkpoint is asked once."""

    spec: RunSpec
    place: Place

    @cached_property
    def folder(self) -> Path:
        """The checkpoint's files on this machine."""
        from mpq.models.checkpoint import fetch

        model = self.spec.model
        return fetch(model.path, model.revision, model.trust_remote_code)

    @cached_property
    def weights(self) -> Weights:
        """The model to be loaded, by the content of its files."""
        from mpq.models.checkpoint import check_unchanged, fingerprint, marks

        model, before = self.spec.model, marks(self.folder)
        content = fingerprint(self.folder, model.check_weights)
        check_unchanged(self.folder, before)
        here = Path(self._source).is_dir()  # a copy elsewhere has marks of its own
        return Weights(
            self._source,
            content,
            model.base,
            model.device,
            before if here else (),
            model.trust_remote_code,
            None if model.memory_gb is None else int(model.memory_gb * 1e9),
        )

    @cached_property
    def architecture(self) -> Architecture:
        """The model to be timed, on the kind of device that tasks run on."""
        from mpq.models.architecture import architecture_key
        from mpq.models.checkpoint import load_config

        model = self.spec.model
        engine, threads = self.spec.timing.engine, self.spec.timing.threads_on(model.device)
        name = self.place.ask(timed_name, model.device, threads, engine)
        made = made_with(model.device, str(name), engine)
        trusted = model.trust_remote_code
        key = architecture_key(load_config(self.folder, trusted))
        return Architecture(self._source, key, model.base, model.device, made, trusted)

    @cached_property
    def stored(self) -> dict[str, str]:
        """Op → how the checkpoint stores its weight, of those that are stored quantized."""
        from mpq.models.checkpoint import load_config
        from mpq.models.stored import stored_formats

        config = load_config(self.folder, self.spec.model.trust_remote_code)
        return stored_formats(self.folder, config)

    @property
    def _source(self) -> str:
        model = self.spec.model
        return source_of(model.path, model.revision, self.folder, self.place.shared)


@dataclass
class Run:
    """What the stages of a flow share. `one` and `map` submit tasks, wait for all of them, and account for them.

    `objectives` are what is solved for, all of the spec's by default; `formats` those of the sensitivity table, where the
    spec names fewer; with `evaluating` off, plans are solved only. With `only`, stages of other names must be in the store
    already: asked to compute one, it raises MpqError.
    """

    subject: Subject
    objectives: Mapping[Objective, ObjectiveSpec]
    formats: tuple[str, ...]
    evaluating: bool = True
    only: frozenset[str] | None = None
    unwritable: MpqError | None = None  # why the store takes nothing, where it only gives
    done: list[Account] = field(default_factory=list)

    @property
    def spec(self) -> RunSpec:
        """What was asked for."""
        return self.subject.spec

    @property
    def place(self) -> Place:
        """Where tasks run."""
        return self.subject.place

    @property
    def weights(self) -> Weights:
        """The model to be loaded."""
        return self.subject.weights

    @property
    def architecture(self) -> Architecture:
        """The model to be timed."""
        return self.subject.architecture

    @property
    def held_out(self) -> EvaluationSpec:
        """How plans are evaluated; on the calibration text where the spec does not say."""
        text = self.spec.calibration.model_dump(include=set(TextSpec.model_fields))
        return self.spec.evaluation or EvaluationSpec(**text)

    def one(self, stage: Stage, name: str = "", **inputs: Any) -> References:
        """Run a stage of one task; `name` is the stage's own if left out."""
        return self.map(stage, {"": inputs}, name)[0]

    def map(self, stage: Stage, calls: Calls, name: str = "") -> list[References]:
        """Run a stage of many tasks; a failure is raised once the others have ended, so their work is kept."""
        name, start = name or stage.name, time.perf_counter()
        if self.only is not None and name not in self.only:
            return self._stored(stage, calls, name, start)
        if self.unwritable:
            raise self.unwritable
        task, store = self._timed(stage.task), self.spec.store
        futures = []
        for detail, inputs in calls.items():
            inputs = dict(inputs)
            parameters = {"key": stage.key(inputs), "store": store, "inputs": inputs}
            label = self._label(name, detail)
            futures.append(self.place.submit(task, {**parameters, "label": label}, stage.on))
        with tracked(name) if len(futures) > 1 else nullcontext(_nowhere) as progress:
            for done, future in enumerate(futures, 1):
                future.wait()
                progress(done, len(futures))
        results = [self.place.result(future) for future in futures]
        ended = zip(futures, results, strict=True)
        cached = sum(f.state.name == "Cached" for f, result in ended if isinstance(result, dict))
        self._account(name, len(futures), cached, start)
        for detail, result in zip(calls, results, strict=True):
            if isinstance(result, BaseException):
                raise self._explained(result, self._label(name, detail))
        return cast(list[References], results)

    def _label(self, name: str, detail: str) -> str:
        """What a task is called, `sensitivity my-model shard 2/4`."""
        return " ".join(part for part in (name, self.spec.title, detail) if part)

    def _timed(self, task: Task[..., References]) -> Task[..., References]:
        limit = self.spec.runner.timeout_s
        return task.with_options(timeout_seconds=limit) if limit else task

    def _explained(self, error: BaseException, label: str) -> BaseException:
        if type(error).__name__ != "TaskRunTimeoutError":
            return error
        return MpqError(
            f"{label} took longer than {self.spec.runner.timeout_s:g} s: look at what the device is busy with, "
            "or raise runner.timeout_s in the spec."
        )

    def _stored(self, stage: Stage, calls: Calls, name: str, start: float) -> list[References]:
        store = Store(self.spec.store)
        found = []
        for detail, inputs in calls.items():
            key = stage.key(dict(inputs))
            refs = {kind: store.find(kind, key) for kind in stage.kinds}
            if not all(refs.values()):
                raise self.unwritable or MpqError(
                    f"The store {self.spec.store} has no table for {self._label(name, detail)}: "
                    "run calibrate with this spec first."
                )
            found.append(refs)
        self._account(name, len(calls), len(calls), start)
        return cast(list[References], found)

    def _account(self, name: str, tasks: int, cached: int, start: float) -> None:
        account = (name, tasks, cached, time.perf_counter() - start)
        get_run_logger().info("%s: %d of %d tasks cached, %.1f s", name, cached, tasks, account[3])
        self.done.append(account)
        if _listener:
            _listener(*account)


def _nowhere(done: int, total: int) -> None:
    """Progress of a stage of one task, which shows its own."""


@contextmanager
def running(
    spec: RunSpec,
    *,
    solving: Objective | None = None,
    formats: tuple[str, ...] = (),
    evaluating: bool = True,
    timing: bool | None = None,
    only: frozenset[str] | None = None,
) -> Iterator[Run]:
    """A run of `spec`, on its cluster where it names one. A store that can only be read serves what is in it.

    `solving` is the one objective to solve for, all of them by default; `timing` says whether an accelerator is needed, which
    an objective et does. Raises MpqError where the store can be neither written nor read, or the cluster not be reached.
    """
    # a run's record is read from other folders too
    spec = spec.model_copy(update={"store": absolute(spec.store)})
    unwritable = None
    try:
        Store(spec.store).check()
    except MpqError as error:
        only, unwritable = frozenset(), error
    objectives = {k: v for k, v in spec.objectives.items() if solving in (None, k)}
    timed = "et" in spec.objectives if timing is None else timing
    with placed(spec.runner, spec.model.device, timed) as place:
        spec = resolved(spec, lambda device: place.ask(resolve, device))
        run = Run(
            Subject(spec, place), objectives, formats or spec.formats, evaluating, only, unwritable
        )
        try:
            yield run
        except Damaged as damage:  # found when it was asked for, gone or spoilt since
            raise MpqError(
                f"A table of this run is not in {spec.store} any more as it was found ({damage}): run it again, which computes it anew."
            ) from None
