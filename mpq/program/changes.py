"""What a new checkpoint changed: its plans beside those of the one before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpq.program.plan import Plan, has_tau


@dataclass(frozen=True)
class Change:
    """One plan before and after. `moved` is op → (format before, format after).

    Gains are in the objective's unit (et: seconds, tt: seconds of MACs in units of base, m: bytes), losses in nats².
    """

    strategy: str
    objective: str
    tau: float
    seed: int
    moved: dict[str, tuple[str, str]]
    gain_before: float
    gain_after: float
    loss_mse_before: float
    loss_mse_after: float

    def row(self) -> dict[str, object]:
        """The change as one row of a table for people."""
        return {
            "strategy": self.strategy,
            "objective": self.objective,
            "tau": self.tau,
            "seed": self.seed,
            "ops_moved": len(self.moved),
            "gain_before": self.gain_before,
            "gain_after": self.gain_after,
            "gain_difference": self.gain_after - self.gain_before,
            "predicted_loss_mse_before": self.loss_mse_before,
            "predicted_loss_mse_after": self.loss_mse_after,
            "predicted_loss_mse_difference": self.loss_mse_after - self.loss_mse_before,
            "moved": "; ".join(f"{op}: {a} → {b}" for op, (a, b) in self.moved.items()),
        }


def compare(before: Iterable[Plan], after: Iterable[Plan]) -> list[Change]:
    """A change for each plan of `after` that has one of the same strategy, objective, seed and, where it was given one, bound
    in `before`."""
    old = {_who(plan): plan for plan in before}
    return [
        Change(
            new.strategy,
            new.objective,
            new.tau,
            new.seed,
            moved=moves(was, new),
            gain_before=was.predicted_gain,
            gain_after=new.predicted_gain,
            loss_mse_before=was.predicted_loss_mse,
            loss_mse_after=new.predicted_loss_mse,
        )
        for new in after
        if (was := old.get(_who(new)))
    ]


def moves(before: Plan, after: Plan) -> dict[str, tuple[str, str]]:
    """The ops whose format differs, op → (before, after); an op that a plan does not decide is in its base format."""
    found = {}
    for op in dict.fromkeys([*before.formats, *after.formats]):
        was, now = before.formats.get(op, before.base), after.formats.get(op, after.base)
        if was != now:
            found[op] = was, now
    return found


def _who(plan: Plan) -> tuple[object, ...]:
    if not has_tau(plan.strategy):
        return plan.strategy, plan.objective, plan.seed
    # under KL alone τ hangs on the checkpoint's loss
    tau = None if plan.budget is None else plan.tau
    return plan.strategy, plan.objective, plan.seed, tau, plan.kl_bound
