"""For every test: Triton's kernels run where they can, and processes begin with the large packages imported.

Kernels run on the GPU where there is one, and on Triton's interpreter where there is none.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# as specs time, one thread; read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# tables here are tiny: a second thread only waits for work; read when Polars is imported
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import numpy as np
import preloaded
import pytest
import torch
from small import ROOT

from deployments import processes

# what is imported stays: looking for garbage among it takes a tenth of the tests' time
gc.set_threshold(50_000, 20, 50)
# kept between test runs: C++ takes long to compile
os.environ["MPQ_CACHE"] = str(Path(tempfile.gettempdir()) / f"mpq-tests-{os.getuid()}")

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # read when kernels are defined, so before anything else imports Triton in this process
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, scope: Any) -> None:
        """The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for the bound of a range."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_index


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The walk over all architectures runs where it is asked for by name: `-m walk`."""
    if "walk" in config.option.markexpr:
        return
    walks = [item for item in items if item.get_closest_marker("walk")]
    items[:] = [item for item in items if item not in walks]
    config.hook.pytest_deselected(items=walks)


@pytest.fixture(scope="session", autouse=True)
def preloaded_services() -> Iterator[None]:
    """A cluster's processes and Prefect's commands are forked; a Prefect server or worker starts as it does elsewhere.

    All of them find the kernels that the tests have compiled.
    """
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
    """An export is reloaded in this process: that a fresh one can is tests/mpq/export's to show."""
    from mpq.export import check, reload

    def reloaded(request: dict[str, Any], work: Path) -> tuple[np.ndarray, list[str], list[str]]:
        asked, answer, out = (work / name for name in ("asked.json", "answer.json", "out.npy"))
        asked.write_text(json.dumps({**request, "out": str(out), "answer": str(answer)}))
        reload.main(asked)
        found = json.loads(answer.read_text())
        return np.load(out), found["differing"], found["caches_unread"]

    monkeypatch.setattr(check, "reloaded", reloaded)
