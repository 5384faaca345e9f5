"""Credentials of object storage: refused in URLs, and in nothing that is said."""

from __future__ import annotations

import fsspec
import pytest
from test_object_storage import SECRET, environment, said  # noqa: F401

from mpq.errors import MpqError
from mpq.models.checkpoint import fetch
from mpq.models.discovery import checkpoints
from mpq.models.documents import read_documents
from mpq.redaction import has_credentials, redact
from mpq.spec import TextSpec, parse_spec
from mpq.store.entries import Store

TOKEN = "hf_planted"


def test_credentials_in_a_checkpoints_url_are_refused() -> None:
    """Before anything is asked of the server, wherever a checkpoint's URL is taken from."""
    for ask in (fetch, lambda url: checkpoints([url])):
        with pytest.raises(MpqError, match="carries credentials") as caught:
            ask(f"s3://AKIATESTER:{SECRET}@127.0.0.1:9/model")
        assert SECRET not in said(caught)


def test_a_connection_string_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that quotes its credentials when it cannot use them is not repeated."""
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=x;AccountKey {SECRET}")
    fsspec.get_filesystem_class("abfs").clear_instance_cache()
    with pytest.raises(MpqError, match=r"^The store abfs://c/x cannot be opened .*\.$") as caught:
        Store("abfs://c/x").check()
    assert SECRET not in said(caught)


@pytest.mark.parametrize(
    ("url", "carries"),
    [
        (f"s3://AKIA:{SECRET}@bucket/x", True),
        ("ftp://me:pass@host/x", True),
        ("https://host/x?sv=2024&sig=abcdefgh%3D", True),
        ("https://host/x?X-Amz-Signature=0123456789", True),
        ("abfs://c/x?account_key=abcdefgh", True),
        (f"https://{TOKEN}@host/x", True),
        (f"HTTPS://{TOKEN}@host:8080/x", True),
        (f"s3://{TOKEN}@bucket/x", True),
        (f"s3a://a@{TOKEN}@bucket/x", True),
        (f"simplecache::https://{TOKEN}@host/x", True),
        ("hf://org/name@revision", False),
        ("hf://name@revision", False),
        ("ssh://me@host/x", False),
        ("sftp://me@host:22/x", False),
        ("gs://bucket/x@y", False),
        ("memory://x@y", False),
        ("https://host/@org/name@1.2", False),
        ("https://host?mail=me@home", False),
        ("s3://bucket/design@2/x", False),
        ("abfs://container@account.dfs.core.windows.net/x", False),
        ("http://host:8080/a@b/c", False),
        ("s3://bucket/design=1/token", False),
        ("https://host/x?versionId=12", False),
        ("simplecache::s3://bucket/x", False),
        ("/data/me:you@home/x", False),
    ],
)
def test_urls_with_credentials(url: str, carries: bool) -> None:
    """What carries credentials is refused by store and spec, without repeating them; what does not, is not."""
    assert has_credentials(url) is carries
    if not carries:
        assert redact(url) == url
        assert Store(url).url == url
        return
    of_url = url.rpartition("=")[2] if "=" in url else "pass"
    secret = next((s for s in (SECRET, TOKEN) if s in url), of_url)
    spec = {
        "model": {"path": "m"},
        "calibration": {"source": "t"},
        "objectives": {"m": {"formats": ["int8"]}},
        "store": url,
    }
    for what in (
        lambda: Store(url),
        lambda: parse_spec(spec),
        lambda: parse_spec({**spec, "store": "x", "model": {"path": url}}),
    ):
        with pytest.raises(MpqError, match="carries credentials") as caught:
            what()
        assert f"{secret}@" not in said(caught)
        assert f"={secret}" not in said(caught)


def test_redaction_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of the environment are taken out of any sentence, in whatever form they were given."""
    monkeypatch.setenv("FSSPEC_S3", '{"key": "AKIAFSSPEC", "secret": "planted-in-fsspec"}')
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING", "AccountName=team;AccountKey=planted-in-string==;"
    )
    text = f"no: {SECRET}; planted-in-fsspec; the key planted-in-string== ; see s3://u:pw@b/x?token=tok123"
    told = str(MpqError(text))
    for secret in (SECRET, "planted", "pw@", "tok123"):
        assert secret not in told, told


def test_a_text_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text on S3 for which there are no credentials is one sentence."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    type(fsspec.filesystem("s3")).clear_instance_cache()
    with pytest.raises(MpqError, match=r"cannot be read .*credentials"):
        read_documents(TextSpec(source="s3://no-such-bucket/x.txt"))
