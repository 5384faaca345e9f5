"""What `make ops-demo` shows, with a smaller checkpoint and a faster clock; what a person sees of it in Prefect's UI.

Its server, worker and cluster then serve what prefect.yaml promises: a trigger, and deployments with their forms.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import small
import yaml
from matplotlib.image import imread
from rich.console import Console
from small import ROOT, small_spec, write_checkpoint
from test_calibrate import change

from deployments.browser import CHROMIUM
from deployments.ops_demo import demonstrate
from deployments.processes import POOL, Services, until
from mpq.spec import RunSpec

DEPLOYMENTS = {"calibrate", "watch", "retune", "campaign"}


def left(home: Path, sessions: set[int]) -> list[str]:
    """The processes that were started for what lies in a folder, or in one of the sessions, and still run."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("PREFECT_HOME") == str(home / "prefect")
            # one that was forked shows the environment of the process that it was forked from
            if (ours or os.getsid(process.pid) in sessions) and (
                process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            pass
    return found


def triggered(services: Services, checkpoint: Path) -> dict[str, Any]:
    """The calibration that an event starts for the checkpoint that its payload names, once it has ended."""
    told = json.dumps({"checkpoint": str(checkpoint)})
    services.prefect(
        "event", "emit", "checkpoint.created", "--resource-id", "checkpoint.tiny", "--payload", told
    )
    run = services.ended("calibrate")
    assert run["state_type"] == "COMPLETED", (run["state"], services.log("worker"))
    body = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    tasks = services.post("task_runs/filter", {**body, "limit": 200})
    return {
        "run": run,
        "kinds": {a["key"] for a in services.post("artifacts/filter", body) if a["key"]},
        "states": {t["name"]: t["state_name"] for t in tasks},
    }


def deployed(services: Services) -> dict[str, Any]:
    """Deploy prefect.yaml as it is; what the server then has."""
    services.prefect("--no-prompt", "deploy", "--all")
    return {
        "deployments": {d["name"]: d for d in services.post("deployments/filter", {})},
        "automations": len(services.post("automations/filter", {})),
        "scheduled": until("scheduled runs", lambda: services.runs("watch", "SCHEDULED")),
    }


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One night, and what was to be seen of it while all was up."""
    folder = tmp_path_factory.mktemp("ops")
    home, console, seen = folder / "night", Console(file=io.StringIO(), width=110), dict[str, Any]()
    (home / "prefect").mkdir(parents=True)
    shutil.copy(small.DATABASE, home / "prefect" / "prefect.db")  # Prefect takes seconds to make it

    def look(services: Services, run: dict[str, Any]) -> None:
        seen["sessions"] = {process.pid for process in services.processes.values()}
        seen["running"] = left(home, seen["sessions"])
        seen["killed"] = [
            name for name, process in services.processes.items() if process.poll() == -9
        ]
        seen["watches"] = services.runs("watch", "COMPLETED")
        seen["stored"] = {path.split("/")[1] for path in services.bucket().find("team")}
        if CHROMIUM:
            from deployments.screenshots import take

            try:
                seen["pictures"] = take(services, run, folder / "pictures")
            except TimeoutError as error:  # told by the test that is about it
                seen["pictures"] = error
        seen["triggered"] = triggered(services, folder / "model")
        services.kill("worker")  # what is deployed next is not to be run
        seen["deployed"] = [deployed(services) for _ in range(2)]

    few = {
        "et": {"formats": ["bf16"], "strategies": ["ip"]},
        "m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]},
    }
    timing = {"slice": 4, "limit": 8, "repeats": 5, "rounds": 0}
    spec = change(small_spec(folder), timing=timing, objectives=few, taus=[0.01])
    stages = demonstrate(
        home,
        write_checkpoint(folder / "model"),
        spec,
        console,
        cron="* * * * * */15",
        before_the_end=look,
    )
    return {
        **seen,
        "stages": stages,
        "said": console.file.getvalue(),
        "left": left(home, seen["sessions"]),
    }


def test_a_night(night: dict[str, Any]) -> None:
    """Two checkpoints by schedule, a worker killed on the way, timing and partition reused for the second, nothing left running."""
    first, second = night["stages"]
    assert not any(
        first[stage][1]
        for stage in ("load_model", "partition", "sensitivity_shard", "time_configurations")
    )
    assert second["partition"] == (1, 1)
    for stage in (
        "load_model",
        "time_configurations",
    ):  # where every measurement is found there is no task that measures
        tasks, reused = second.get(stage, (0, 0))
        assert tasks == reused, stage
    assert second["sensitivity_shard"] == (2, 0)
    assert len(night["killed"]) == 1
    assert night["killed"][0] in ("dask-0", "dask-1")
    assert len(night["watches"]) >= 2
    assert all(run["auto_scheduled"] for run in night["watches"])
    assert night["stored"] == {"checkpoints", "mpq", "prefect"}
    for told in ("kill -9", "What the fine-tune changed", "ip_et", "stopped: server, s3"):
        assert told in night["said"]
    assert night["running"]
    assert night["left"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install Debian's package chromium")
def test_the_ui_shows_it(night: dict[str, Any]) -> None:
    """Flow run, task graph, cached states, artifacts and the form are on the pages, and in pictures of them."""
    assert isinstance(night["pictures"], list), night["pictures"]
    assert [p.stem for p in night["pictures"]] == [
        f"ui-{n}" for n in ("run", "tasks", "artifacts", "results", "frontier", "form")
    ]
    assert all(imread(path).shape[1] in (1280, 1024) for path in night["pictures"])


def test_an_event_starts_a_calibration(night: dict[str, Any]) -> None:
    """prefect.yaml's trigger starts calibrate for what the payload names, and it finds what watch has computed."""
    run = night["triggered"]["run"]
    assert run["parameters"]["checkpoint"].endswith("/model")
    assert run["created_by"]["type"] == "AUTOMATION"
    expected = {"results", "groups", "solutions", "evaluation", "frontier", "report", "plan"}
    assert expected <= night["triggered"]["kinds"]
    assert night["triggered"]["states"]["partition tiny-model"] == "Cached", (
        "watch has partitioned this architecture before"
    )


def test_everything_deploys(night: dict[str, Any]) -> None:
    """All four with their forms; watch gets scheduled runs; the trigger is there; deploying again changes nothing."""
    for found in night["deployed"]:
        assert set(found["deployments"]) == DEPLOYMENTS
        assert found["automations"] == 1
    forms = night["deployed"][-1]["deployments"]
    assert {d["work_pool_name"] for d in forms.values()} == {POOL}
    assert [s["schedule"]["cron"] for s in forms["watch"]["schedules"]] == ["*/15 * * * *"]
    assert len(night["deployed"][-1]["scheduled"]) >= 3
    form = forms["calibrate"]["parameter_openapi_schema"]
    assert "timing" in form["definitions"]["RunSpec"]["properties"]
    for name in DEPLOYMENTS:
        form = forms[name]["parameter_openapi_schema"]
        for part in (form, *form["definitions"].values()):
            for field, shown in part["properties"].items():
                assert shown.get("description"), f"{name}: {field}"
                assert {"type", "anyOf", "allOf", "$ref", "enum"} & set(shown), f"{name}: {field}"
        assert set(forms[name]["parameters"]) <= set(form["properties"]), (
            "what prefect.yaml gives fits the form"
        )


def test_the_demos_spec_is_deployed() -> None:
    """What prefect.yaml calibrates is examples/demo.yaml, word for word."""
    (spec,) = (
        d["parameters"]["spec"]
        for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
        if d["name"] == "calibrate"
    )
    written = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    assert RunSpec.model_validate(spec) == RunSpec.model_validate(written)
