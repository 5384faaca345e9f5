"""A team's machines on one machine: server, worker, Dask cluster and S3 as processes on loopback, and an end to all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import httpx
import psutil
import yaml

ROOT = Path(__file__).parent.parent
POOL = "mpq"


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def until(what: str, ask: Callable[[], Any], seconds: float = 120.0, every: float = 0.25) -> Any:
    """Ask until the answer is true; returns it. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := ask():
                return answer
        except httpx.TransportError:  # not up yet
            pass
        time.sleep(every)
    raise TimeoutError(f"waited {seconds:g} s for {what}")


def begin(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """A process in a session of its own; what it prints goes to `log`."""
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def to_the_end() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM are not heard: a second one would leave half of what the first one ends."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def run_out(*command: str) -> int:
    """Run a command in this terminal to its end; its exit code. Interrupted, it ends in its own way, and this only then.

    Raises what interrupts, unless the command has said itself that it was interrupted: then its exit code is the signal's.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit):
        with to_the_end():
            # a terminal's Ctrl-C has reached it too, and it hears no second signal; what came here alone is handed on
            process.terminate()
            code = process.wait()
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return code
        raise


class Services:
    """Processes under one folder, each with its log there. Used with `with`: at the end none of them is left."""

    def __init__(self, home: Path, more: Mapping[str, str] | None = None):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("PREFECT_", "AWS_", "DASK_", "PYTEST_"))
        }
        self.environment = {
            **kept,
            "PREFECT_HOME": str(home / "prefect"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DO_NOT_TRACK": "1",
            "MPQ_CACHE": str(home / "cache"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            **(more or {}),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.api = ""
        self.short: list[str] = []  # folders elsewhere: a socket's path may have 107 bytes

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop everything, the last started first: politely, then for good, children included."""
        with to_the_end():
            self._stop()

    def _stop(self) -> None:
        for process in reversed(self.processes.values()):
            everyone = [process.pid]
            if psutil.pid_exists(process.pid):
                everyone += [c.pid for c in psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for pid in everyone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(
                ProcessLookupError, PermissionError
            ):  # what it left behind when it was killed before
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for folder in self.short:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process; its output goes to NAME.log."""
        process = begin(command, self.environment, self.home / f"{name}.log")
        self.processes[name] = process
        return process

    def run(self, name: str, *command: str) -> None:
        """Run a command to its end. Raises RuntimeError with its output where it fails."""
        process = begin(command, self.environment, self.home / f"{name}.log")
        try:
            failed = process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
            failed = process.wait()
        if failed:
            raise RuntimeError(f"{' '.join(command)}: {self.log(name)}")

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.home / f"{name}.log").read_text(errors="replace")

    def prefect(self, *arguments: str) -> None:
        """Run a command of Prefect's CLI to its end. Raises RuntimeError with its output where it fails."""
        self.run("prefect", sys.executable, "-m", "prefect", *arguments)

    def server(self) -> str:
        """A Prefect server with a database of its own; returns the URL of its API."""
        port = str(free_port())
        self.environment |= {
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": port,
        }
        self.api = self.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        self.start("server", sys.executable, "-m", "prefect", "server", "start")
        until("the Prefect server", lambda: httpx.get(f"{self.api}/health").is_success)
        return self.api

    def worker(self) -> None:
        """A worker of the process pool that the deployments name, up and known to the server; two flow runs at a time."""
        self.start(
            "worker",
            sys.executable,
            "-m",
            "prefect",
            "worker",
            "start",
            "--pool",
            POOL,
            "--name",
            "one",
            "--limit",
            "2",
        )
        until("the worker", lambda: self.post(f"work_pools/{POOL}/workers/filter", {}))

    def deploy(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Deploy everything in prefect.yaml, with parts of some deployments replaced: by name, such as `parameters`."""
        data = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
        for deployment in data["deployments"]:
            deployment.update(changes.get(deployment["name"], {}))
        file = self.home / "prefect.yaml"
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        self.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(file))

    def keep_results(self, url: str) -> None:
        """Prefect's own results under `url`, by a block, for every flow that is started from here on."""
        code = f"from prefect.filesystems import RemoteFileSystem as R; R(basepath={url!r}).save('results', overwrite=True)"
        self.run("results", sys.executable, "-c", code)
        self.environment["PREFECT_DEFAULT_RESULT_STORAGE_BLOCK"] = "remote-file-system/results"

    def s3(self, bucket: str) -> str:
        """An S3 server with a bucket, found by everything started from here on; returns its address."""
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        self.environment |= {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        code = "import sys; from moto.server import main; main(sys.argv[1:])"
        self.start("s3", sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port))
        until("the S3 server", lambda: httpx.get(address).status_code)
        httpx.put(f"{address}/{bucket}").raise_for_status()
        return address

    def bucket(self) -> Any:
        """The S3 server as an fsspec file system, for this process."""
        environment = self.environment
        return fsspec.filesystem(
            "s3",
            key=environment["AWS_ACCESS_KEY_ID"],
            secret=environment["AWS_SECRET_ACCESS_KEY"],
            client_kwargs={"endpoint_url": environment["AWS_ENDPOINT_URL"]},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def dask(self, workers: int = 2, resources: str = "accel=1", threads: int = 1) -> str:
        """A Dask scheduler and its workers, one accelerator each; returns the scheduler's address."""
        port = free_port()
        address = f"tcp://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dask"]
        self.start(
            "scheduler",
            *command,
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--no-dashboard",
        )
        until("the Dask scheduler", lambda: "Scheduler at" in self.log("scheduler"))
        for k in range(workers):
            self.dask_worker(address, f"dask-{k}", resources, threads)
        for k in range(workers):
            until(
                f"Dask worker {k}",
                lambda name=f"dask-{k}": "Starting established connection" in self.log(name),
            )
        return address

    def dask_worker(
        self, address: str, name: str, resources: str = "accel=1", threads: int = 1, *more: str
    ) -> None:
        """One more worker, without a nanny: killed, it is gone."""
        some = ["--resources", resources] if resources else []
        self.start(
            name,
            sys.executable,
            "-m",
            "dask",
            "worker",
            address,
            "--nthreads",
            str(threads),
            "--no-nanny",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
            "--name",
            name,
            "--local-directory",
            str(self.home / name),
            *some,
            *more,
        )

    def ray(self, workers: int = 2, resources: str = '{"accel": 1}') -> str:
        """Nodes of a Ray cluster, the first one its head, one CPU and one accelerator each; returns the head's address."""
        port = free_port()
        self.short.append(tempfile.mkdtemp(prefix="ray-"))
        head = [
            "--head",
            "--port",
            str(port),
            "--include-dashboard=false",
            "--temp-dir",
            self.short[-1],
        ]
        self._ray("ray-0", resources, *head)
        for k in range(1, workers):
            self.ray_worker(f"127.0.0.1:{port}", f"ray-{k}", resources)
        return f"127.0.0.1:{port}"

    def ray_worker(self, address: str, name: str, resources: str = '{"accel": 1}') -> None:
        """One more node."""
        self._ray(name, resources, "--address", address)

    def _ray(self, name: str, resources: str, *options: str) -> None:
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            *options,
            "--block",
            "--disable-usage-stats",
        ]
        some = [
            "--num-cpus",
            "1",
            "--resources",
            resources,
            "--node-ip-address",
            "127.0.0.1",
            "--object-store-memory",
            "100000000",
        ]
        for _ in range(3):  # Ray gives a node 30 s to start, which a busy machine may take
            process = self.start(name, *command, *some)
            until(
                f"Ray's {name}",
                lambda p=process: "Ray runtime started" in self.log(name) or p.poll() is not None,
            )
            if process.poll() is None:
                return
        raise RuntimeError(f"Ray's {name} did not start: {self.log(name)}")

    def kill(self, name: str) -> None:
        """kill -9, children included."""
        process = self.processes[name]
        for each in [
            process.pid,
            *(c.pid for c in psutil.Process(process.pid).children(recursive=True)),
        ]:
            os.kill(each, signal.SIGKILL)
        process.wait()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API; again where it answers 503, as it does while its database is busy."""

        def answered() -> httpx.Response | None:
            answer = httpx.request(method, f"{self.api}/{path}", json=body, timeout=30)
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

        answer: httpx.Response = until(f"an answer to {method} {path}", answered, 60, 0.5)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def post(self, path: str, body: Any) -> Any:
        """POST to the API."""
        return self.ask("POST", path, body)

    def get(self, path: str) -> Any:
        """GET from the API."""
        return self.ask("GET", path)

    def runs(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        """The deployment's flow runs in some state (their types, such as COMPLETED), the oldest first."""
        body = {
            "deployments": {"name": {"any_": [deployment]}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": 50,
        }
        every: list[dict[str, Any]] = self.post("flow_runs/filter", body)
        return [run for run in every if not states or run["state_type"] in states]

    def ended(self, deployment: str, seconds: float = 240, number: int = 1) -> dict[str, Any]:
        """Wait for the deployment's n-th run to end; returns it."""
        over = "COMPLETED", "FAILED", "CRASHED", "CANCELLED"
        runs = until(
            f"the end of {deployment}",
            lambda: (r := self.runs(deployment, *over))[number - 1 :] and r,
            seconds,
            1.0,
        )
        return dict(runs[number - 1])
