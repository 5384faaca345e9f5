"""What plans may choose: an engine, pins and ties by pattern, bounds on whole plans, a target."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from mpq.formats.scheme import get_scheme
from mpq.spec.fields import FormatName, Number, Strict

EngineName = Literal["none", "vllm", "tensorrt-llm", "sglang", "gaudi", "transformers"]
UNITS = {
    **{f"{p}B": 1000**i for i, p in enumerate(("", "k", "M", "G", "T"))},
    **{f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")},
}


def _size(value: Any) -> Any:
    """Bytes, from a number or a text such as `20 GiB`."""
    if not isinstance(value, str):
        return value
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
    if not found or found[2].lower() not in units:
        raise ValueError(
            f"expected bytes, or a size such as 20 GiB or 900 MB, got {value[:40]!r} "
            f"(units: {', '.join(UNITS)})"
        )
    return float(found[1]) * units[found[2].lower()]


def _format_or_base(name: str) -> str:
    return name if name == "base" else get_scheme(name).name


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def check_pattern(pattern: str) -> str:
    """The pattern. Raises ValueError where it is empty, or a `re:` that does not compile."""
    if not pattern.removeprefix("re:").strip() or not pattern.isprintable():
        raise ValueError(
            f"expected a pattern over op names, such as *.down_proj, got {pattern[:40]!a}"
        )
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern} is no regular expression ({error})") from None
    return pattern


Size = Annotated[Number, BeforeValidator(_size), Field(gt=0, lt=math.inf)]
Bits = Annotated[Number, Field(gt=0, le=64)]
FormatOrBase = Annotated[str, AfterValidator(_format_or_base)]
Formats = Annotated[tuple[FormatOrBase, ...], BeforeValidator(_one_or_more), Field(min_length=1)]


class BoundsSpec(Strict):
    """Bounds on a whole plan, beside the one on its loss; all of them hold at once."""

    effective_bits: Bits | None = Field(
        None, description="Mean bits a weight at most, scales counted (linears)"
    )
    weight_bytes: Size | None = Field(
        None, description="Bytes of the linears' weights and scales at most: a number, or 20 GiB"
    )
    min_share: dict[FormatName, Number] = Field(
        {},
        description="Format: at least this share of the ops decided, attention's products among them, 0 to 1",
    )

    @field_validator("min_share")
    @classmethod
    def _shares(cls, shares: dict[str, float]) -> dict[str, float]:
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"the share of {name} must lie between 0 and 1, got {share:g}")
        if sum(shares.values()) > 1 + 1e-12:
            raise ValueError(
                f"the shares add up to {sum(shares.values()):g}, which is more than all ops"
            )
        return shares


class ConstraintSpec(Strict):
    """What plans may choose. A pattern is a glob over op names, or `re:` and a regular expression."""

    pin: dict[str, Formats] = Field(
        {}, description="Pattern: the formats that these ops may take, one, a list, or base"
    )
    tie: tuple[tuple[str, ...], ...] = Field(
        (), description="Lists of patterns whose matches within one layer take one format"
    )
    bounds: BoundsSpec = Field(BoundsSpec(), description="Bounds on a whole plan")

    @field_validator("pin")
    @classmethod
    def _pins(cls, pins: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for pattern in pins:
            check_pattern(pattern)
        return pins

    @field_validator("tie")
    @classmethod
    def _ties(cls, ties: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        for patterns in ties:
            if not patterns:
                raise ValueError("a tie is a list of patterns, got an empty one")
            for pattern in patterns:
                check_pattern(pattern)
        return ties


class TargetSpec(Strict):
    """What the plan of the smallest loss shall meet: one of these."""

    effective_bits: Bits | None = Field(None, description="Mean bits a weight, scales counted")
    weight_bytes: Size | None = Field(
        None, description="Bytes of the linears' weights and scales: a number, or 20 GiB"
    )
    ttft_ms: Annotated[Number, Field(gt=0, lt=math.inf)] | None = Field(
        None, description="Predicted time to first token (ms); needs the objective et"
    )

    @model_validator(mode="after")
    def _one(self) -> TargetSpec:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"a target is one of {', '.join(TargetSpec.model_fields)}, got "
                f"{' and '.join(given) or 'none'}: further ones are constraints.bounds"
            )
        return self
