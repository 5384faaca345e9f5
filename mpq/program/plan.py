"""The plan: which op runs in which format, with what was predicted of it and where it came from."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mpq.documents import parse_json
from mpq.errors import MpqError
from mpq.formats.scheme import get_scheme

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PLAN_VERSION = 1
LEAST_LOSS = "ip_loss"  # the strategy of the smallest loss for a target


@dataclass(frozen=True)
class Plan:
    """Op → format for one model. `formats` has all ops that the plan decides; others stay in base.

    `predicted_loss_mse`, `budget` (τ² E[g²]; None where KL alone is bounded) and
    `mean_square_loss` are in nats², `predicted_kl` and its bound `kl_bound` in nats per predicted
    token, None where not measured or not asked for; each `_error` is half a 95 % interval.
    `predicted_loss_change` (nats per token) is that over many texts, the KL; on one of N tokens
    it is that ± √(2 KL / N) (docs/method.md).
    `kl_scale` is what measured plans multiplied the predicted KL by, give or take the share
    `kl_scale_error` (one standard error); `risk` the probability that
    the plan breaks its bounds, by what was measured, else by what was predicted, within their
    errors, and `checked_kl` what the plan's KL was when measured before it was delivered.
    `predicted_signed_mse` (nats²) is the loss MSE with rounding's signs and the drift (program/signed.py),
    which is the `predicted_loss_mse` that the budget bounds where the plan is `signed`.
    `tau` is κ / √E[g²] where KL alone is bounded, by κ. Times are in seconds,
    `predicted_gain` in the objective's unit (et: s, tt: BF16 MACs, m: bytes). With more than one `output` token et gains the time
    of the whole answer, TTFT and (output - 1) × the time per output token, `predicted_tpot_s` of `base_tpot_s` (timing/answer.py).
    `weight_bytes` are those of the linears, scales counted, `effective_bits` the mean of a weight; `cache_bytes` are those of the
    keys and values of the workload's requests, `base_cache_bytes` in base, None where the cache was not decided;
    `engine` is what shall serve the plan. `predicted_gain_error` is half its 95 % interval, None where that is unknown. `provenance`
    holds content keys of the tables that led here, versions of the software that made it, and in
    `stored` the ops that the checkpoint stores quantized, which in base have no less noise.
    """

    strategy: str
    objective: str
    tau: float
    base: str
    formats: dict[str, str]
    predicted_loss_mse: float
    budget: float | None
    predicted_gain: float
    mean_square_loss: float
    seed: int = 0
    base_ttft_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_gain_error: float | None = None
    output: int = 1
    base_tpot_s: float | None = None
    predicted_tpot_s: float | None = None
    effective_bits: float | None = None
    weight_bytes: float | None = None
    cache_bytes: float | None = None
    base_cache_bytes: float | None = None
    engine: str = "none"
    predicted_kl: float | None = None
    predicted_kl_error: float | None = None
    predicted_loss_change: float | None = None
    predicted_loss_mse_error: float | None = None
    predicted_signed_mse: float | None = None
    signed: bool = False
    kl_bound: float | None = None
    kl_scale: float = 1.0
    kl_scale_error: float = 0.0
    risk: float | None = None
    checked_kl: float | None = None
    checked_kl_error: float | None = None
    fingerprint: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    version: int = PLAN_VERSION

    # for reading alone: a key that this version does not know may change what the plan means
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "extra": "forbid",
        "hide_input_in_errors": True,
    }

    @property
    def lowered(self) -> dict[str, str]:
        """The ops that leave the base format."""
        return {op: f for op, f in self.formats.items() if f != self.base}

    @property
    def budgets(self) -> dict[str, float]:
        """What bounds the plan, by the column of the gains table that it bounds."""
        limits = {"loss_mse": self.budget, "kl": self.kl_bound}
        return {column: limit for column, limit in limits.items() if limit is not None}

    @property
    def name(self) -> str:
        """What the plan's file is called, without its suffix."""
        kl = self.kl_bound if self.budget is None else None
        return plan_name(self.objective, self.strategy, self.tau, self.seed, kl)

    @property
    def share_lowered(self) -> float:
        """Lowered ops as a share of the ops decided, 0 to 1."""
        return len(self.lowered) / max(1, len(self.formats))

    def origin(self, name: str) -> Any:
        """What the provenance says under `name`, `model` or `evaluation`: a relative path that is not there from here is one
        from the folder that the plan was made in."""
        said, folder = self.provenance.get(name), self.provenance.get("folder")
        if not said or not folder or "://" in said or Path(said).expanduser().exists():
            return said
        there = Path(folder) / said
        return str(there) if there.exists() else said

    def to_json(self) -> str:
        """The plan as JSON text, keys in a fixed order."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back. Raises MpqError where the text is not a plan that this version reads."""
        from pydantic import ValidationError

        from mpq.program.provenance import Provenance

        try:
            parse_json(text)  # which tells what stands twice
            plan = _reader().validate_json(text)
            Provenance.model_validate(plan.provenance)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            at = ".".join(map(str, first["loc"]))
            raise _no_plan(f"{at + ': ' if at else ''}{first['msg']}") from None
        except ValueError as error:
            raise _no_plan(str(error)) from None
        if plan.version != PLAN_VERSION:
            raise MpqError(
                f"The plan has version {plan.version}, this mpq reads {PLAN_VERSION}: "
                "solve it again."
            )
        for format_name in {plan.base, *plan.formats.values()}:
            get_scheme(format_name)
        return plan

    def check_model(self, fingerprint: str) -> None:
        """Raise MpqError unless the plan was made for the weights with this fingerprint."""
        if self.fingerprint and self.fingerprint != fingerprint:
            raise MpqError(
                f"The plan was made for a model with fingerprint {self.fingerprint[:12]}, this one "
                f"has {fingerprint[:12]}: give the checkpoint that it was made for, or make a plan "
                "for this one."
            )


def _no_plan(why: str) -> MpqError:
    return MpqError(f"Not a plan: expected the JSON that `mpq run` or `mpq solve` writes ({why}).")


@functools.cache
def _reader() -> TypeAdapter[Plan]:
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def stored_in_words(stored: Mapping[str, str]) -> str:
    """How many ops a checkpoint stores in which format (`provenance["stored"]`, op → format), and what that means: "" for none."""
    told = ", ".join(f"{count} ops in {name}" for name, count in Counter(stored.values()).items())
    return f"{told}: base is no better than that for them" if told else ""


def is_uniform(strategy: str) -> bool:
    """Whether a strategy puts everything in one format, under no τ of its own."""
    return strategy.startswith("uniform_")


def has_tau(strategy: str) -> bool:
    """Whether a strategy was given a bound: the others' τ is the one that their predicted loss just meets."""
    return not is_uniform(strategy) and strategy != LEAST_LOSS


def plan_name(
    objective: str, strategy: str, tau: float, seed: int = 0, kl: float | None = None
) -> str:
    """The name of a plan's file: `et-ip_et-tau0.002`, `et-random-tau0.002-seed1`, `m-uniform_int8`.

    With `kl`, the only bound that it was made under, `et-ip_et-kl0.01`: in three digits, in which bounds of one run differ.
    """
    draw = f"-seed{seed}" if strategy == "random" else ""
    bound = f"-tau{tau:g}" if kl is None else f"-kl{kl:.3g}"
    return f"{objective}-{strategy}{bound if has_tau(strategy) else ''}{draw}"
