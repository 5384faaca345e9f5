"""Whether the calibration text was long enough, as the report tells it (how: stability.py)."""

from __future__ import annotations

from dataclasses import dataclass

from mpq.program.anchors import scaled
from mpq.program.stability import ALIKE, FACTORS, KNOWN, Stability, advised, stability
from mpq.report.results import OBJECTIVES, Tables, bound_of, results_table, scale_of, table_of
from mpq.report.sheets import Sheet


@dataclass(frozen=True)
class Calibration:
    """The curve of one objective's plan under one bound (in words).

    `samples` is of how many samples the run's own tables are.
    """

    objective: str
    bound: str
    cost: str  # KL, or loss MSE
    samples: int
    curve: list[Stability]

    @property
    def own(self) -> Stability:
        """What is said of as many samples as there are."""
        return self.curve[FACTORS.index(1.0)]


def calibration_of(tables: Tables, base: str) -> Calibration | None:
    """Of the first objective's tightest bound; None where a run has no such plan, or no standard errors."""
    loss, gains = table_of(tables, "loss"), table_of(tables, "gains")
    if loss.is_empty() or gains.is_empty():
        return None
    samples = int(loss["n_samples"].sum())
    results = results_table(tables)
    for objective in OBJECTIVES:
        own = results.filter(objective=objective, strategy=f"ip_{objective}").sort("tau")
        of = gains.filter(objective=objective)
        if own.is_empty() or of.is_empty():
            continue
        row = own.row(0, named=True)
        column = "kl" if row["kl_bound"] is not None else "loss_mse"
        bound = row["kl_bound"] if column == "kl" else row["budget"]
        if bound is None or bound <= 0:
            continue
        if column == "loss_mse" and row["predicted_loss_mse"] == row["predicted_signed_mse"]:
            continue  # a loss MSE with signs is no sum over ops, which this is of
        of = scaled(of, scale_of(tables, objective)) if column == "kl" else of
        curve = stability(of, column, bound, samples, base)
        if not curve:
            return None
        cost = "KL" if column == "kl" else "loss MSE"
        return Calibration(objective, bound_of(row), cost, samples, curve)
    return None


def in_sentences(found: Calibration | None) -> tuple[list[str], list[str]]:
    """Sentences, and warnings where more samples are needed."""
    if found is None:
        return [], []
    own, enough = found.own, advised(found.curve)
    said = (
        f"Of two calibrations on {own.samples} samples each, {own.alike:.0%} of what they lower is "
        f"alike, and they know this plan's {found.cost} to ± {own.known:.0%} ({found.objective} at "
        f"{found.bound})"
    )
    if own.enough:
        return [f"{said}: the calibration text is long enough."], []
    most = found.curve[-1].samples
    more = f"{enough} samples would be" if enough else f"more than {most} samples would be"
    return [], [f"{said}. Enough would be {ALIKE:.0%} and ± {KNOWN:.0%}: {more} needed."]


def sheet(found: Calibration | None) -> Sheet:
    """The curve."""
    rows = [vars(at) for at in found.curve] if found else []
    return Sheet(
        "calibration",
        "How much calibration is enough. Of two calibrations on so many samples: the share of what either "
        "lowers that both do, and half the 95 % interval of the plan's predicted cost. From the samples' "
        "own spread; nothing was measured again.",
        [
            ("Samples", "samples", "count"),
            ("Lowered alike", "alike", "share"),
            ("Cost known to ±", "known", "share"),
        ],
        rows,
        tall=False,
    )
