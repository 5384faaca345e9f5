"""A Prefect of the tests' own, and a tiny checkpoint to calibrate."""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import small
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_RESULTS_LOCAL_STORAGE_PATH,
    temporary_settings,
)
from small import small_spec

from mpq.caches import private_folder
from mpq.flows.calibrate import calibrate
from mpq.flows.server import Server
from mpq.models import graph
from mpq.report import figures
from mpq.spec import RunSpec


def with_a_database(home: Path) -> Server:
    """A server that begins with an empty database, which is kept between test runs: Prefect takes five seconds to make one."""
    small.DATABASE = private_folder("prefect") / f"{version('prefect')}.db"
    with small.DATABASE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of pytest may be making it
        if small.DATABASE.exists():
            shutil.copy(small.DATABASE, home / "prefect.db")
            return Server()
        server, half = Server(), small.DATABASE.with_suffix(".half")
        server.wait()
        with (
            closing(sqlite3.connect(home / "prefect.db")) as source,
            closing(sqlite3.connect(half)) as copy,
        ):
            source.backup(copy)
        half.replace(small.DATABASE)
        return server


@pytest.fixture(scope="session", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of the tests' own, as a run starts one; results in a temporary folder, or tests would share a cache."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        # runs are recorded; their feed of events, which nobody reads here, is a tenth of all work
        for service in ("SERVICES_EVENT_PERSISTER", "SERVICES_TRIGGERS", "ANALYTICS"):
            patch.setenv(f"PREFECT_SERVER_{service}_ENABLED", "false")
        server = with_a_database(home)
    try:
        server.wait()
        small.API = server.api
        settings: dict[Any, Any] = {
            PREFECT_API_URL: server.api,
            PREFECT_HOME: home,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
            PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path_factory.mktemp("results"),
        }
        with temporary_settings(settings):
            yield
    finally:
        server.stop()


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Tracing takes a second, and every run with a new store traces the same tiny Llama: graphs are kept."""
    trace, kept = graph.trace, dict[str, Any]()

    def once(config: Any, **how: Any) -> Any:
        what = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
        key = json.dumps([what, how], default=str)
        if key not in kept:
            kept[key] = trace(config, **how)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "trace", once)
        yield


@contextmanager
def no_pictures() -> Iterator[None]:
    """Reports without pictures, which take two seconds to draw."""
    none = {section: [] for section in figures.SECTIONS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "report_figures", lambda *_: none)
        patch.setattr(figures, "frontier_png", lambda *_: b"\x89PNG")
        yield


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """In every module's runs, those of its fixtures too."""
    with no_pictures():
        yield


@pytest.fixture(scope="session")
def finished(
    prefect: None, traced_once: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunSpec, dict[str, Any]]:
    """A run of the tiny spec: its folder, the spec and the outcome. Tests take a copy, see `calibrated`."""
    folder = tmp_path_factory.mktemp("finished")
    spec = small_spec(folder)
    with no_pictures():
        return folder, spec, calibrate(spec)


@pytest.fixture
def calibrated(
    finished: tuple[Path, RunSpec, dict[str, Any]], tmp_path: Path
) -> tuple[RunSpec, dict[str, Any]]:
    """The spec of a run that is done, with a folder of its own, and the outcome as it was in the first folder."""
    folder, spec, outcome = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    there = spec.model_dump_json().replace(str(folder), str(tmp_path))
    return RunSpec.model_validate_json(there), outcome


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """A run that takes seconds: two layers of hidden size 32, two shards, one native and one emulated format."""
    return small_spec(tmp_path)
