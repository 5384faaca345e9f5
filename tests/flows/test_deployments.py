"""prefect.yaml against a real server, and a worker that executes what it schedules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small import ROOT, short, write_checkpoint

from deployments.processes import POOL, Services, until
from mpq.spec import RunSpec

DEPLOYMENTS = {"calibrate", "watch", "retune", "campaign"}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """A fresh server with the work pool."""
    with Services(tmp_path_factory.mktemp("services")) as services:
        services.server()
        services.prefect("work-pool", "create", POOL, "--type", "process")
        yield services


def test_a_worker_executes_scheduled_and_triggered_runs(
    services: Services, spec: RunSpec, tmp_path: Path
) -> None:
    """watch starts by its schedule and calibrates what it finds; an event starts calibrate for what its payload names."""
    tiny = short(spec).model_dump(mode="json")
    write_checkpoint(tmp_path / "checkpoints" / "one", seed=1)
    services.deploy(
        {
            "calibrate": {"parameters": {"spec": tiny}},
            "watch": {
                "parameters": {
                    "urls": [str(tmp_path / "checkpoints")],
                    "spec": tiny,
                    "settle_s": 0,
                },
                "schedules": [
                    {"interval": 3600, "anchor_date": "2020-01-01T00:00:00Z", "active": False}
                ],
            },
        }
    )
    services.worker()

    watch = services.get("deployments/name/watch/watch")
    schedule = watch["schedules"][0]["id"]
    every = {"schedule": {"interval": 20, "anchor_date": "2020-01-01T00:00:00Z"}, "active": True}
    services.ask("PATCH", f"deployments/{watch['id']}/schedules/{schedule}", every)
    run = services.ended("watch")
    services.ask("PATCH", f"deployments/{watch['id']}/schedules/{schedule}", {"active": False})
    assert run["state_type"] == "COMPLETED", services.log("worker")
    assert run["auto_scheduled"]

    told = json.dumps({"checkpoint": spec.model.path})
    services.prefect(
        "event", "emit", "checkpoint.created", "--resource-id", "checkpoint.tiny", "--payload", told
    )
    run = services.ended("calibrate")
    assert run["state_type"] == "COMPLETED", services.log("worker")
    assert run["parameters"]["checkpoint"] == spec.model.path
    assert run["created_by"]["type"] == "AUTOMATION"
    assert len(list((tmp_path / "out").glob("*/report.html"))) == 2
    record = json.loads((tmp_path / "out" / "tiny-model" / "run.json").read_text())
    assert record["facts"]["model"] == spec.model.path
    body = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    kinds = {a["key"] for a in services.post("artifacts/filter", body) if a["key"]}
    assert {"results", "groups", "solutions", "evaluation", "frontier", "report", "plan"} <= kinds
    states = {
        t["name"]: t["state_name"]
        for t in services.post("task_runs/filter", {**body, "limit": 200})
    }
    assert states["partition tiny-model"] == "Cached", (
        "watch has partitioned this architecture before"
    )
    services.kill("worker")  # what is deployed next is not to be run


def test_everything_deploys(services: Services) -> None:
    """All four with their forms; watch gets scheduled runs; the trigger is there; deploying again changes nothing."""
    for _ in range(2):
        services.prefect("--no-prompt", "deploy", "--all")
        deployed = {d["name"]: d for d in services.post("deployments/filter", {})}
        assert set(deployed) == DEPLOYMENTS
        assert len(services.post("automations/filter", {})) == 1
    assert {d["work_pool_name"] for d in deployed.values()} == {POOL}
    assert [s["schedule"]["cron"] for s in deployed["watch"]["schedules"]] == ["*/15 * * * *"]
    runs = until("scheduled runs", lambda: services.runs("watch", "SCHEDULED"))
    assert len(runs) >= 3
    form = deployed["calibrate"]["parameter_openapi_schema"]
    assert "timing" in form["definitions"]["RunSpec"]["properties"]
    for name in DEPLOYMENTS:
        form = deployed[name]["parameter_openapi_schema"]
        for part in (form, *form["definitions"].values()):
            for field, shown in part["properties"].items():
                assert shown.get("description"), f"{name}: {field}"
                assert {"type", "anyOf", "allOf", "$ref", "enum"} & set(shown), f"{name}: {field}"
        assert set(deployed[name]["parameters"]) <= set(form["properties"]), (
            "what prefect.yaml gives fits the form"
        )
    spec = deployed["calibrate"]["parameters"]["spec"]
    written = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    assert RunSpec.model_validate(spec) == RunSpec.model_validate(written), (
        "prefect.yaml and examples/demo.yaml differ"
    )
