"""A real Dask cluster of processes: the same tables, one accelerator a timing, killed and late workers, two runs at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import polars as pl
import pytest
from distributed import Client
from test_calibrate import ALWAYS, change, computed

from deployments.processes import Services, free_port
from flows.calibrate import calibrate
from mpq.errors import MpqError
from mpq.runs import join_tables
from mpq.spec import RunSpec, parse_spec


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """The processes of a cluster, ended with the test."""
    with Services(tmp_path / "services") as services:
        yield services


def on(address: str, spec: RunSpec, **parts: object) -> RunSpec:
    """The spec on a cluster."""
    return change(spec, runner={"kind": "dask", "address": address}, **parts)


def stored(folder: Path, kind: str) -> list[Path]:
    """The entries of a kind, in the order in which they were written."""
    return sorted(folder.glob(f"{kind}/*/meta.json"), key=lambda p: p.stat().st_mtime_ns)


def test_the_spec_says_where(spec: RunSpec) -> None:
    """dask needs an address, local has none, other runners are named in the mistake."""
    data = spec.model_dump(mode="json")
    for runner, told in [
        ({"kind": "dask"}, "needs the scheduler's address"),
        ({"kind": "dask", "address": "somewhere"}, "needs the scheduler's address"),
        ({"kind": "local", "address": "tcp://a:1"}, "has no address"),
        ({"kind": "ray"}, "'local' or 'dask'"),
    ]:
        with pytest.raises(MpqError, match=told):
            parse_spec({**data, "runner": runner})


def test_what_a_cluster_must_have(spec: RunSpec, services: Services) -> None:
    """A scheduler, a worker, an accelerator: each lack is a sentence at once, never a wait without end."""
    with pytest.raises(MpqError, match="cannot be reached"):
        calibrate(on(f"tcp://127.0.0.1:{free_port()}", spec))
    address = services.dask(workers=0)
    with pytest.raises(MpqError, match="has no workers"):
        calibrate(on(address, spec))
    services.dask_worker(address, "plain", resources="")
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
    with pytest.raises(MpqError, match="offers the resource accel"):
        calibrate(on(address, spec))
    untimed = change(spec, objectives={"m": {"formats": ["fp8_e4m3"]}}).model_copy(
        update={"objectives": {"m": spec.objectives["m"]}}
    )
    assert "sensitivity" in computed(calibrate(on(address, untimed)))


def test_the_same_tables_as_beside_the_flow(spec: RunSpec, services: Services, tmp_path: Path) -> None:
    """What is computed is equal to the bit; what is timed has the same rows; a rerun on the cluster finds everything."""
    local = join_tables(calibrate(spec)["tables"])
    there = on(services.dask(), spec, store=(tmp_path / "other").as_uri())
    first = calibrate(there)
    assert computed(first) == ALWAYS
    tables = join_tables(first["tables"])
    assert set(tables) == set(local)
    for name in ("groups", "sensitivity", "loss"):
        assert tables[name].equals(local[name]), name
    what = ["signature", "configuration", "instances", "device", "method", "batch", "length"]
    assert tables["timing"].select(what).equals(local["timing"].select(what))
    objective = pl.col("objective") == "m"
    assert tables["plans"].filter(objective).equals(local["plans"].filter(objective))
    assert computed(calibrate(there)) == set()
    assert computed(calibrate(change(there, runner={"kind": "local", "address": None}))) == set(), "the runner is in no key"
    services.dask_worker(there.runner.address or "", "dask-late")
    with Client(there.runner.address, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=60)
        watched = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
        assert len(watched) == 3
        assert not any(watched.values()), "no worker's threads are looked at while it measures"
    used = {k for k in range(2) if "sensitivity" in services.log(f"dask-{k}") or "computing" in services.log(f"dask-{k}")}
    assert used == {0, 1}, "tasks spread over the workers"


def test_a_killed_worker_loses_its_own_work_alone(spec: RunSpec, services: Services, tmp_path: Path) -> None:
    """kill -9 of one worker while timings run, and another that joins late: the run ends, what was stored stays as it was."""
    store = tmp_path / "store"
    address = services.dask()
    before: dict[Path, int] = {}

    def strike() -> None:
        deadline = time.monotonic() + 120
        while not stored(store, "timing") and time.monotonic() < deadline:
            time.sleep(0.01)
        before.update({p: p.stat().st_mtime_ns for p in store.rglob("meta.json")})
        services.kill("dask-0")
        services.dask_worker(address, "dask-late")

    striker = threading.Thread(target=strike)
    striker.start()
    outcome = calibrate(on(address, spec, timing={"slice": 1, "repeats": 5}))
    striker.join()
    assert any(p.parts[-3] == "timing" for p in before)
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "what was there has been computed again"
    timing = join_tables(outcome["tables"])["timing"]
    assert timing.select("signature", "configuration").is_unique().all()
    assert timing["device"].n_unique() == 1


def test_two_runs_at_once_share_their_work(spec: RunSpec, services: Services) -> None:
    """On one cluster and one store: identical tables in the end, timings among them."""
    there = on(services.dask(), spec, timing={"slice": 4})
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(copy_context().run, calibrate, change(there, name=f"run-{k}")) for k in range(2)]
        one, two = (join_tables(future.result()["tables"]) for future in both)
    for name in ("groups", "sensitivity", "loss", "timing", "plans"):
        assert one[name].equals(two[name]), name
