"""A flow whose parameters Prefect may keep: it records them before the flow's body can refuse one that carries credentials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from prefect import Flow

from mpq.redaction import redact

P = ParamSpec("P")
R = TypeVar("R")


class Recorded(Flow[P, R]):
    """A Prefect flow that is recorded with *** in the place of credentials in its parameters."""

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters as the server gets them."""
        return {name: _public(v) for name, v in super().serialize_parameters(parameters).items()}


def flow(**options: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Prefect's decorator with its `options`, for a flow that is recorded without credentials."""
    return lambda function: Recorded(function, **options)


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(name)): _public(part) for name, part in value.items()}
    if isinstance(value, Sequence):
        return [_public(part) for part in value]
    return value
