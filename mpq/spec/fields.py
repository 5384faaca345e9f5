"""The kinds of value that several sections of a spec hold, and what every section is."""

from __future__ import annotations

import os
import unicodedata
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from mpq.formats.scheme import get_scheme
from mpq.redaction import without_credentials
from mpq.urls import PublicUrl


def _format(name: str) -> str:
    return get_scheme(name).name


def number(value: Any) -> Any:
    """The value, which may be no boolean: YAML has yes and no for them."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, not {str(value).lower()}")
    return value


def _at_home(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path


def _local(path: str) -> str:
    if "://" in path:
        raise ValueError(
            f"must be a local folder, not {without_credentials(path)}: "
            "tables (store) and checkpoints (export.out) may lie elsewhere, plans and report are files of this machine"
        )
    return path


FormatName = Annotated[str, AfterValidator(_format)]
Number = Annotated[float, BeforeValidator(number)]
_MOST = 2**31 - 1  # what a count may be: more is a slip, and overflows somewhere later
Count = Annotated[int, BeforeValidator(number), Field(ge=1, le=_MOST)]
Whole = Annotated[int, BeforeValidator(number), Field(ge=0, le=_MOST)]
# a local path, with ~ for the user's home, or a URL, which may not carry credentials
Url = Annotated[PublicUrl, Field(min_length=1), AfterValidator(_at_home)]
LocalFolder = Annotated[Url, AfterValidator(_local)]


class Strict(BaseModel):
    """A section: a key that it does not know is a mistake, and no value changes."""

    # an input may hold a secret, hence hide_input_in_errors
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        """Texts reach terminals, file systems and databases: no NUL, no escape, no half of a character."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
                raise ValueError(f"holds a control character: {text[:60]!a}")
        return value
