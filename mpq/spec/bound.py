"""What a plan may cost, in the units that people have: KL divergence, perplexity, or the paper's τ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, field_serializer, model_validator

from mpq.spec.fields import Number, Strict, number


@dataclass(frozen=True)
class Bound:
    """τ on the normalised RMSE of the loss, `kl` in nats per predicted token; None where not bounded.

    `robust` is the probability at which the bound shall hold; None: the prediction itself keeps it.
    With `signed` τ bounds the loss MSE with rounding's signs and the drift.
    """

    tau: float | None = None
    kl: float | None = None
    robust: float | None = None
    signed: bool = False

    def __str__(self) -> str:
        """`τ = 0.002 and KL ≤ 0.01`."""
        signs = " with signs" * self.signed
        told = [] if self.tau is None else [f"τ = {self.tau:g}{signs}"]
        return " and ".join(told if self.kl is None else [*told, f"KL ≤ {self.kl:.4g}"])


def _unquoted(value: Any) -> Any:
    """A text that is a number, as forms and quotes make of one, as that number; all else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _share(value: Any) -> Any:
    """`0.5 %` as 0.005; numbers stay as they are. One of a tenth or more is taken for a percentage whose sign is missing."""
    value = _unquoted(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0.1:
        raise ValueError(
            f"{value:g} is {value:.0%}: write {value:g} %, or {value:.0%} if it is meant"
        )
    text = value.strip() if isinstance(value, str) else ""
    if not text.endswith("%"):
        return value
    try:  # in decimal, so that what is written as a percentage is read as the same number again
        return float(Decimal(text.removesuffix("%").strip()) / 100)
    except ArithmeticError:
        raise ValueError(f"expected a share, such as 0.5 % or 0.005, not {text!r}") from None


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _above_zero(value: Any) -> Any:
    value = _unquoted(value)
    if isinstance(value, bool) or (
        isinstance(value, int | float) and not (value > 0 and math.isfinite(value))
    ):
        raise ValueError(f"a bound must be a number above zero, not {str(value).lower()}")
    return value


_Value = Annotated[float, BeforeValidator(_above_zero)]
_Share = Annotated[_Value, Field(lt=10), BeforeValidator(_share)]


def _one_or_list(*kinds: str) -> WithJsonSchema:
    """What forms are told, since they know nothing of what is read before it is checked: one value, or a list."""
    one: list[dict[str, Any]] = [{"type": kind} for kind in kinds]
    return WithJsonSchema({"anyOf": [*one, {"type": "array", "items": {"anyOf": one}}]})


_Values = Annotated[
    tuple[_Value, ...], BeforeValidator(_listed), Field(min_length=1), _one_or_list("number")
]
_Shares = Annotated[
    tuple[_Share, ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    _one_or_list("number", "string"),
]


class BoundSpec(Strict):
    """What a plan may cost: KL divergence, perplexity, τ, or several of them together.

    A plan of the integer program under a bound on KL or perplexity is measured before it is delivered, on held-out text that
    the evaluation does not use where there is such; what was measured corrects the prediction, and it is solved again.
    """

    kl: _Values | None = Field(
        None,
        description="KL divergence of the plan's predictions from base's, nats per predicted token: one value, or "
        "several for a plan each",
    )
    perplexity: _Shares | None = Field(
        None,
        description="Relative rise of perplexity, such as 0.5 %: ln(1.005) nats of KL, which the mean loss follows",
    )
    tau: _Values | None = Field(
        None, description="τ on the normalised RMSE of the loss: 0.002 allows it to move by 0.2 %"
    )

    signed: bool = Field(
        False,
        description="τ bounds the loss MSE in which the effects of weights' rounding keep their signs, and the drift counts "
        "(docs/method.md); false: the sum over operands",
    )
    robust: Number | None = Field(
        None,
        ge=0.5,
        lt=1,
        description="Probability at which the bounds shall hold, such as 0.95: that many standard errors are kept off them; "
        "null: the prediction itself keeps them",
    )
    rounds: Annotated[int, BeforeValidator(number)] = Field(
        4,
        ge=0,
        le=100,
        description="Rounds of measuring the KL of what was chosen and solving again, at most; 0: predictions are trusted",
    )

    @field_serializer("perplexity")
    def _as_written(self, shares: tuple[float, ...] | None) -> list[float | str] | None:
        """Shares of a tenth and more with their sign, without which they would be asked about when they are read again."""
        if shares is None:
            return None
        return [f"{Decimal(repr(x)) * 100:f} %" if x >= 0.1 else x for x in shares]

    @model_validator(mode="after")
    def _together(self) -> BoundSpec:
        given = {k: v for k in ("kl", "perplexity", "tau") if (v := getattr(self, k)) is not None}
        if not given:
            raise ValueError("bounds nothing: give kl, perplexity or tau")
        if self.signed and self.tau is None:
            raise ValueError("signed is of the loss MSE: give tau, which bounds it")
        if self.signed and self.robust is not None:
            raise ValueError(
                "signed and robust together are not known: errors of a loss MSE with signs do not add; leave one out"
            )
        if len({len(v) for v in given.values()}) > 1:
            counts = ", ".join(f"{k} has {len(v)}" for k, v in given.items())
            raise ValueError(
                f"{counts}: give each as many values, since the first of each bound one plan together, and so on"
            )
        for name, values in given.items():
            if any(1.01 * a > b for a, b in pairwise(values)):
                raise ValueError(f"{name} must rise from value to value, by 1 % at least")
        return self

    @property
    def limits(self) -> tuple[Bound, ...]:
        """A bound for each plan of a strategy. Of kl and perplexity the tighter holds."""
        count = max(len(v) for v in (self.kl, self.perplexity, self.tau) if v)
        rises = [math.log1p(x) for x in self.perplexity or (math.inf,) * count]
        kls = [min(pair) for pair in zip(self.kl or (math.inf,) * count, rises, strict=True)]
        return tuple(
            Bound(tau, kl if kl < math.inf else None, self.robust, self.signed)
            for tau, kl in zip(self.tau or (None,) * count, kls, strict=True)
        )
