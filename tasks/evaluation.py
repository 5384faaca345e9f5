"""What plans really do: losses of the base model, losses under each plan, everything in one table, and the report."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.store.entries import Store, TableRef
from mpq.store.tables import table
from mpq.tasks.calibration import blocks_of
from mpq.tasks.checkpoint import Weights, at_hand, loaded
from mpq.tasks.device import exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, read, read_together, stage


@stage("base_losses", on="workers", free=["batch"], retries=1)
def evaluate_base(weights: Weights, blocks: TableRef, batch: int) -> Output:
    """The base model's loss of each evaluation sample."""
    from mpq.evaluation.losses import losses

    with exclusive(weights.device, alone=False):
        found = losses(loaded(weights), blocks_of(blocks), batch)
    return {"base_losses": pl.DataFrame({"loss": found})}


@stage(
    "plan_losses", name="evaluate", on="workers", free=["base_losses", "batch", "what"], retries=1
)
def evaluate_plan(
    weights: Weights,
    formats: dict[str, str],
    blocks: TableRef,
    base_losses: TableRef,
    seed: int,
    batch: int,
    what: str,
) -> Output:
    """Loss MSE, drift and perplexity under one plan, its scales perturbed by one seed; with seed 0 its KL as well."""
    from mpq.evaluation.losses import evaluate_loss

    with exclusive(weights.device, alone=False), tracked(f"evaluate {what}") as progress:
        frame = evaluate_loss(
            loaded(weights),
            formats,
            blocks_of(blocks),
            read(base_losses)["loss"].to_numpy(),
            base=weights.base,
            seeds=[seed],
            batch=batch,
            kl=seed == 0,
            predicted=_predicted(weights, blocks, batch) if seed == 0 else None,
            progress=progress,
        )
    return {"plan_losses": frame}


@stage("block_kl", name="check", on="workers", free=["batch", "what"], retries=1)
def measure_kl(
    weights: Weights, formats: dict[str, str], blocks: TableRef, batch: int, what: str
) -> Output:
    """KL divergence of a plan from base on each block of a text, nats per predicted token."""
    from mpq.evaluation.losses import divergences

    with exclusive(weights.device, alone=False):
        found = divergences(
            loaded(weights),
            formats,
            blocks_of(blocks),
            base=weights.base,
            batch=batch,
            predicted=_predicted(weights, blocks, batch),
        )
    return {"block_kl": pl.DataFrame({"kl": found})}


@lru_cache(maxsize=1)
def _predicted(weights: Weights, blocks: TableRef, batch: int) -> Any:
    """What base predicts, kept for the next plan on the same text."""
    from mpq.evaluation.losses import base_predictions

    return base_predictions(loaded(weights), blocks_of(blocks), batch)


def _scored(
    weights: Weights,
    task: str,
    data: str,
    limit: int | None,
    formats: Any = None,
    seed: int = 0,
    **_: Any,
) -> Any:
    """The model, the plan, the task's documents by their content, and the harness that scores them."""
    from mpq.evaluation.task_data import harness_version

    return weights, formats, seed, task, data, limit, harness_version()


@stage("task_scores", name="tasks base", on="workers", key=_scored, retries=1)
def evaluate_base_task(
    weights: Weights, task: str, data: str, data_dir: str | None, limit: int | None, batch: int
) -> Output:
    """The base model's scores on one harness task, document by document."""
    from mpq.evaluation.harness import score

    with exclusive(weights.device):
        opened = _opened(task, data_dir, data)
        scores = score(loaded(weights), _tokenizer(weights), opened, limit=limit, batch=batch)
    return {"task_scores": (scores.to_json().encode(), "json")}


@stage("plan_tasks", name="tasks", on="workers", key=_scored, retries=1)
def evaluate_plan_task(
    weights: Weights,
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

    with exclusive(weights.device), tracked(f"{task} {what}") as progress:
        frame = evaluate_tasks(
            loaded(weights),
            _tokenizer(weights),
            formats,
            _opened(task, data_dir, data),
            base=weights.base,
            seeds=[seed],
            limit=limit,
            batch=batch,
            base_scores=Scores.from_json(Store(base_scores.store).read_bytes(base_scores)),
            progress=progress,
        )
    return {"plan_tasks": frame}


@lru_cache(maxsize=16)
def _opened(task: str, data_dir: str | None, data: str) -> Any:
    """The harness's task with its dataset read, kept for the next plan; `data` is the key of the dataset's content.

    Raises MpqError where files of another content lie there now: hours may have passed since the key was taken.
    """
    from mpq.evaluation.task_data import data_key, open_tasks

    with open_tasks([task], data_dir) as tasks:
        if data_dir and data_key([task], data_dir) != data:
            raise MpqError(
                f"The files of task {task} in {data_dir} changed since the run began: run it again for those that are there now."
            )
        return tasks


@lru_cache(maxsize=1)
def _tokenizer(weights: Weights) -> Any:
    from mpq.models.text import load_tokenizer

    here = at_hand(weights.source, weights.fingerprint, weights.trusted)
    try:
        return load_tokenizer(here, weights.trusted)
    except MpqError as error:
        raise MpqError(
            f"Harness tasks need a tokenizer; leave `tasks` out, or mend this: {error}"
        ) from None


@stage("pace", name="pace", on="workers")
def measure_pace(
    weights: Weights, formats: dict[str, str], batch: int, length: int, at: tuple[str, int]
) -> Output:
    """Seconds per token of the model, in base and lowered, on a kind of device in some hour: `at`, since what else a machine
    does changes."""
    from mpq.evaluation.pace import measure_pace as measure

    with exclusive(weights.device):
        pace = measure(loaded(weights), formats, base=weights.base, batch=batch, length=length)
    return {"pace": pace}


@stage("evaluation", name="collect")
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
            rows += [{**who, "task": "loss"} | row for row in frames[ref.key].iter_rows(named=True)]
        if seconds is not None and plan["ttft"] is not None:
            timed = seconds.row(plan["ttft"], named=True)
            bases = dict.fromkeys(
                ("ttft_s", "gain_s", "gain_ci_low_s", "gain_ci_high_s"), "base_ttft_s"
            )
            for metric, base in (bases | {"tpot_s": "base_tpot_s"}).items():
                if metric in timed:
                    measured = {"metric": metric, "value": timed[metric], "base_value": timed[base]}
                    rows.append({**who, "seed": 0, "task": "loss", **measured})
    return {"evaluation": table("evaluation", rows)}


def _with_template(**inputs: Any) -> Any:
    """Everything, and the page's template."""
    template = files("mpq.report") / "templates" / "report.html.j2"
    return inputs, template.read_text(encoding="utf-8")


@stage("report", "frontier", name="report", key=_with_template)
def write_report(tables: dict[str, list[TableRef]], title: str, facts: dict[str, str]) -> Output:
    """The HTML report, from tables alone, and its frontier as a PNG; with the paper's appendix where the facts name it."""
    from mpq.report.figures import frontier_png
    from mpq.report.page import write_report as render

    together = {name: read_together(refs) for name, refs in tables.items() if refs}
    appendix = None
    if facts.get("appendix") == "paper":
        from mpq.paper.page import appendix as of_paper

        appendix = of_paper(together, facts.get("base", ""))
    return {
        "report": (render(together, title, facts, appendix).encode(), "html"),
        "frontier": (frontier_png(together), "png"),
    }
