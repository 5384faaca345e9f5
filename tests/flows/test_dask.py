"""A real Dask cluster of processes: the same tables, killed and late workers, kinds of devices, two runs at once."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from distributed import Client
from small import ROOT, short
from test_calibrate import ALWAYS, change, computed
from test_kill import start

from deployments.processes import Services, free_port, until
from mpq.errors import MpqError
from mpq.flows import plans
from mpq.flows.calibrate import calibrate
from mpq.flows.run import Run
from mpq.report.runs import join_tables, read_run
from mpq.spec import RunSpec, parse_spec
from mpq.store.entries import TableRef


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
    """dask and ray need an address, local has none, other runners are named in the mistake."""
    data = spec.model_dump(mode="json")
    for runner, told in [
        ({"kind": "dask"}, "needs the scheduler's address"),
        ({"kind": "dask", "address": "somewhere"}, "needs the scheduler's address"),
        ({"kind": "local", "address": "tcp://a:1"}, "has no address"),
        ({"kind": "ray", "address": "tcp://head:6379"}, "needs the cluster's address"),
        ({"kind": "slurm"}, "'local', 'dask' or 'ray'"),
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
    assert "sensitivity" in computed(calibrate(on(address, short(spec))))


def test_the_same_tables_as_beside_the_flow(
    calibrated: tuple[RunSpec, dict[str, Any]], services: Services, tmp_path: Path
) -> None:
    """What is computed is equal to the bit; what is timed has the same rows; a rerun on the cluster finds everything."""
    spec, done = calibrated
    local = join_tables(done["tables"])
    there = on(services.dask(), spec, store=(tmp_path / "other").as_uri(), timing={"slice": None})
    first = calibrate(there)
    assert computed(first) == ALWAYS | {"probe"}
    tables = join_tables(first["tables"])
    assert set(tables) == set(local)
    for name in ("groups", "sensitivity", "loss"):
        assert tables[name].equals(local[name]), name
    what = ["signature", "configuration", "instances", "device", "method", "batch", "length"]
    assert tables["timing"].select(what).equals(local["timing"].select(what))
    objective = pl.col("objective") == "m"
    assert tables["plans"].filter(objective).equals(local["plans"].filter(objective))
    assert computed(calibrate(there)) == set()
    assert computed(calibrate(change(there, runner={"kind": "local", "address": None}))) == set(), (
        "the runner is in no key"
    )
    services.dask_worker(there.runner.address or "", "dask-late")
    with Client(there.runner.address, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=60)
        watched = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
        assert len(watched) == 3
        assert not any(watched.values()), "no worker's threads are looked at while it measures"
    used = {
        k
        for k in range(2)
        if "sensitivity" in services.log(f"dask-{k}") or "computing" in services.log(f"dask-{k}")
    }
    assert used == {0, 1}, "tasks spread over the workers"


def test_a_killed_worker_loses_its_own_work_alone(
    spec: RunSpec, services: Services, tmp_path: Path
) -> None:
    """kill -9 of one worker while timings run, and another that joins late: the run ends, what was stored stays as it was."""
    store = tmp_path / "store"
    address = services.dask()
    before: dict[Path, int] = {}

    def strike() -> None:
        deadline = time.monotonic() + 120
        while not stored(store, "measurement") and time.monotonic() < deadline:
            time.sleep(0.01)
        before.update({p: p.stat().st_mtime_ns for p in store.rglob("meta.json")})
        services.kill("dask-0")
        services.dask_worker(address, "dask-late")

    striker = threading.Thread(target=strike)
    striker.start()
    outcome = calibrate(on(address, spec, timing={"slice": 8, "repeats": 5}, taus=[0.01]))
    striker.join()
    with Client(address, set_as_default=False) as client:
        profiled = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
    assert list(profiled.values()) == [False, False], (
        "a profiler beside the timings, on the first worker or the late one"
    )
    assert any(p.parts[-3] == "measurement" for p in before)
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), (
        "what was there has been computed again"
    )
    timing = join_tables(outcome["tables"])["timing"]
    assert timing.select("signature", "configuration").is_unique().all()
    assert timing["device"].n_unique() == 1


def test_kinds_of_devices_do_not_mix(
    spec: RunSpec, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerators of two kinds are refused before anything runs; one of another kind that joins late measures nothing."""
    address = services.dask(workers=1)

    def stranger_joins() -> None:
        services.dask_worker(
            address, "stranger", "accel=1", 1, "--preload", str(ROOT / "tests" / "another_cpu.py")
        )
        until("the stranger", lambda: "Starting established connection" in services.log("stranger"))

    original = plans.first_times

    def first_times(run: Run, groups: TableRef) -> TableRef:
        assert "Another" not in run.architecture.device_name
        stranger_joins()
        services.kill("dask-0")
        return original(run, groups)

    monkeypatch.setattr(plans, "first_times", first_times)  # the moment in which it happens
    there = on(address, spec, timing={"slice": 8})
    with pytest.raises(
        MpqError,
        match=r"is Another CPU.*, the timing is for .*: give each kind a cluster of its own",
    ):
        calibrate(there)
    assert not stored(tmp_path / "store", "measurement")
    services.dask_worker(address, "dask-1")
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=120)
    with pytest.raises(MpqError, match="accelerators differ"):
        calibrate(there)


def test_two_runs_at_once_share_their_work(
    spec: RunSpec, services: Services, tmp_path: Path
) -> None:
    """Two processes of `mpq run`, with Prefect results of their own each, on one cluster and one store: identical tables in the end."""
    there = on(services.dask(), spec, timing={"slice": 4, "limit": 8}, taus=[0.01])
    processes = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**there.model_dump(mode="json"), "name": name}))
        processes.append(start(path, tmp_path / f"prefect-{name}"))
    for process in processes:
        output, _ = process.communicate(timeout=580)
        assert process.returncode == 0, output
    one, two = (read_run(tmp_path / "out" / name) for name in ("one", "two"))
    for name in ("groups", "sensitivity", "loss", "timing", "plans"):
        assert one[1][name].equals(two[1][name]), name
    assert [r["sha256"] for r in one[0]["tables"]["timing"]] == [
        r["sha256"] for r in two[0]["tables"]["timing"]
    ]
    said = "".join(services.log(f"dask-{k}") for k in range(2))
    assert (
        sum(int(n) for n in re.findall(r"timing: measure .*: (\d+) computed", said))
        == one[1]["timing"].height
    ), "measured once each"
