"""docs/spec.md, the page of every key that a spec may hold, written from the models: `python -m mpq.spec.page FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mpq.spec.constraints import FormatOrBase
from mpq.spec.fields import FormatName
from mpq.spec.run import RunSpec

_HEAD = """# The spec of a run: every key

<!-- written by `make docs` from mpq/spec/run.py: change it there -->

A run is one YAML file, checked before anything is computed: `mpq init MODEL` writes one to begin with, `mpq run SPEC.yaml`
runs it. A key that is not listed here is a mistake and told as one. In paths `~` is your home; a URL is one of
[fsspec](storage.md)'s and carries no credentials.
"""
# what makes a text the name of a format
_NAMED = {
    get_args(FormatName)[1]: "format (`mpq formats`)",
    get_args(FormatOrBase)[1]: "`base` or format (`mpq formats`)",
}
_PLAIN = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    NoneType: "null",
}


def page() -> str:
    """The page as Markdown: a table for the top, then one for each section in the order of the file."""
    return "\n".join([_HEAD, *_section("The top of the file", "", RunSpec)])


def _section(title: str, at: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{(model.__doc__ or '').strip()}\n"
    yield "| key | what it is | default | values |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        key = f"{at}.{name}" if at else name
        yield f"| `{key}` | {_in_cell(field.description)} | {_default(field)} | {_in_cell(_values(field))} |"
    yield ""
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            key = f"{at}.{name}" if at else name
            if get_origin(field.annotation) is dict:
                key += ".<objective>"
            yield from _section(f"`{key}`", key, inner)


def _in_cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if isinstance(field.default, BaseModel):
        return "its keys' defaults"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def _values(field: FieldInfo) -> str:
    whole = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    kinds = dict.fromkeys(_kinds(whole))
    null = ["null"] if "null" in kinds else []
    kinds.pop("null", None)
    limits = dict(sorted(_limits([*_constraints(field.annotation), *field.metadata])))
    return ", ".join([*kinds, *(f"{sign} {bound:g}" for sign, bound in limits.items()), *null])


def _kinds(annotation: Any) -> Iterator[str]:
    """What may stand there, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated and inner[1] in _NAMED:
        yield _NAMED[inner[1]]
    elif origin is Literal:
        yield " ".join(f"`{value}`" for value in inner)
    elif origin is Annotated:
        yield from _kinds(inner[0])
    elif origin in (Union, UnionType):
        for part in inner:
            yield from _kinds(part)
    elif origin is tuple:
        yield f"list of {', '.join(_kinds(inner[0]))}"
    elif origin is dict and not list(_models(inner[1])):
        name, value = (" or ".join(_kinds(part)) for part in inner)
        yield f"a mapping of {name} to {value}"
    elif origin is dict:
        yield f"a section for each of {', '.join(_kinds(inner[0]))}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "section"
    else:
        yield _PLAIN[annotation]


def _constraints(annotation: Any) -> Iterator[Any]:
    """The constraints that an annotation carries, those of a list's elements left out."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from inner[1:]
    if origin in (Annotated, Union, UnionType):
        for part in inner if origin is not Annotated else inner[:1]:
            yield from _constraints(part)


def _limits(constraints: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """The bounds among constraints, the tighter of two last; the largest whole number is none worth telling."""
    for constraint in constraints:
        for part in getattr(constraint, "metadata", [constraint]):
            for name, sign in {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}.items():
                bound = getattr(part, name, None)
                if bound is not None and bound < 2**31 - 1:
                    yield sign, bound


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
