"""What a terminal, a log or a server's database is given: no credentials, nothing that steers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mpq.errors import MpqError
from mpq.redaction import has_credentials, printable
from mpq.spec import RunSpec
from mpq.urls import PublicUrl

PIECES = [
    "s3",
    "hTTps",
    "ssh",
    "#",
    "://",
    "user",
    ":",
    "pass",
    "@",
    "bucket",
    "/",
    "?",
    "&",
    "sig",
    "=",
    "AccountKey",
    "8080",
    "X-Amz-Token",
    ",",
    "v",
]
PATTERN = re.compile(TypeAdapter(PublicUrl).json_schema()["pattern"])


@settings(max_examples=300, deadline=None)
@example("?sig=://")
@example("?a://x?sig=1")
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_schema_refuses_what_the_code_refuses(url: str) -> None:
    """A server, which knows the JSON schema alone, refuses exactly the URLs that the validator refuses, before it stores them."""
    assert (PATTERN.search(url) is None) == has_credentials(url)


def test_what_is_refused_is_not_repeated() -> None:
    """The validator's own words name the URL without its secret."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(PublicUrl).validate_python("s3://me:hunter22@bucket/x")
    told = caught.value.errors(include_input=False)[0]["msg"]
    assert "carries credentials" in told
    assert "hunter22" not in told


def test_prefects_server_refuses_by_the_schema() -> None:
    """What Prefect's server calls before it keeps the parameters of a run."""
    validation = pytest.importorskip("prefect.utilities.schema_tools.validation")
    schema = {"type": "object", "properties": {"store": TypeAdapter(PublicUrl).json_schema()}}
    assert not validation.validate({"store": "s3://bucket/x"}, schema)
    with pytest.raises(validation.ValidationError):
        validation.validate({"store": "s3://a:b@bucket/x"}, schema, raise_on_error=True)


@pytest.mark.parametrize(
    "at",
    [
        ("store",),
        ("model", "path"),
        ("calibration", "source"),
        ("evaluation", "source"),
        ("evaluation", "data_dir"),
        ("runner", "address"),
        ("export", "out"),
        ("out",),
    ],
)
def test_no_url_of_a_spec_is_kept_with_credentials(at: tuple[str, ...]) -> None:
    """A deployment's server checks a spec by its JSON schema before it keeps it: each URL in it is of the type that refuses."""
    validation = pytest.importorskip("prefect.utilities.schema_tools.validation")
    schema = RunSpec.model_json_schema()

    def spec(url: str) -> dict[str, Any]:
        text = {"source": "a.txt"}
        whole: dict[str, Any] = {
            "model": {"path": "m"},
            "calibration": dict(text),
            "evaluation": dict(text),
            "objectives": {"m": {"formats": ["int8"]}},
            "runner": {},
            "export": {},
        }
        part = whole
        for name in at[:-1]:
            part = part[name]
        part[at[-1]] = url
        return whole

    assert not validation.validate(spec("tcp://host:1"), schema)
    for url in ("s3://a:secret@bucket/x", "https://secret@host/x", "https://host/x?sig=secret"):
        with pytest.raises(validation.ValidationError):
            validation.validate(spec(url), schema, raise_on_error=True)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_sentences_do_not_steer_the_terminal(text: str) -> None:
    """Whatever a name holds, a sentence with it can be encoded and has no control character but line breaks and tabs."""
    for told in (printable(text), str(MpqError(text))):
        told.encode()
        assert all(c in "\n\t" or ord(c) >= 32 for c in told)
        assert not re.search("[\x7f-\x9f\u202a-\u202e]", told)


def test_what_is_printable_stays() -> None:
    """Words of any script, and paths with brackets in them, are as they were; an escape is shown."""
    for text in ("Größe τ=0.01", "C:\\x [bold]", "模型/😀", "a\nb\tc"):
        assert printable(text) == text
    assert printable("\x1b[2J\x00") == "\\x1b[2J\\x00"
