"""Another τ, objective or choice of formats on tables that are there: seconds, no measurement."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from mpq.errors import MpqError
from mpq.flows.calibrate import chain
from mpq.flows.recorded import flow
from mpq.flows.run import one_by_one, running
from mpq.spec import BoundSpec, Objective, ObjectiveSpec, RunSpec, parse_spec

Taus = Annotated[
    list[float] | None,
    Field(description="Bounds on the normalised RMSE of the loss; the spec's own by default"),
]
Bounded = Annotated[
    BoundSpec | None,
    Field(description="Bounds on KL, perplexity or τ, in place of taus; the spec's own by default"),
]
Chosen = Annotated[
    Objective | None, Field(description="et, tt or m; every objective of the spec by default")
]
Lowered = Annotated[
    list[str] | None, Field(description="Formats that the objective may choose, of those measured")
]
Evaluate = Annotated[
    bool, Field(description="Run the new plans on the evaluation text too: minutes, not seconds")
]

SOLVING = frozenset({"gains", "solve", "report"})
EVALUATING = frozenset(
    {
        "check",
        "deliver",
        "evaluate base",
        "evaluate",
        "tasks base",
        "tasks",
        "TTFT of plans",
        "collect",
    }
)


@flow(
    name="retune",
    flow_run_name="retune {spec.name}",
    task_runner=one_by_one,
)
def retune(
    spec: RunSpec,
    taus: Taus = None,
    objective: Chosen = None,
    formats: Lowered = None,
    evaluate: Evaluate = False,
    bound: Bounded = None,
) -> dict[str, Any]:
    """Solve again on the tables of an earlier calibrate with this spec; what it did not measure is a mistake told at once.

    Results go to a folder of their own beside the spec's. Returns what calibrate does.

    Args:
        spec: The spec that was calibrated.
        taus: Bounds on the normalised RMSE of the loss; the spec's own by default.
        objective: et, tt or m, also one that the spec has not; every objective of the spec by default.
        formats: Formats that the objective may choose, of those measured.
        evaluate: Run the new plans on the evaluation text too; only then plans under a bound on KL are measured before they
            are delivered.
        bound: Bounds on KL, perplexity or τ, in place of taus; the spec's own by default.
    """
    tuned = retuned(spec, taus, objective, formats, bound)
    with running(
        tuned,
        solving=objective,
        formats=spec.formats,
        evaluating=evaluate,
        timing=evaluate and "et" in tuned.objectives,
        only=SOLVING | EVALUATING if evaluate else SOLVING,
    ) as run:
        return chain(run)


def retuned(
    spec: RunSpec,
    taus: list[float] | None,
    objective: Objective | None,
    formats: list[str] | None,
    bound: BoundSpec | None = None,
) -> RunSpec:
    """The spec with other bounds and choices, whose measurements are those of `spec`.

    Raises MpqError for formats without an objective, two kinds of bounds, and for what was not measured.
    """
    if taus and bound:
        raise MpqError("retune was given taus and a bound: give τ in the bound, as tau.")
    if formats and not objective:
        raise MpqError(
            "retune was given formats without an objective: say for which of et, tt and m they are."
        )
    if formats and (unknown := [f for f in formats if f not in spec.formats]):
        raise MpqError(
            f"{unknown[0]} was not measured under this spec, which has {', '.join(spec.formats)}: calibrate with it first."
        )
    data = spec.model_dump(mode="json")
    if taus:
        data |= {"taus": taus, "bound": None}
    if bound:
        del data["taus"]
        data["bound"] = bound.model_dump(mode="json")
    for name, part in data["objectives"].items():
        if (taus or bound) and (objective in (None, name)):
            part["taus"] = None
    if objective == "et" and "et" not in spec.objectives:
        raise MpqError(
            "The spec has no objective et, so nothing was timed: calibrate with it first."
        )
    if objective and objective not in spec.objectives:
        data["objectives"][objective] = ObjectiveSpec(formats=spec.formats).model_dump(mode="json")
    if formats and objective:
        if objective == "et" and set(formats) != set(spec.objectives["et"].formats):
            raise MpqError(
                "Times are measured for the et formats together: calibrate with the formats that it shall choose from."
            )
        data["objectives"][objective]["formats"] = formats
    return parse_spec({**data, "name": f"{spec.name}-retuned", "export": None}, "retune")
