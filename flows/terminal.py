"""A flow run as a person at a terminal sees it: a line for each stage, bars for long ones, the results."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import httpx
import polars as pl
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpq.errors import MpqError, first_line
from mpq.flows.calibrate import calibrate
from mpq.flows.interruption import awaited, when_interrupted
from mpq.flows.reproduce import reproduce
from mpq.flows.run import listening
from mpq.paper.table_1 import table_1
from mpq.report.best import best_plan, in_words
from mpq.report.results import results_table
from mpq.report.runs import join_tables
from mpq.spec import RunSpec, estimate
from mpq.tasks.progress import terminal


def in_terminal(
    spec: RunSpec, console: Console, ready: Callable[[], None], flow: Flow[..., Any], **more: Any
) -> dict[str, Any]:
    """What the flow returns for the spec, its progress on `console`; `ready` waits for Prefect's server."""
    start = time.perf_counter()
    bars = Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    stages, runs = list[str](), list[FlowRun]()

    def on_stage(name: str, tasks: int, cached: int, seconds: float) -> None:
        state = (
            "cached" if cached == tasks else f"{cached} of {tasks} cached" if cached else "computed"
        )
        again = name in stages and cached == tasks
        stages.append(name)
        if again:  # rounds ask for the same once more
            return
        bars.console.print(
            f"  [green]✓[/] {name:<25} {tasks:>3} task{'s' if tasks != 1 else ' '}  {state:<16} {seconds:6.1f} s",
            highlight=False,
        )

    def on_text(text: str) -> None:
        for line in text.splitlines():
            bars.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    def begun(flow: Any, flow_run: FlowRun, state: Any) -> None:
        runs.append(flow_run)

    def stopped() -> str:
        bars.stop()
        console.quiet = True  # the flow goes on until the process ends
        return f"{len(stages)} stage{'s are' if len(stages) != 1 else ' is'} stored in {spec.store}"

    console.print(
        f"{spec.title}: {spec.model.path} in {spec.model.base} → {', '.join(spec.formats)}; store {spec.store}",
        highlight=False,
        markup=False,
        style="bold",
    )
    console.print(f"  on {spec.model.device}: {estimate(spec)}", highlight=False, markup=False)
    import_module("mpq.models.graph")  # takes a second or two, and so does the server to start
    ready()
    with (
        when_interrupted(lambda: _cancel(runs)),
        when_interrupted(stopped),
        terminal(bars),
        listening(on_stage, on_text),
    ):
        outcome: dict[str, Any] = _beside(flow.with_options(on_running=[begun]), spec, **more)
    console.print(f"[bold]done[/] in {time.perf_counter() - start:.1f} s", highlight=False)
    return outcome


def _beside(flow: Flow[..., Any], *args: Any, **more: Any) -> Any:
    """What the flow returns, run in another thread: this one stays free for signals, which Prefect would take over to
    wait for tasks that nothing can interrupt."""
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="flow") as thread:
        try:
            return awaited(thread.submit(context.run, flow, *args, **more))
        except httpx.TransportError as error:
            raise MpqError(
                f"Prefect's server can no longer be reached ({first_line(error)}): what was done is stored, run the same "
                "command again once it can."
            ) from error


def _cancel(runs: list[FlowRun]) -> None:
    """Tell Prefect's server, which may live on, that these runs have ended."""
    with get_client(httpx_settings={"timeout": 2}, sync_client=True) as client:
        for run in runs:
            client.set_flow_run_state(run.id, Cancelled(message="Interrupted."), force=True)


def run_in_terminal(
    spec: RunSpec, console: Console, ready: Callable[[], None]
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Run the pipeline with its progress on `console`; returns the results table, and the paths of what was written with
    a sentence on the plan to run behind them."""
    outcome = in_terminal(spec, console, ready, calibrate)
    tables = join_tables(outcome["tables"])
    return results_table(tables), {**outcome["out"], "best": in_words(best_plan(tables))}


def reproduce_in_terminal(
    spec: RunSpec, console: Console, ready: Callable[[], None], dry_run: bool
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Run the sweep with its cost and progress on `console`; returns Table 1, or the forecast of a dry run, and the paths."""
    outcome = in_terminal(spec, console, ready, reproduce, dry_run=dry_run)
    if dry_run:
        return pl.DataFrame(outcome["forecast"], infer_schema_length=None), {}
    return table_1(join_tables(outcome["tables"])), outcome["out"]
