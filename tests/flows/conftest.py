"""A Prefect of the tests' own, and a tiny checkpoint to calibrate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from models import small_spec
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from mpq.spec import RunSpec


@pytest.fixture(scope="session", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary Prefect server and database; results in a temporary folder, or tests would share a cache."""
    results = tmp_path_factory.mktemp("results")
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_RESULTS_LOCAL_STORAGE_PATH: results}),
    ):
        yield


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """A run that takes seconds: two layers of hidden size 32, two shards, one native and one emulated format."""
    return small_spec(tmp_path)
