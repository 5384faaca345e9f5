"""Where the tasks of a flow run: beside it, or on the workers of a Dask or Ray cluster, one accelerator a task."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL

from mpq.devices import resolve
from mpq.errors import MpqError, missing_extra
from mpq.spec import RunnerSpec
from mpq.tasks.device import identity, reaches
from mpq.tasks.stage import On

ACCELERATOR = {"accel": 1}  # what each worker offers that has one


class Place:
    """The flow's own machine: every task goes to the flow's task runner, questions are answered here."""

    shared = False  # whether a path of this machine may mean nothing where tasks run
    accelerators = 1  # how many timings may run at once

    def submit(
        self, task: Task[..., Any], parameters: dict[str, Any], on: On
    ) -> PrefectFuture[Any]:
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


class Cluster(Place):
    """Long tasks spread over a cluster's workers, short ones stay beside the flow."""

    shared = True
    kind: str
    dying: tuple[str, ...]  # its exceptions, by name, of workers that keep dying under a task

    def __init__(self, runner: Any, device: str):
        self._runner = runner
        self.accelerators = self._accelerators()
        self._device = self.ask(resolve, device)

    def _accelerators(self) -> int:
        raise NotImplementedError

    def _on_accelerator(self) -> AbstractContextManager[Any]:
        """Within, what is submitted waits for an accelerator of its own."""
        raise NotImplementedError

    def submit(
        self, task: Task[..., Any], parameters: dict[str, Any], on: On
    ) -> PrefectFuture[Any]:
        """Start a task on a worker; on an accelerator's where the task needs it for itself or the model lies there."""
        if on == "flow":
            return super().submit(task, parameters, on)
        there = on == "accelerator" or self._device != "cpu"
        if there and not self.accelerators:
            raise _no_accelerator(self.kind, self._runner.address)
        with self._on_accelerator() if there else nullcontext():
            return self._runner.submit(task, parameters)  # type: ignore[no-any-return]

    def result(self, future: PrefectFuture[Any]) -> Any:
        """As everywhere; workers that keep dying under one task are told in a sentence."""
        result = super().result(future)
        if type(result).__name__ not in self.dying:
            return result
        return MpqError(
            f"The cluster's workers died again and again under one task ({result}): look at their memory and logs."
        )


