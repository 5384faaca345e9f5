"""What plans really do: a task for each plan, seed and text or harness task, so that a sweep goes on where it was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpq.flows.run import Run
from mpq.flows.times import times_of_plans
from mpq.store.entries import TableRef, content_key
from mpq.tasks import evaluation
from mpq.tasks.stage import read

Plans = Sequence[dict[str, Any]]
# of plans, by the key of their formats: equal ones are evaluated once, whatever made them
ByContent = dict[str, Any]


def evaluate(run: Run, groups: TableRef, plans: Plans, blocks: TableRef) -> TableRef:
    """The evaluation table of all plans."""
    from mpq.kernels import runs_natively
    from mpq.serving.schemes import runs_in_vllm

    formats: ByContent = {content_key(p["formats"]): p["formats"] for p in plans}
    names = {content_key(p["formats"]): _name(p) for p in reversed(plans)}
    measured = _losses(run, formats, names, blocks)
    for key, scores in _scores(run, formats, names).items():
        measured[key] += scores
    native = []
    if "et" in run.objectives:
        kinds, model = dict(read(groups).select("op", "kind").iter_rows()), run.spec.model
        where = kinds, model.base, model.device
        for key, f in formats.items():
            if run.spec.timing.engine == "vllm":
                runs = runs_in_vllm(f, *where)
            else:
                runs = run.place.ask(runs_natively, f, *where)
            if runs:
                native.append(key)
    timed = [formats[k] for k in native]
    ttft = times_of_plans(run, groups, timed, "TTFT of plans") if timed else None
    rows = []
    for plan in plans:
        key = content_key(plan["formats"])
        row = {column: plan[column] for column in ("strategy", "objective", "tau", "seed")}
        place = native.index(key) if key in native else None
        rows.append({**row, "measured": measured[key], "ttft": place})
    return run.one(evaluation.collect_evaluation, plans=rows, ttft=ttft)["evaluation"]


def _name(plan: dict[str, Any]) -> str:
    # `tau` in letters: the font of Prefect's canvas has no τ
    draw = f" draw {plan['seed']}" if plan["strategy"] == "random" else ""
    kl_alone = plan["budget"] is None
    bound = f"kl={plan['kl_bound']:.3g}" if kl_alone else f"tau={plan['tau']:g}"
    return f"{plan['strategy']} {plan['objective']} {bound}{draw}"


def _losses(run: Run, formats: ByContent, names: dict[str, str], blocks: TableRef) -> ByContent:
    """Loss MSE, drift, KL and perplexity on the held-out text: for each plan a table a seed."""
    part = run.held_out
    given: dict[str, Any] = {"weights": run.weights, "blocks": blocks, "batch": part.batch}
    base = run.one(evaluation.evaluate_base, **given)["base_losses"]
    calls = {
        f"{names[key]} seed {seed}": {
            **given,
            "formats": chosen,
            "base_losses": base,
            "seed": seed,
            "what": names[key],
        }
        for key, chosen in formats.items()
        for seed in range(part.seeds)
    }
    results = [found["plan_losses"] for found in run.map(evaluation.evaluate_plan, calls)]
    return _by_plan(formats, results, part.seeds)


def _scores(run: Run, formats: ByContent, names: dict[str, str]) -> ByContent:
    """Scores on the harness's tasks: for each plan a table a seed and task; keyed by the datasets' content."""
    from mpq.evaluation.task_data import data_key

    part = run.held_out
    if not part.tasks:
        return {}
    given = {
        task: {
            "weights": run.weights,
            "task": task,
            "data": data_key([task], part.data_dir),
            "data_dir": part.data_dir,
            "limit": part.task_limit,
            "batch": part.batch,
        }
        for task in part.tasks
    }
    base = dict(zip(given, run.map(evaluation.evaluate_base_task, given), strict=True))
    calls = {
        f"{task} {names[key]} seed {seed}": {
            **given[task],
            "formats": chosen,
            "seed": seed,
            "base_scores": base[task]["task_scores"],
            "what": names[key],
        }
        for key, chosen in formats.items()
        for seed in range(part.seeds)
        for task in part.tasks
    }
    results = [found["plan_tasks"] for found in run.map(evaluation.evaluate_plan_task, calls)]
    return _by_plan(formats, results, part.seeds * len(part.tasks))


def _by_plan(formats: ByContent, results: list[TableRef], each: int) -> ByContent:
    """Results in the order of the plans, `each` many of one after the other. Raises ValueError for another number of them."""
    parts = (results[at : at + each] for at in range(0, len(results), each))
    return dict(zip(formats, parts, strict=True))
