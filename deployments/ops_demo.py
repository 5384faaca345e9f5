"""A team's night on one machine: checkpoints dropped into S3 are calibrated by schedule on a Dask cluster that loses a worker.

    python -m deployments.ops_demo [--stay] [--screenshots FOLDER]

Everything listens on loopback alone and is stopped at the end; plans, reports and logs stay in .work/ops-demo.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deployments.processes import POOL, ROOT, Services, until
from mpq.spec import RunSpec, TextSpec, load_spec

BUCKET = "team"
CHECKPOINTS = f"s3://{BUCKET}/checkpoints"
MINUTES = "* * * * *"  # prefect.yaml has every 15 minutes
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
BEGUN = ("PENDING", "RUNNING", *OVER)


class Night:
    """The services of one demonstration, and what it does with them; says on `console` what happens."""

    def __init__(self, services: Services, spec: RunSpec, console: Console):
        self.services, self.console = services, console
        self.dask = ""
        self.spec = spec.model_copy(
            update={"store": f"s3://{BUCKET}/mpq", "out": str(services.home / "runs")}
        )
        self.shown: set[str] = set()  # ids of calibrations

    def say(self, text: str) -> None:
        """A line on the console."""
        self.console.print(f"[bold]•[/] {text}", highlight=False)

    def open(self, cron: str) -> None:
        """Start every process, and deploy."""
        services = self.services
        self.say(f"Prefect server: {services.server().removesuffix('/api')}")
        self.say(
            f"S3 server: {services.s3(BUCKET)}, bucket {BUCKET}, for checkpoints, tables and Prefect's results"
        )
        services.keep_results(f"s3://{BUCKET}/prefect")
        self.dask = services.dask(workers=2)
        self.say(f"Dask cluster: {self.dask}, two workers with one accelerator each")
        services.prefect("work-pool", "create", POOL, "--type", "process")
        spec = self.spec.model_dump(mode="json") | {
            "runner": {"kind": "dask", "address": self.dask}
        }
        watch = {
            "parameters": {"urls": [CHECKPOINTS], "spec": spec, "settle_s": 1},
            "schedules": [{"cron": cron, "timezone": "UTC", "active": False}],
        }
        services.bucket().touch(
            f"{BUCKET}/checkpoints/README"
        )  # a folder that is not there is a mistake
        services.deploy(
            {
                "watch": watch,
                "calibrate": {"parameters": {"spec": spec}},
                "retune": {"parameters": {"spec": spec}},
            }
        )
        services.worker()
        self.say(
            f"deployed {', '.join(sorted(d['name'] for d in services.post('deployments/filter', {})))}; a worker polls the pool"
        )

    def drop(self, folder: Path, name: str) -> None:
        """Put a checkpoint where watch looks."""
        self.services.bucket().put(f"{folder}/", f"{BUCKET}/checkpoints/{name}/", recursive=True)
        self.say(
            f"dropped {CHECKPOINTS}/{name}; nobody starts anything: the schedule of watch does"
        )
        self.watch_by_schedule()

    def watch_by_schedule(self) -> None:
        """The schedule of watch is on until it has started a run: others beside that one would find nothing new, and disturb
        what it times."""
        watch = self.services.get("deployments/name/watch/watch")
        schedule = f"deployments/{watch['id']}/schedules/{watch['schedules'][0]['id']}"
        before = len(self.services.runs("watch", *BEGUN))
        self.services.ask("PATCH", schedule, {"active": True})
        until("a scheduled watch", lambda: len(self.services.runs("watch", *BEGUN)) > before, 300)
        self.services.ask("PATCH", schedule, {"active": False})

    def begun(self) -> dict[str, Any]:
        """Wait for a calibration that has not been seen yet to begin; returns its flow run."""
        body = {
            "flows": {"name": {"any_": ["calibrate"]}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 20,
        }

        def new() -> dict[str, Any] | None:
            runs = self.services.post("flow_runs/filter", body)
            fresh = (r for r in runs if r["id"] not in self.shown)
            return next(
                (r for r in fresh if r["name"].startswith(self.spec.name)), None
            )  # it has its name once it runs

        run: dict[str, Any] = until("a scheduled calibration", new, 300)
        self.shown.add(run["id"])
        watch = self.parent(run)
        self.say(
            f"scheduled run [cyan]{watch['name']}[/] ({watch['id'][:8]}) found it and calibrates as [cyan]{run['name']}[/]"
        )
        return run

    def parent(self, run: dict[str, Any]) -> dict[str, Any]:
        """The flow run that a flow run is part of."""
        task = self.services.get(f"task_runs/{run['parent_task_run_id']}")
        return dict(self.services.get(f"flow_runs/{task['flow_run_id']}"))

    def kill_a_busy_worker(self) -> None:
        """kill -9 of the Dask worker that measures just now, and another one in its place."""
        from distributed import Client

        with Client(self.dask, set_as_default=False) as client:
            names = {
                address: w["name"]
                for address, w in client.scheduler_info(n_workers=-1)["workers"].items()
            }

            def timing() -> tuple[str, str] | None:
                busy = ((names[a], key) for a, keys in client.processing().items() for key in keys)
                return next(
                    ((name, key) for name, key in busy if key.startswith("time_configurations")),
                    None,
                )

            name, _ = until("a timing on a worker", timing, 300, 0.1)
            self.services.kill(name)
        self.say(
            f"[red]kill -9[/] of Dask worker {name} in the middle of a timing; dask-late joins in its place"
        )
        self.services.dask_worker(self.dask, "dask-late")

    def ended(self, run: dict[str, Any]) -> dict[str, Any]:
        """Wait for a calibration and the watch around it; returns the watch. Raises RuntimeError with the worker's log."""
        watch = self.parent(run)
        watch = until(
            "the end of watch",
            lambda: (
                (r := self.services.get(f"flow_runs/{watch['id']}"))["state_type"] in OVER and r
            ),
            600,
            1.0,
        )
        if watch["state_type"] != "COMPLETED":
            raise RuntimeError(
                f"{watch['name']} ended as {watch['state_name']}: {self.services.log('worker')}"
            )
        return watch

    def stages(self, run: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """For each stage of a calibration, in the order of its start: how many tasks it had, and how many were reused."""
        body = {
            "flow_runs": {"id": {"any_": [run["id"]]}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": 200,
        }
        # the server records tasks from a queue of events: the last ones may come after the run has ended
        tasks = until(
            "the tasks' states",
            lambda: (
                (t := self.services.post("task_runs/filter", body))
                and all(x["end_time"] for x in t)
                and t
            ),
            60,
        )
        counts: dict[str, tuple[int, int]] = {}
        for task in tasks:
            stage = task["task_key"].rpartition("-")[0]
            number, reused = counts.get(stage, (0, 0))
            counts[stage] = (number + 1, reused + (task["state_name"] == "Cached"))
        return counts

    def artifact(self, run: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """The rows of a table that a flow run has published."""
        found = self.services.post(
            "artifacts/filter",
            {"flow_runs": {"id": {"any_": [run["id"]]}}, "artifacts": {"key": {"any_": [key]}}},
        )
        return list(json.loads(found[0]["data"])) if found else []

    def show(self, title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
        """Some columns of some rows as a table, under other names."""
        table = Table(title=title, title_justify="left", title_style="bold", header_style="")
        for heading in columns.values():
            table.add_column(heading)
        for row in rows:
            cells = (row.get(column) for column in columns)
            table.add_row(
                *(
                    f"{c:.3g}" if isinstance(c, float) else "" if c is None else str(c)
                    for c in cells
                )
            )
        self.console.print(table)

    def show_stages(self, run: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """The table of a calibration's stages; returns them."""
        stages = self.stages(run)
        rows = [{"stage": name, "tasks": n, "reused": hits} for name, (n, hits) in stages.items()]
        self.show(
            f"What {run['name']} computed",
            rows,
            {"stage": "stage", "tasks": "tasks", "reused": "of them reused"},
        )
        return stages


RESULTS = {
    "strategy": "strategy",
    "tau": "τ",
    "predicted_loss_mse": "loss MSE predicted",
    "measured_loss_mse": "measured",
    "predicted_ttft_s": "TTFT predicted (s)",
    "measured_ttft_s": "measured",
    "base_ttft_s": "base",
    "share_lowered": "share lowered",
}
CHANGES = {
    "strategy": "strategy",
    "tau": "τ",
    "ops_moved": "ops moved",
    "gain_difference": "gain difference",
    "predicted_loss_mse_difference": "loss MSE difference",
}
Stages = dict[str, tuple[int, int]]


def demonstrate(
    home: Path,
    checkpoint: Path,
    spec: RunSpec,
    console: Console,
    cron: str = MINUTES,
    before_the_end: Callable[[Services, dict[str, Any]], None] = lambda services, run: None,
) -> tuple[Stages, Stages]:
    """The whole night; returns the stages of the first and the second calibration, as (tasks, reused).

    `before_the_end` is called with the services and the second calibration's flow run while all is still up.
    """
    with Services(home) as services:
        night = Night(services, spec, console)
        night.open(cron)
        night.drop(checkpoint, "first")
        first = night.begun()
        night.kill_a_busy_worker()
        night.ended(first)
        one = night.show_stages(first)
        night.show(
            f"Result of {first['name']}, as published in Prefect",
            night.artifact(first, "results"),
            RESULTS,
        )
        night.say(
            "(times of two workers and a server on one machine: to see that they are there, not to plan by)"
        )
        night.drop(fine_tuned(checkpoint, home / "fine-tuned", spec.calibration), "second")
        second = night.begun()
        watch = night.ended(second)
        two = night.show_stages(second)
        night.say(
            "other weights, the same architecture: partition and every timed configuration were reused"
        )
        night.show("What the fine-tune changed", night.artifact(watch, "changes"), CHANGES)
        before_the_end(services, second)
        night.say(f"plans and reports are in {night.spec.out}")
    night.say(f"stopped: {', '.join(services.processes)}")
    return one, two


def fine_tuned(
    source: Path, folder: Path, text: TextSpec, steps: int = 8, rate: float = 1e-3
) -> Path:
    """A copy of a checkpoint in `folder` after some steps of AdamW on the calibration text."""
    import torch

    from mpq.models.checkpoint import load_config
    from mpq.models.loading import load_model
    from mpq.models.text import read_blocks

    config = load_config(source)
    batches = list(read_blocks(text, source, config.get_text_config().vocab_size).batches(4))
    model = load_model(source, "fp32").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for k in range(steps):
        tokens = batches[k % len(batches)]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.to(config.dtype or torch.float32).save_pretrained(folder)
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stay",
        action="store_true",
        help="leave everything up until Enter is pressed, to look around in Prefect's UI",
    )
    parser.add_argument(
        "--screenshots",
        type=Path,
        help="open Prefect's UI in Chromium and write what it shows into this folder",
    )
    options = parser.parse_args()
    console = Console(width=max(Console().width, 110))  # the tables need it

    def look(services: Services, run: dict[str, Any]) -> None:
        if options.screenshots:
            from deployments.screenshots import take

            console.print(
                f"screenshots: {', '.join(str(p) for p in take(services, run, options.screenshots))}",
                highlight=False,
            )
        if options.stay:
            console.input(f"look at {services.api.removesuffix('/api')} and press Enter to end ")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` ends what was started
    home = ROOT / ".work" / "ops-demo"
    shutil.rmtree(home, ignore_errors=True)
    spec = load_spec(ROOT / "deployments" / "ops_demo.yaml")
    demonstrate(home, ROOT / spec.model.path, spec, console, before_the_end=look)


if __name__ == "__main__":
    main()
