"""What a plan does to downstream tasks: lm-evaluation-harness on a model that runs in mixed precision.

The harness's own task definitions decide everything: prompts, choices, metrics (see mpq.evaluation.task_data for the datasets).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import nn

from mpq.errors import MpqError
from mpq.evaluation.task_data import Tasks, open_tasks, quiet
from mpq.models.placement import device_of
from mpq.running.apply import apply_plan

SCHEMA = {
    "seed": pl.Int64,
    "task": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "base_value": pl.Float64,
}
GROUPS = 100  # of documents, left out in turn by the jackknife


@dataclass(frozen=True)
class Scores:
    """One evaluation: `value` by (task, metric), as the harness reports it, and `per_document` what it was made from."""

    value: Mapping[tuple[str, str], float]
    per_document: Mapping[tuple[str, str], list[Any]]

    def to_json(self) -> str:
        """The scores as JSON text: a list of [task, metric, value, per document]."""
        return json.dumps(
            [[*key, value, self.per_document[key]] for key, value in self.value.items()]
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Scores:
        """Scores as to_json wrote them."""
        rows = json.loads(text)
        return cls(
            {(t, m): value for t, m, value, _ in rows}, {(t, m): each for t, m, _, each in rows}
        )


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    formats: Mapping[str, str],
    tasks: Sequence[str] | Tasks,
    *,
    base: str,
    seeds: Sequence[int],
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    base_scores: Scores | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Metrics of a plan on harness tasks, a row for each seed, task and metric: seed, task, metric, value, base_value.

    Beside each metric m of the harness stand `m_diff`, plan minus base over the same documents, and `m_diff_stderr`, the
    standard error of that paired difference (base_value 0 for both). `tasks` are names, or open already. `limit` takes the
    first documents only; without it the whole dataset evaluates. `base_scores` spares evaluating the base model again. Raises MpqError for unknown tasks,
    unusable datasets, plans of other models and log-likelihoods or metrics that are not finite.
    """
    with nullcontext(tasks) if isinstance(tasks, Tasks) else open_tasks(tasks, data_dir) as opened:
        steps = len(seeds) + (base_scores is None)
        if base_scores is None:
            base_scores = score(model, tokenizer, opened, limit=limit, batch=batch)
            if progress:
                progress(1, steps)
        rows: list[dict[str, object]] = []
        for left, seed in zip(range(len(seeds) - 1, -1, -1), seeds, strict=True):
            with apply_plan(model, formats, base=base, backend="emulated", seed=seed):
                lowered = score(model, tokenizer, opened, limit=limit, batch=batch)
            rows += [{"seed": seed, **row} for row in _beside(opened, lowered, base_scores)]
            if progress:
                progress(steps - left, steps)
    return pl.DataFrame(rows, schema=SCHEMA)


def score(
    model: nn.Module, tokenizer: Any, tasks: Tasks, *, limit: int | None = None, batch: int = 8
) -> Scores:
    """The harness's metrics of `model` as it runs now, over all documents of the tasks or the first `limit` of each.

    Raises MpqError where the model yields a log-likelihood that is not finite: a metric alone may hide that.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        lm._device = device_of(model)  # the harness asks the weights, which may be elsewhere
        wanted: Any = {"tasks": dict(tasks.loaded), "groups": {}, "group_map": {}}
        result: Any = evaluate(lm, wanted, limit=limit, bootstrap_iters=0)
    per_document: dict[tuple[str, str], list[Any]] = {}
    for task, samples in result["samples"].items():
        for sample in samples:
            _check_finite(task, sample)
            for metric in sample["metrics"]:
                per_document.setdefault((task, _named(metric, sample["filter"])), []).append(
                    sample[metric]
                )
    value: dict[tuple[str, str], float] = {}
    for task, metric in per_document:
        name, _, kind = metric.partition(",")
        number = result["results"][task][f"{name},{kind or 'none'}"]
        if not (isinstance(number, (int, float)) and math.isfinite(number)):
            raise MpqError(
                f"The metric {metric} of task {task} is {number}: a format overflows or the model is broken there."
            )
        value[task, metric] = float(number)
    return Scores(value, per_document)


def _named(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _check_finite(task: str, sample: Mapping[str, Any]) -> None:
    for response in sample["filtered_resps"]:
        number = response[0] if isinstance(response, (tuple, list)) and response else response
        if isinstance(number, float) and not math.isfinite(number):
            raise MpqError(
                f"Document {sample['doc_id']} of task {task} has the log-likelihood {number}: a format overflows or the model is broken there."
            )


def _beside(tasks: Tasks, lowered: Scores, base: Scores) -> Iterator[dict[str, object]]:
    for (task, metric), value in lowered.value.items():
        if (task, metric) not in base.value or len(base.per_document[task, metric]) != len(
            lowered.per_document[task, metric]
        ):
            raise MpqError(
                f"The base model's scores lack {metric} of {task} over the same documents: evaluate base again."
            )
        beside = base.value[task, metric]
        aggregation = tasks.loaded[task].aggregation()[metric.partition(",")[0]]
        error = paired_stderr(
            lowered.per_document[task, metric], base.per_document[task, metric], aggregation
        )
        yield {"task": task, "metric": metric, "value": value, "base_value": beside}
        yield {"task": task, "metric": f"{metric}_diff", "value": value - beside, "base_value": 0.0}
        yield {"task": task, "metric": f"{metric}_diff_stderr", "value": error, "base_value": 0.0}


def paired_stderr(
    lowered: Sequence[Any], base: Sequence[Any], aggregation: Callable[[Any], float]
) -> float:
    """Standard error of aggregation(lowered) − aggregation(base) over the same documents; NaN for fewer than two.

    A jackknife that leaves groups of documents out, at most GROUPS of them; for a mean over up to GROUPS documents that
    is the textbook s/√n of the differences.
    """
    count = len(base)
    if count < 2:
        return math.nan
    groups = np.array_split(np.arange(count), min(count, GROUPS))
    left_out = []
    for group in groups:
        rest = [*range(group[0]), *range(group[-1] + 1, count)]
        left_out.append(
            aggregation([lowered[i] for i in rest]) - aggregation([base[i] for i in rest])
        )
    changes = np.array(left_out) - np.mean(left_out)
    return float(np.sqrt((len(groups) - 1) / len(groups) * np.square(changes).sum()))
