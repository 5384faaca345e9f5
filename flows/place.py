"""Where the tasks of a flow run: beside it, or on the workers of a Dask cluster, one accelerator a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from prefect import Task
from prefect.futures import PrefectFuture

from mpq.errors import MpqError
from mpq.spec import RunnerSpec
from tasks.device import identity

# flow: beside the flow, on its own threads; workers: anywhere; accelerator: where one is free, and alone on it
On = Literal["flow", "workers", "accelerator"]
ACCELERATOR = {"accel": 1}  # what a worker offers with `dask worker --resources accel=1`


class Place:
    """The flow's own machine: every task goes to the flow's task runner, questions are answered here."""

    shared = False  # whether a path of this machine may mean nothing where tasks run

    def submit(self, task: Task[..., Any], parameters: dict[str, Any], on: On) -> PrefectFuture[Any]:
        """Start a task; the future is Prefect's."""
        future: PrefectFuture[Any] = task.submit(**parameters)
        return future

    def result(self, future: PrefectFuture[Any]) -> Any:
        """What the task returned, or the exception that ended it."""
        try:
            return future.result()
        except Exception as error:
            return error

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` says where the device is."""
        return function(*args)


class DaskPlace(Place):
    """A Dask cluster: long tasks spread over its workers, short ones stay beside the flow."""

    shared = True

    def __init__(self, runner: Any, device: str, accelerators: list[str]):
        self._runner, self._device, self._accelerators = runner, device, accelerators

    def submit(self, task: Task[..., Any], parameters: dict[str, Any], on: On) -> PrefectFuture[Any]:
        """Start a task on a worker; on an accelerator's where the task needs it for itself or the model lies there."""
        import dask

        if on == "flow":
            return super().submit(task, parameters, on)
        if on == "accelerator" or self._device != "cpu":
            if not self._accelerators:
                raise _no_accelerator(self._runner.address)
            with dask.annotate(resources=ACCELERATOR):  # type: ignore[attr-defined]
                return self._runner.submit(task, parameters)  # type: ignore[no-any-return]
        return self._runner.submit(task, parameters)  # type: ignore[no-any-return]

    def result(self, future: PrefectFuture[Any]) -> Any:
        """As everywhere; workers that keep dying under one task are told in a sentence."""
        result = super().result(future)
        if type(result).__name__ == "KilledWorker":
            return MpqError(
                f"The cluster's workers died again and again under one task ({result}): look at their memory and logs."
            )
        return result

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` says on a worker that has the device."""
        where = self._accelerators or None
        return self._runner.client.submit(function, *args, workers=where, pure=False).result(timeout=120)


def _no_accelerator(address: str) -> MpqError:
    return MpqError(
        f"No worker of the Dask cluster at {address} offers the resource accel: start one worker per accelerator with "
        "`dask worker ADDRESS --nthreads 1 --resources accel=1`."
    )


@contextmanager
def placed(runner: RunnerSpec, device: str, timed: bool = True) -> Iterator[Place]:
    """The place that a spec asks for, checked.

    Raises MpqError where the cluster cannot be reached, has no workers, runs other code than this flow, offers no
    accelerator though something is to be `timed`, or offers accelerators of different kinds.
    """
    if runner.kind == "local":
        yield Place()
        return
    try:
        from prefect_dask import DaskTaskRunner  # type: ignore[attr-defined]
    except ImportError:
        raise MpqError("The dask runner needs prefect-dask, which is not installed: pip install 'mpq[dask]'.") from None

    cluster = DaskTaskRunner(address=runner.address, client_kwargs={"timeout": "10s"})
    with cluster:
        try:
            workers = cluster.client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, TimeoutError, ValueError) as error:
            raise MpqError(f"The Dask scheduler at {runner.address} cannot be reached ({error}): check that it runs.") from None
        if not workers:
            raise MpqError(
                f"The Dask cluster at {runner.address} has no workers: start some with `dask worker {runner.address}`."
            )
        accelerators = [a for a, w in workers.items() if (w.get("resources") or {}).get("accel", 0) >= ACCELERATOR["accel"]]
        if not accelerators and (timed or device != "cpu"):
            raise _no_accelerator(str(runner.address))
        _leave_alone(cluster.client)
        _check_alike(cluster.client, device, accelerators)
        yield DaskPlace(cluster, device, accelerators)


def _check_alike(client: Any, device: str, accelerators: list[str]) -> None:
    """Keys say which code made a table and on which device: a worker with others would write what is not true."""
    mine = identity()
    try:
        codes = client.run(identity)
        names = client.run(identity, device, workers=accelerators) if accelerators else {}
    except Exception as error:
        raise MpqError(f"A worker of the Dask cluster cannot run mpq ({error}): install the same mpq there.") from None
    if other := next((f"{a} has {theirs}" for a, theirs in codes.items() if theirs != mine), None):
        raise MpqError(f"The cluster's worker {other}, the flow {mine}: install the same versions everywhere.")
    if len(kinds := set(names.values())) > 1:
        raise MpqError(
            f"The cluster's accelerators differ ({'; '.join(sorted(kinds))}): times of different devices do not mix, "
            "give each kind a cluster of its own."
        )


def _leave_alone(client: Any) -> None:
    """Switch Dask's profiler off on every worker, late ones too: it looks at a worker's threads every 10 ms, which disturbs
    what is timed there and, under CPython before 3.11.9 (its issue 106883), now and then stops the whole process for good."""
    from distributed.diagnostics.plugin import WorkerPlugin

    class Unwatched(WorkerPlugin):
        name = "mpq-unwatched"

        def setup(self, worker: Any) -> None:
            if profiler := worker.periodic_callbacks.pop("profile", None):
                profiler.stop()

    client.register_plugin(Unwatched())
