"""The type of a URL or path that may be shown and kept: one without credentials."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from mpq.redaction import PUBLIC_PATTERN, without_credentials

# its JSON schema refuses what the validator refuses: a server that is sent parameters checks them by the schema before it keeps
# them, while a validator's code runs after
PublicUrl = Annotated[
    str,
    AfterValidator(without_credentials),
    WithJsonSchema({"type": "string", "minLength": 1, "pattern": PUBLIC_PATTERN}),
]
# the same for a flow's parameters, which check it in their body: of a parameter that a validator refuses Prefect logs the value
UrlParameter = Annotated[str, WithJsonSchema({"type": "string", "pattern": PUBLIC_PATTERN})]
