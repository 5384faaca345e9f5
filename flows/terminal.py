"""A flow run as a person at a terminal sees it: a line for each stage, bars for long ones, the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.flows.reproduce import reproduce
from mpq.flows.stages import listening
from mpq.paper.table_1 import table_1
from mpq.report.results import results_table
from mpq.report.runs import join_tables
from mpq.spec import RunSpec
from mpq.tasks.progress import terminal


def in_terminal(
    spec: RunSpec, console: Console, run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What the flow that `run` calls returns, its progress on `console`."""
    start = time.perf_counter()
    bars = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    def on_stage(name: str, tasks: int, cached: int, seconds: float) -> None:
        state = (
            "cached" if cached == tasks else f"{cached} of {tasks} cached" if cached else "computed"
        )
        bars.console.print(
            f"  [green]✓[/] {name:<14} {tasks:>3} task{'s' if tasks != 1 else ' '}  {state:<16} {seconds:6.1f} s",
            highlight=False,
        )

    def on_text(text: str) -> None:
        for line in text.splitlines():
            bars.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    console.print(
        f"[bold]{spec.name}[/]: {spec.model.path} in {spec.model.base} → {', '.join(spec.formats)}; store {spec.store}",
        highlight=False,
    )
    logging.getLogger("prefect").propagate = False
    with terminal(bars), listening(on_stage, on_text):
        try:
            outcome = run()
        except (RuntimeError, httpx.ConnectError) as error:
            if "ephemeral" not in str(error) and not isinstance(error, httpx.ConnectError):
                raise
            raise MpqError(
                "Prefect's own server cannot be reached or did not start: see its reason with `prefect server start`, "
                "then set PREFECT_API_URL to it, or unset PREFECT_API_URL to have one started for the run."
            ) from error
    console.print(f"[bold]done[/] in {time.perf_counter() - start:.1f} s", highlight=False)
    return outcome


def run_in_terminal(spec: RunSpec, console: Console) -> tuple[pl.DataFrame, dict[str, str]]:
    """Run the pipeline with its progress on `console`; returns the results table and the paths of what was written."""
    outcome = in_terminal(spec, console, lambda: calibrate(spec))
    return results_table(join_tables(outcome["tables"])), outcome["out"]


def reproduce_in_terminal(
    spec: RunSpec, console: Console, dry_run: bool
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Run the sweep with its cost and progress on `console`; returns Table 1, or the forecast of a dry run, and the paths."""
    outcome = in_terminal(spec, console, lambda: reproduce(spec, dry_run=dry_run))
    if dry_run:
        return pl.DataFrame(outcome["forecast"], infer_schema_length=None), {}
    return table_1(join_tables(outcome["tables"])), outcome["out"]
