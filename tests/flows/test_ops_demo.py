"""What `make ops-demo` shows, with a smaller checkpoint and a faster clock."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import psutil
from models import write_checkpoint
from rich.console import Console
from test_calibrate import change

from deployments.ops_demo import demonstrate
from deployments.processes import Services
from mpq.spec import RunSpec


def left(home: Path) -> list[str]:
    """The processes that were started for what lies in a folder and still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == str(home / "prefect") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            pass
    return found


def test_a_night(spec: RunSpec, tmp_path: Path) -> None:
    """Two checkpoints by schedule, a worker killed on the way, timing and partition reused for the second, nothing left running."""
    console = Console(file=io.StringIO(), width=110)
    seen: dict[str, Any] = {}

    def look(services: Services, run: dict[str, Any]) -> None:
        seen["running"] = left(tmp_path / "night")
        seen["killed"] = [name for name, process in services.processes.items() if process.poll() == -9]
        seen["watches"] = services.runs("watch", "COMPLETED")
        seen["stored"] = {path.split("/")[1] for path in services.bucket().find("team")}

    few = {"et": {"formats": ["bf16"], "strategies": ["ip"]}, "m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]}}
    spec = change(spec, timing={"slice": 4, "limit": 8, "repeats": 5, "rounds": 0}, objectives=few, taus=[0.01])
    checkpoint = write_checkpoint(tmp_path / "model")
    first, second = demonstrate(tmp_path / "night", checkpoint, spec, console, cron="* * * * * */20", before_the_end=look)
    assert not any(first[stage][1] for stage in ("load_model", "partition", "sensitivity_shard", "time_configurations"))
    for stage in ("load_model", "partition", "time_configurations"):
        tasks, reused = second[stage]
        assert tasks == reused, stage
    assert second["sensitivity_shard"] == (2, 0)
    assert len(seen["killed"]) == 1
    assert seen["killed"][0] in ("dask-0", "dask-1")
    assert all(run["auto_scheduled"] for run in seen["watches"])
    assert seen["stored"] == {"checkpoints", "mpq", "prefect"}
    said = console.file.getvalue()
    for told in ("kill -9", "What the fine-tune changed", "ip_et", "stopped: server, s3"):
        assert told in said
    assert seen["running"]
    assert left(tmp_path / "night") == []
