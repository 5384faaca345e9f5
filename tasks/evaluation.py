"""What plans really do: losses of the base model, losses under each plan, everything in one table, and the report."""

from __future__ import annotations

from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.spec import EvaluationSpec
from mpq.store import Store, TableRef
from mpq.tables import table
from tasks.calibration import blocks_of, model_of
from tasks.checkpoint import at_hand
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


@stage("task_scores")
def evaluate_base_tasks(model: dict[str, str], spec: EvaluationSpec) -> Output:
    """The base model's scores on the harness tasks, document by document."""
    from mpq.harness import score
    from mpq.task_data import open_tasks

    with exclusive(model["device"]), open_tasks(spec.tasks, spec.data_dir) as opened:
        scores = score(model_of(**model), _tokenizer(model), opened, limit=spec.task_limit, batch=spec.batch)
    return {"task_scores": (scores.to_json().encode(), "json")}


@stage("plan_tasks", retries=1)
def evaluate_plan_tasks(
    model: dict[str, str], formats: dict[str, str], spec: EvaluationSpec, base_scores: TableRef, what: str
) -> Output:
    """The harness tasks under one plan, for each seed."""
    from mpq.harness import Scores, evaluate_tasks

    with exclusive(model["device"]), tracked(f"tasks {what}") as progress:
        frame = evaluate_tasks(
            model_of(**model), _tokenizer(model), formats, spec.tasks, base=model["base"], seeds=range(spec.seeds), data_dir=spec.data_dir,
            limit=spec.task_limit, batch=spec.batch, base_scores=Scores.from_json(Store(base_scores.store).read_bytes(base_scores)), progress=progress,
        )  # fmt: skip
    return {"plan_tasks": frame}


def _tokenizer(model: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    folder = at_hand(model["folder"], model["fingerprint"])
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise MpqError(
            f"{folder} has no tokenizer that can be read ({reason}): harness tasks need one; leave `tasks` out."
        ) from None


@stage("evaluation")
def collect_evaluation(
    plans: list[dict[str, Any]], losses: list[TableRef], ttft: TableRef | None, scores: list[TableRef]
) -> Output:
    """The evaluation table. `plans` say for each plan its identity and where its losses, task scores and TTFT are to be found."""
    seconds = read(ttft) if ttft else None
    frames, scored = [read(ref) for ref in losses], [read(ref) for ref in scores]
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
        rows += [{**who, **row} for row in scored[plan["losses"]].iter_rows(named=True)] if scored else []
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
