"""A real Ray cluster of processes: the same tables as beside the flow, and what a cluster must have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_calibrate import ALWAYS, change, computed

from deployments.processes import Services, free_port
from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.report.runs import join_tables
from mpq.spec import RunSpec

pytest.importorskip("prefect_ray", reason="ray is not installed: pip install 'mpq[ray]'")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """The processes of a cluster, ended with the test."""
    with Services(tmp_path / "services") as services:
        yield services


def test_the_same_tables_as_beside_the_flow(
    spec: RunSpec, services: Services, tmp_path: Path
) -> None:
    """What is computed is equal to the bit; what is timed has the same rows; a rerun beside the flow finds everything."""
    local = join_tables(calibrate(spec)["tables"])
    runner = {"kind": "ray", "address": services.ray()}
    there = change(spec, runner=runner, store=(tmp_path / "other").as_uri(), timing={"slice": None})
    first = calibrate(there)
    assert computed(first) == ALWAYS | {"probe"}
    tables = join_tables(first["tables"])
    for name in ("groups", "sensitivity", "loss"):
        assert tables[name].equals(local[name]), name
    what = ["signature", "configuration", "instances", "device", "method", "batch", "length"]
    assert tables["timing"].select(what).equals(local["timing"].select(what))
    assert computed(calibrate(change(there, runner={"kind": "local", "address": None}))) == set()


def test_what_a_cluster_must_have(spec: RunSpec, services: Services) -> None:
    """One that answers, and an accelerator on it: each lack is a sentence."""
    with pytest.raises(MpqError, match="cannot be reached"):
        calibrate(change(spec, runner={"kind": "ray", "address": f"127.0.0.1:{free_port()}"}))
    runner = {"kind": "ray", "address": services.ray(workers=1, resources="{}")}
    with pytest.raises(MpqError, match="offers the resource accel"):
        calibrate(change(spec, runner=runner))
