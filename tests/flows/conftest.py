"""A Prefect of the tests' own, and a tiny checkpoint to calibrate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import write_checkpoint
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from mpq.spec import RunSpec, parse_spec


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
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 97, (24, 16)))
    text = {"source": str(tmp_path / "tokens.npy"), "samples": 8, "length": 16, "batch": 4}
    return parse_spec({
        "name": "tiny",
        "model": {"path": str(write_checkpoint(tmp_path / "model")), "base": "fp32"},
        "calibration": {**text, "shards": 2},
        "evaluation": {**text, "seed": 1, "seeds": 1, "ttft_repeats": 3},
        "timing": {"batch": 2, "length": 16, "repeats": 2},
        "objectives": {"et": {"formats": ["bf16"]}, "m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]}},
        "taus": [0.001, 0.01],
        "store": (tmp_path / "store").as_uri(),
        "out": str(tmp_path / "out"),
    })  # fmt: skip