class DaskPlace(Cluster):
    """A Dask cluster."""

    kind, dying = "dask", ("KilledWorker",)

    def _accelerators(self) -> int:
        return len(_offering(self._runner.client))

    def _on_accelerator(self) -> AbstractContextManager[Any]:
        import dask

        return dask.annotate(resources=ACCELERATOR)  # type: ignore[attr-defined]

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` says on a worker that has the device."""
        client = self._runner.client
        where = _offering(client) or None
        return client.submit(function, *args, workers=where, pure=False).result(timeout=120)


def _offering(client: Any) -> list[str]:
    """The addresses of the Dask workers that offer an accelerator just now: some die, others join."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    offered = {a: (w.get("resources") or {}).get("accel", 0) for a, w in workers.items()}
    return [address for address, count in offered.items() if count >= ACCELERATOR["accel"]]


class RayPlace(Cluster):
    """A Ray cluster: a timing takes one of the custom resource `accel`, and a GPU where it runs on one."""

    kind, dying = "ray", ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")

    def _accelerators(self) -> int:
        return sum(_nodes().values())

    def _on_accelerator(self) -> AbstractContextManager[Any]:
        from prefect_ray.context import remote_options

        on_gpu = int(self._device != "cpu")
        return remote_options(resources=ACCELERATOR, num_gpus=on_gpu)  # type: ignore[no-any-return]

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` says on a node that has the device."""
        where = [node for node, accelerators in _nodes().items() if accelerators]
        return _on_nodes(where[:1] or [None], function, *args)[0]


def _nodes() -> dict[str, int]:
    """The Ray nodes that are alive, and how many accelerators each offers."""
    import ray

    return {n["NodeID"]: int(n["Resources"].get("accel", 0)) for n in ray.nodes() if n["Alive"]}


def _on_nodes(nodes: Sequence[str | None], function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function` says on each node of a Ray cluster (None: on any), beside whatever runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = [NodeAffinitySchedulingStrategy(n, soft=False) if n else "DEFAULT" for n in nodes]
    asked = [
        ray.remote(function).options(num_cpus=0, scheduling_strategy=w).remote(*args) for w in where
    ]
    return list(ray.get(asked, timeout=120))


def _no_accelerator(kind: str, address: str) -> MpqError:
    start = {
        "dask": "`dask worker ADDRESS --nthreads 1 --resources accel=1`",
        "ray": """`ray start --address ADDRESS --num-cpus 1 --resources '{"accel": 1}'`""",
    }
    return MpqError(
        f"No worker of the {kind.capitalize()} cluster at {address} offers the resource accel: "
        f"start one worker per accelerator with {start[kind]}."
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
    with (_dask if runner.kind == "dask" else _ray)(str(runner.address), device) as place:
        if not place.accelerators and (timed or place.ask(resolve, device) != "cpu"):
            raise _no_accelerator(runner.kind, str(runner.address))
        yield place


def _reach(address: str) -> None:
    """Raise OSError where nothing listens at a scheduler's address: Dask's client would try for all of its ten seconds."""
    from distributed.comm.addressing import parse_address, parse_host_port

    transport, where = parse_address(address)
    if transport in ("tcp", "tls"):
        socket.create_connection(parse_host_port(where), timeout=10).close()


@contextmanager
def _dask(address: str, device: str) -> Iterator[Place]:
    try:
        from prefect_dask import DaskTaskRunner  # type: ignore[attr-defined]
    except ImportError:
        raise missing_extra("prefect_dask", "the dask runner") from None

    cluster = DaskTaskRunner(address=address, client_kwargs={"timeout": "10s"})
    with cluster:
        try:
            _reach(address)
            workers = cluster.client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, TimeoutError, ValueError) as error:
            raise MpqError(
                f"The Dask scheduler at {address} cannot be reached ({error}): check that it runs."
            ) from None
        if not workers:
            raise MpqError(
                f"The Dask cluster at {address} has no workers: start some with `dask worker {address}`."
            )
        run, accelerators = cluster.client.run, _offering(cluster.client)
        _check_alike(
            "Dask",
            lambda: run(identity),
            lambda: run(identity, device, workers=accelerators) if accelerators else {},
            lambda api: run(reaches, api),
        )
        cluster.client.register_worker_callbacks(_unprofiled)  # type: ignore[no-untyped-call]
        yield DaskPlace(cluster, device)


def _unprofiled(dask_worker: Any) -> None:
    """No sampling profiler beside a measurement. On Python 3.11 it also locks a worker up for good, once in some thousand tasks
    (dask/distributed issue 8616)."""
    if sampling := dask_worker.periodic_callbacks.pop("profile", None):
        sampling.stop()


@contextmanager
def _ray(address: str, device: str) -> Iterator[Place]:
    try:
        import ray
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise missing_extra("prefect_ray", "the ray runner") from None

    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        # ray.init would wait for minutes
        socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address,
            namespace="mpq",
            log_to_driver=False,
            logging_level="warning",
            ignore_reinit_error=True,
        )
    except Exception as error:
        told = str(error).split("\n")[0]
        raise MpqError(
            f"The Ray cluster at {address} cannot be reached ({told}): check that it runs."
        ) from None
    try:
        nodes = _nodes()
        accelerators = [node for node, offered in nodes.items() if offered]
        _check_alike(
            "Ray",
            lambda: dict(zip(nodes, _on_nodes(list(nodes), identity), strict=True)),
            lambda: dict(zip(accelerators, _on_nodes(accelerators, identity, device), strict=True)),
            lambda api: dict(zip(nodes, _on_nodes(list(nodes), reaches, api), strict=True)),
        )
        with RayTaskRunner(address=address) as runner:
            yield RayPlace(runner, device)
    finally:
        ray.shutdown()


def _check_alike(
    cluster: str,
    codes: Callable[[], dict[str, str]],
    names: Callable[[], dict[str, str]],
    reached: Callable[[str], dict[str, bool]],
) -> None:
    """Keys say which code made a table and on which device: a worker with others would write what is not true. And each
    has to reach Prefect's server, to which its tasks report."""
    mine, api = identity(), PREFECT_API_URL.value()
    try:
        theirs, kinds = codes(), set(names().values())
    except Exception as error:
        raise MpqError(
            f"A worker of the {cluster} cluster cannot run mpq ({error}): install the same mpq there."
        ) from None
    if other := next((f"{a} has {code}" for a, code in theirs.items() if code != mine), None):
        raise MpqError(
            f"The cluster's worker {other}, the flow {mine}: install the same versions everywhere."
        )
    if api and (deaf := next((a for a, there in reached(api).items() if not there), None)):
        raise MpqError(
            f"The cluster's worker {deaf} cannot reach Prefect's server at {api}: start one that it can reach "
            "(`prefect server start --host 0.0.0.0`), and set PREFECT_API_URL to its address."
        )
    if len(kinds) > 1:
        raise MpqError(
            f"The cluster's accelerators differ ({'; '.join(sorted(kinds))}): times of different devices do not mix, "
            "give each kind a cluster of its own."
        )
