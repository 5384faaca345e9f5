"""What is read again of a plan's provenance, and of which types it is there: plans are files that people hand in."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, PositiveInt


class _Known(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)


class _Text(_Known):
    """How a run read its text (flows/outputs.py)."""

    model_config = ConfigDict(extra="forbid")

    field: str = "text"
    split: str = "train"
    seed: int = 0
    revision: str | None = None


class _Price(_Known):
    """What a constraint costs (program/prices.py)."""

    constraint: str
    gain_without: float
    kl_without: float | None = None
    loss_mse_without: float | None = None


class Provenance(_Known):
    """The keys that commands read; whatever else is there is shown at most."""

    model: str | None = None
    revision: str | None = None
    folder: str | None = None
    evaluation: str | None = None
    text: _Text | None = None
    prefill: Annotated[list[PositiveInt], Len(2, 2)] | None = None
    prices: list[_Price] = []
    stored: dict[str, str] = {}
    check: dict[str, Any] = {}
    versions: dict[str, Any] = {}
