"""What plans really do: losses of the base model, losses under each plan, everything in one table, and the report."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import polars as pl

from mpq.store.entries import Store, TableRef
from mpq.store.tables import table
from mpq.tasks.calibration import blocks_of, model_of
from mpq.tasks.checkpoint import at_hand
from mpq.tasks.device import exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, read, stage


@stage("base_losses", retries=1)
def evaluate_base(model: dict[str, str], blocks: TableRef, batch: int) -> Output:
    """The base model's loss of each evaluation sample."""
    from mpq.evaluation.losses import losses

    with exclusive(model["device"], alone=False):
        return {
            "base_losses": pl.DataFrame(
                {"loss": losses(model_of(**model), blocks_of(blocks), batch)}
            )
        }


@stage("plan_losses", retries=1)
def evaluate_plan(
    model: dict[str, str],
    formats: dict[str, str],
    blocks: TableRef,
    base_losses: TableRef,
    seed: int,
    batch: int,
    what: str,
) -> Output:
    """Loss MSE, drift and perplexity under one plan, its scales perturbed by one seed."""
    from mpq.evaluation.losses import evaluate_loss

    with exclusive(model["device"], alone=False), tracked(f"evaluate {what}") as progress:
        frame = evaluate_loss(
            model_of(**model),
            formats,
            blocks_of(blocks),
            read(base_losses)["loss"].to_numpy(),
            base=model["base"],
            seeds=[seed],
            batch=batch,
            progress=progress,
        )
    return {"plan_losses": frame}


@stage("task_scores", retries=1)
def evaluate_base_task(
    model: dict[str, str], task: str, data: str, data_dir: str | None, limit: int | None, batch: int
) -> Output:
    """The base model's scores on one harness task, document by document."""
    from mpq.evaluation.harness import score

    with exclusive(model["device"]):
        scores = score(
            model_of(**model),
            _tokenizer(**model),
            _opened(task, data_dir, data),
            limit=limit,
            batch=batch,
        )
    return {"task_scores": (scores.to_json().encode(), "json")}


@stage("plan_tasks", retries=1)
def evaluate_plan_task(
    model: dict[str, str],
    task: str,
    data: str,
    data_dir: str | None,
    limit: int | None,
    batch: int,
    formats: dict[str, str],
    seed: int,
    base_scores: TableRef,
    what: str,
) -> Output:
    """One harness task under one plan, its scales perturbed by one seed."""
    from mpq.evaluation.harness import Scores, evaluate_tasks

    with exclusive(model["device"]), tracked(f"{task} {what}") as progress:
        frame = evaluate_tasks(
            model_of(**model),
            _tokenizer(**model),
            formats,
            _opened(task, data_dir, data),
            base=model["base"],
            seeds=[seed],
            limit=limit,
            batch=batch,
            base_scores=Scores.from_json(Store(base_scores.store).read_bytes(base_scores)),
            progress=progress,
        )
    return {"plan_tasks": frame}


@lru_cache(maxsize=16)
def _opened(task: str, data_dir: str | None, data: str) -> Any:
    """The harness's task with its dataset read, kept for the next plan; `data` is the key of the dataset's content."""
    from mpq.evaluation.task_data import open_tasks

    with open_tasks([task], data_dir) as tasks:
        return tasks


@lru_cache(maxsize=1)
def _tokenizer(folder: str, fingerprint: str, base: str, device: str) -> Any:
    from mpq.models.text import load_tokenizer

    return load_tokenizer(at_hand(folder, fingerprint))


@stage("pace")
def measure_pace(model: dict[str, str], formats: dict[str, str], batch: int, length: int) -> Output:
    """Seconds per token of the model, in base and lowered."""
    from mpq.evaluation.pace import measure_pace as measure

    with exclusive(model["device"]):
        return {
            "pace": measure(
                model_of(**model), formats, base=model["base"], batch=batch, length=length
            )
        }


@stage("evaluation")
def collect_evaluation(plans: list[dict[str, Any]], ttft: TableRef | None) -> Output:
    """The evaluation table. `plans` say for each plan its identity, the tables measured of it, and its row of `ttft`."""
    seconds = read(ttft) if ttft else None
    frames = {ref.key: read(ref) for plan in plans for ref in plan["measured"]}
    rows: list[dict[str, object]] = []
    for plan in plans:
        who = {
            "strategy": plan["strategy"],
            "objective": plan["objective"],
            "tau": plan["tau"],
            "plan_seed": plan["seed"],
        }
        for ref in plan["measured"]:  # task scores name their task, the rest is the held-out text's
            rows += [
                {**who, "task": "loss", **row} for row in frames[ref.key].iter_rows(named=True)
            ]
        if seconds is not None and plan["ttft"] is not None:
            timed = seconds.row(plan["ttft"], named=True)
            measured = {
                "metric": "ttft_s",
                "value": timed["ttft_s"],
                "base_value": timed["base_ttft_s"],
            }
            rows.append({**who, "task": "loss", "seed": 0, **measured})
    return {"evaluation": table("evaluation", rows)}


@stage("report")
def write_report(tables: dict[str, list[TableRef]], title: str, facts: dict[str, str]) -> Output:
    """The HTML report, from tables alone."""
    from mpq.report.page import write_report as render

    together = {
        name: pl.concat([read(ref) for ref in refs], how="diagonal_relaxed")
        for name, refs in tables.items()
        if refs
    }
    return {"report": (render(together, title, facts).encode(), "html")}
