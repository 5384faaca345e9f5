"""How much work a run is, from its spec alone: what it counts is told before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from mpq.spec.run import EvaluationSpec, RunSpec


@dataclass(frozen=True)
class Estimate:
    """Counts of a run's work when nothing of it is stored yet; plans that turn out equal are measured once.

    `timed` is the number of plans whose TTFT is measured; `evaluations` are passes over the held-out text, base's
    included, `task_evaluations` those over harness tasks, `checked` plans whose KL is measured before they are delivered.
    """

    shards: int
    plans: dict[str, int]
    seeds: int
    evaluations: int
    timed: int
    task_evaluations: int = 0
    checked: int = 0

    def __str__(self) -> str:
        """In one line, such as `4 shards, 12 plans × 2 seeds, at most 25 evaluations, at most 12 plans timed`."""
        plans = sum(self.plans.values())
        parts = [
            _many(self.shards, "calibration shard"),
            f"{_many(plans, 'plan')} × {_many(self.seeds, 'seed')}",
            f"at most {_many(self.evaluations, 'evaluation')} of the loss",
        ]
        if self.task_evaluations:
            parts.append(f"{self.task_evaluations} of tasks")
        if self.checked:
            parts.append(f"at most {_many(self.checked, 'plan')} checked before delivery")
        if self.timed:
            parts.append(f"at most {_many(self.timed, 'plan')} timed")
        return ", ".join(parts)


def plans_at_most(spec: RunSpec) -> dict[str, int]:
    """For each objective, how many plans the spec asks for; several may turn out equal."""
    found: dict[str, int] = {}
    for objective, part in spec.objectives.items():
        draws = (
            part.random_seeds if s == "random" else 1 for s in part.strategies if s != "uniform"
        )
        uniform = 2 * len(part.formats) if "uniform" in part.strategies else 0
        least_loss = bool(spec.target and (objective == "et" or spec.target.ttft_ms is None))
        found[objective] = len(spec.limits(objective)) * sum(draws) + uniform + least_loss
    return found


def estimate(spec: RunSpec) -> Estimate:
    """The work that a spec asks for. A pure function of the spec: no model, text or store is looked at."""
    plans = plans_at_most(spec)
    seeds = (spec.evaluation or EvaluationSpec(source=spec.calibration.source)).seeds
    evaluations = sum(plans.values()) * seeds + 1
    return Estimate(
        shards=min(spec.calibration.shards, spec.calibration.samples or spec.calibration.shards),
        plans=plans,
        seeds=seeds,
        evaluations=evaluations,
        timed=plans.get("et", 0),
        checked=sum(
            len(part.formats) + len(spec.limits(o)) * spec.bound.rounds
            for o, part in spec.objectives.items()
            if spec.bound and spec.checks_kl(o)
        ),
        task_evaluations=evaluations * len(spec.evaluation.tasks if spec.evaluation else ()),
    )


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
