"""A process of the real vLLM for all tests of a session: importing it takes longer than they do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpq.errors import MpqError
from mpq.serving import EngineProcess, Environment, find_environment


@pytest.fixture(scope="session")
def environment() -> Environment:
    """Where vLLM is installed; without it the tests that need it are skipped."""
    try:
        return find_environment()
    except MpqError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def engine(environment: Environment) -> Iterator[EngineProcess]:
    """A process with vLLM's engines, on one thread; nothing is compiled in it, which takes longer than these models run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        process = EngineProcess(environment, threads=1)
    with process:
        yield process
