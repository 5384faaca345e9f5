"""Processes that begin with the large packages imported: forked from one that has done so, as real as any other.

torch, transformers, Prefect and Dask take eight seconds of a core to import, which every `mpq run` and every worker of a
cluster would spend anew. Not preloaded is what starts threads, which a fork loses (Polars), and what is tested (mpq).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PACKAGES = [
    "torch",
    "torch.export",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "networkx",
    "highspy",
    "matplotlib.figure",
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.artifacts",
    "prefect.filesystems",
    "prefect.cli.deploy",
    "prefect_dask",
    "distributed.cli.dask_worker",
    "distributed.cli.dask_scheduler",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PACKAGES)


class Process:
    """A process that runs `python COMMAND…`, with the interface of subprocess.Popen as far as tests use it.

    `command` begins with `-m MODULE` or `-c CODE`. It has a session of its own, so that it can be killed with its children;
    what it and they print goes to `log`.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], log: Path
    ) -> None:
        self.args, self.log = command, log
        log.write_bytes(b"")  # there to be read before the process has begun
        self._process = _context.Process(
            target=_become, args=(list(command), str(cwd), dict(environment), str(log))
        )
        with _without_a_home(log.parent):
            self._process.start()
        assert self._process.pid
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; returns what was printed. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        return self.log.read_text(errors="replace"), None

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


@contextlib.contextmanager
def _without_a_home(folder: Path) -> Iterator[None]:
    """The process that is forked starts with the first one: what Prefect writes when it is imported goes to `folder`."""
    kept = dict(os.environ)
    os.environ |= {"PREFECT_HOME": str(folder / "preloaded"), "OMP_NUM_THREADS": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= kept


def _become(command: list[str], cwd: str, environment: dict[str, str], log: str) -> None:
    gc.freeze()  # what was imported stays
    os.setsid()
    os.chdir(cwd)
    sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ.clear()
    os.environ |= environment
    sys.path[:] = [cwd, *(p for p in sys.path if p not in (cwd, str(Path(__file__).parent)))]

    tempfile.tempdir = None  # asked for while packages were imported
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    try:
        how, what, *arguments = command
        sys.argv = [how, *arguments]
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves these out
        sys.stdout.flush()
