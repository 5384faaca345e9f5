"""For every test: Triton's kernels run where they can, and processes begin with the large packages imported.

Kernels run on the GPU where there is one, and on Triton's interpreter where there is none.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# as specs time, one thread; read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# tables here are tiny: a second thread only waits for work; read when Polars is imported
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from mpq.serving import EngineProcess

# files whose tests ask one process of vLLM: importing it takes longer than they do
OF_VLLM = (
    "engine/test_served.py",
    "engine/test_served_cache.py",
    "engine/test_times.py",
    "flows/test_serve_demo.py",
)

# what is imported stays: looking for garbage among it takes a tenth of the tests' time
gc.set_threshold(50_000, 20, 50)
# kept between test runs: C++ takes long to compile
os.environ["MPQ_CACHE"] = str(Path(tempfile.gettempdir()) / f"mpq-tests-{os.getuid()}")


def pytest_configure(config: pytest.Config) -> None:
    """In a process that runs tests; the one that hands them to workers, which wait for it, imports no torch."""
    if not hasattr(config, "workerinput") and config.option.numprocesses:
        return
    import torch

    if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        _interpret_triton()


def _interpret_triton() -> None:
    # read when kernels are defined, so before anything else imports Triton in this process
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        """The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for the bound of a range."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The walk over all architectures runs where it is asked for by name: `-m walk`."""
    if "walk" in config.option.markexpr:
        return
    walks = [item for item in items if item.get_closest_marker("walk")]
    items[:] = [item for item in items if item not in walks]
    config.hook.pytest_deselected(items=walks)


class Scheduling(LoadFileScheduling):
    """A file's tests go to one worker, and those of vLLM to the same."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return OF_VLLM[0] if file.endswith(OF_VLLM) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """How tests are spread over workers."""
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def engine() -> Iterator[EngineProcess]:
    """A process with vLLM's engines, on one thread; tests that need it are skipped where none is installed.

    Nothing is compiled in it, which takes longer than these models run.
    """
    from mpq.errors import MpqError
    from mpq.serving import EngineProcess, find_environment

    try:
        environment = find_environment()
    except MpqError as why:
        pytest.skip(str(why))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        process = EngineProcess(environment, threads=1)
    with process:
        yield process


@pytest.fixture(scope="session", autouse=True)
def preloaded_services() -> Iterator[None]:
    """A cluster's processes and Prefect's commands are forked; a Prefect server or worker starts as it does elsewhere.

    All of them find the kernels that the tests have compiled.
    """
    import preloaded
    from small import ROOT

    from deployments import processes

    begin = processes.begin

    def forked(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Any:
        environment = {**environment, "MPQ_CACHE": os.environ["MPQ_CACHE"]}
        how = list(command[1:4])
        stays = how[:2] == ["-m", "prefect"] and how[2] in ("server", "worker")
        if command[0] != sys.executable or stays:
            return begin(command, environment, log)
        return preloaded.Process(command[1:], ROOT, environment, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "begin", forked)
        yield


@pytest.fixture
def reloaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export is reloaded in this process: test_export.py shows that a fresh one can."""
    from small_export import reloaded

    monkeypatch.setattr("mpq.export.check.reloaded", reloaded)
