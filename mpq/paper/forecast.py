"""What a run would still have to compute, and about how long that takes, told before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpq.spec import EvaluationSpec, RunSpec, plans_at_most

BACKWARD = 4  # a sensitivity pass over a text in forward passes: forward, backward, and the sums of squares (bench/sensitivity.py)
TIMING = 3  # a timed pair in forward passes: base, configuration, and as much again for warming up and disturbed pairs
Asked = tuple[str, Mapping[str, Any], bool]  # stage, inputs, whether its tables are stored
EVALUATIONS = ("evaluate base", "evaluate", "tasks base", "tasks")


@dataclass(frozen=True)
class Work:
    """One stage: its tasks, how many are in the store, and seconds for the others; `bound`: at most so many, not known yet."""

    stage: str
    tasks: int
    cached: int
    seconds: float = 0.0
    bound: bool = False


def forecast(
    asked: Iterable[Asked],
    spec: RunSpec,
    held_out: EvaluationSpec,
    tokens: Mapping[str, int],
    pace: Mapping[str, float],
) -> list[Work]:
    """The stages that a look met, in its order, with seconds by the tokens that they run the model on.

    `tokens` are those of the calibration, of the evaluation text and of each harness task; `pace` is measure_pace's row.
    """
    stages: dict[str, Work] = {}
    for name, inputs, stored in asked:
        seconds = 0.0 if stored else _passes(name, inputs, spec, tokens, pace)
        seen = stages.get(name, Work(name, 0, 0))
        stages[name] = Work(name, seen.tasks + 1, seen.cached + stored, seen.seconds + seconds)
    if "evaluate" not in stages:
        stages |= {work.stage: work for work in _bounds(spec, held_out, tokens, pace)}
    return list(stages.values())


def _passes(
    name: str,
    inputs: Mapping[str, Any],
    spec: RunSpec,
    tokens: Mapping[str, int],
    pace: Mapping[str, float],
) -> float:
    base, lowered = pace["base_s_per_token"], pace["lowered_s_per_token"]
    prefill = spec.timing.batch * spec.timing.length * TIMING
    match name:
        case "sensitivity":
            return float(BACKWARD * base * tokens["calibration"] / inputs["shards"])
        case "timing: measure" | "timing of chosen: measure":
            return base * len(inputs["wanted"]) * spec.timing.repeats * prefill
        case "TTFT of plans" | "TTFT of anchors":
            return float(base * len(inputs["plans"]) * inputs["repeats"] * prefill)
        case "evaluate base" | "evaluate":
            return (base if name.endswith("base") else lowered) * tokens["evaluation"]
        case "tasks base" | "tasks":
            return (base if name.endswith("base") else lowered) * tokens[inputs["task"]]
    return 0.0


def _bounds(
    spec: RunSpec, held_out: EvaluationSpec, tokens: Mapping[str, int], pace: Mapping[str, float]
) -> list[Work]:
    """Evaluations before the plans are known: every plan different from the others, nothing of it stored."""
    base, lowered = pace["base_s_per_token"], pace["lowered_s_per_token"]
    of_tasks, plans = [tokens[task] for task in held_out.tasks], plans_at_most(spec)
    runs = sum(plans.values()) * held_out.seeds
    timed = plans.get("et", 0)
    prefill = spec.timing.batch * spec.timing.length * TIMING
    works = [Work("evaluate", runs, 0, lowered * runs * tokens["evaluation"], True)]
    if of_tasks:
        works += [
            Work("tasks base", len(of_tasks), 0, base * sum(of_tasks), True),
            Work("tasks", runs * len(of_tasks), 0, lowered * runs * sum(of_tasks), True),
        ]
    if timed:
        works.append(
            Work("TTFT of plans", 1, 0, base * timed * held_out.ttft_repeats * prefill, True)
        )
    return works


def forecast_in_words(works: list[Work], spec: RunSpec, held_out: EvaluationSpec) -> str:
    """The forecast in a few lines for people."""
    parts = [w for w in works if w.stage in EVALUATIONS]
    count, cached = sum(w.tasks for w in parts), sum(w.cached for w in parts)
    bound = any(w.bound for w in parts)
    seconds, every = sum(w.seconds for w in parts), sum(w.seconds for w in works)
    plans = plans_at_most(spec)
    what = f"{sum(plans.values())} plans ({', '.join(f'{k} {n}' for k, n in plans.items())}), {held_out.seeds} seeds, the text"
    what += f" and {len(held_out.tasks)} tasks" if held_out.tasks else ""
    lines = [
        f"{spec.name}: {what}; plans with equal formats are evaluated once.",
        f"evaluations: {'at most ' if bound else ''}{count}, {cached} of them cached, {duration(seconds)} for the others."
        if cached < count
        else f"evaluations: {count}, all of them cached.",
    ]
    rest = [w for w in works if w not in parts and w.seconds]
    if rest:
        lines.append(
            "; ".join(
                f"{w.stage}: {w.tasks - w.cached} of {w.tasks} tasks to do, {duration(w.seconds)}"
                for w in rest
            )
            + "."
        )
    if every:
        lines.append(f"in all {duration(every)}, estimated from one forward pass on this machine.")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as people say them: nothing, about 40 s, about 12 min, about 3.5 h."""
    if seconds <= 0:
        return "nothing"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
