"""From a YAML file, or plain data, to a checked spec; one sentence for the first thing that is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mpq.errors import MpqError, first_line
from mpq.spec.run import RunSpec, TextSpec

Spec = TypeVar("Spec", bound=BaseModel)
_LARGEST = 2**20  # bytes; a spec is a page of text, and what is larger is another file


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice is a mistake: YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        """The mapping as a dict. Raises _Twice for a key that it holds twice."""
        seen = set[Hashable]()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # defaults: what stands beside them comes first
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise _Twice(key, key_node.start_mark.line + 1)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Twice(Exception):
    def __init__(self, key: Hashable, line: int):
        super().__init__(f"the key {key} stands twice, again in line {line}: keep one of them")


def load_spec(path: str | Path) -> RunSpec:
    """Read and check a spec. Raises MpqError with the file, the key and what was expected there."""
    name = _literal(path)
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise MpqError(f"{name} is larger than 1 MB: expected a spec, a page of YAML.")
        data = yaml.load(content.decode("utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise MpqError(
            f"No spec at {name}: expected a YAML file such as examples/demo.yaml."
        ) from None
    except RecursionError:
        raise MpqError(
            f"The spec {name} cannot be read: its brackets nest too deep for a spec."
        ) from None
    except MpqError:
        raise
    except Exception as error:  # PyYAML passes on whatever Python says to odd numbers and dates
        why = " ".join(str(error).split()) or first_line(error)
        raise MpqError(f"The spec {name} cannot be read: {_literal(why)}.") from None
    if data is None:
        raise MpqError(f"The spec {name} is empty: `mpq init MODEL` writes one to begin with.")
    return parse_spec(data, name)


def parse_spec(data: Any, where: str = "the spec") -> RunSpec:
    """A RunSpec from plain data. Raises MpqError for the first thing wrong with it."""
    if not isinstance(data, dict):
        raise MpqError(
            f"{where} is not a spec: expected a mapping with the keys {', '.join(RunSpec.model_fields)}."
        )
    return _checked(RunSpec, data, where)


def parse_text(**fields: Any) -> TextSpec:
    """A TextSpec from its fields. Raises MpqError for the first thing wrong with it."""
    return _checked(TextSpec, fields, "text")


def _checked(model: type[Spec], data: dict[Any, Any], where: str) -> Spec:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise MpqError(f"{where}: {_literal(_sentence(error, model))}") from None
    except RecursionError:
        raise MpqError(f"{where}: it contains itself, or nests too deep for a spec.") from None


def _literal(text: object) -> str:
    """The text in one line, what a terminal would obey as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    # a misspelt key also leaves one missing: the key is what the user wrote
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    at = ".".join(str(part)[:80] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _siblings(first["loc"], model)
        close = difflib.get_close_matches(str(first["loc"][-1])[:80], known, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        return f"unknown key {at}{meant}: expected one of {', '.join(known)}."
    if first["type"] == "missing":
        return f"{at} is missing: it is required."
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("a valid tuple", "a list, such as [a, b]")
    message = message.replace("a valid dictionary or instance of", "a mapping with the keys of")
    return f"{at + ': ' if at else ''}{message}{'' if message.endswith('.') else '.'}"


def _siblings(loc: tuple[int | str, ...], model: Any) -> list[str]:
    """The keys that are known where `loc` points."""
    for part in loc[:-1]:
        if part in getattr(model, "model_fields", {}):
            kind = model.model_fields[part].annotation
            kinds = (kind, *getattr(kind, "__args__", ()))
            models = (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
            model = next(models, model)
    return list(model.model_fields)
