"""What plans really do: losses of the base model, losses under each plan, everything in one table, and the report."""

from __future__ import annotations

from typing import Any

import polars as pl

from mpq.store import TableRef
from mpq.tables import table
from tasks.calibration import blocks_of, model_of
from tasks.device import exclusive
from tasks.progress import tracked
from tasks.stage import Output, read, stage


@stage("base_losses")
def evaluate_base(model: dict[str, str], blocks: TableRef, batch: int) -> Output:
    """The base model's loss of each evaluation sample."""
    from mpq.evaluate import losses

    with exclusive(model["device"], alone=False):
        return {"base_losses": pl.DataFrame({"loss": losses(model_of(**model), blocks_of(blocks), batch)})}


@stage("plan_losses", retries=1)
def evaluate_plan(
    model: dict[str, str], formats: dict[str, str], blocks: TableRef, base_losses: TableRef, seeds: int, batch: int, what: str
) -> Output:
    """Loss MSE, drift and perplexity under one plan, for each seed."""
    from mpq.evaluate import evaluate_loss

    with exclusive(model["device"], alone=False), tracked(f"evaluate {what}") as progress:
        frame = evaluate_loss(
            model_of(**model), formats, blocks_of(blocks), read(base_losses)["loss"].to_numpy(), base=model["base"],
            seeds=range(seeds), batch=batch, progress=progress,
        )  # fmt: skip
    return {"plan_losses": frame}


@stage("evaluation")
def collect_evaluation(plans: list[dict[str, Any]], losses: list[TableRef], ttft: TableRef | None) -> Output:
    """The evaluation table. `plans` say for each plan its identity and where its losses and its TTFT are to be found."""
    seconds = read(ttft) if ttft else None
    frames = [read(ref) for ref in losses]
    rows: list[dict[str, object]] = []
    for plan in plans:
        who = {
            "strategy": plan["strategy"],
            "objective": plan["objective"],
            "tau": plan["tau"],
            "plan_seed": plan["seed"],
            "task": "loss",
        }
        rows += [{**who, **row} for row in frames[plan["losses"]].iter_rows(named=True)]
        if seconds is not None and plan["ttft"] is not None:
            timed = seconds.row(plan["ttft"], named=True)
            rows.append({**who, "seed": 0, "metric": "ttft_s", "value": timed["ttft_s"], "base_value": timed["base_ttft_s"]})
    return {"evaluation": table("evaluation", rows)}


@stage("report")
def write_report(tables: dict[str, list[TableRef]], title: str, facts: dict[str, str]) -> Output:
    """The HTML report, from tables alone."""
    from mpq.report import write_report as render

    together = {name: pl.concat([read(ref) for ref in refs], how="diagonal_relaxed") for name, refs in tables.items() if refs}
    return {"report": (render(together, title, facts).encode(), "html")}
