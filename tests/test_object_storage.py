"""The store on object storage, over HTTP: S3 and Azure Blob, with faults on the way, and no credentials in what is said."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from object_storage import FaultyProxy, azure_connection, azure_server, free_port, s3_server
from small import write_checkpoint

from mpq.cli.inventory import entries, verify
from mpq.errors import MpqError
from mpq.models.checkpoint import fetch
from mpq.models.discovery import checkpoints
from mpq.store.entries import Damaged, Store

pytest.importorskip("s3fs")


pytest.importorskip("adlfs")


SECRET = "wJalrPlantedSecret/K7MDENG"


FRAME = pl.DataFrame(
    {"op": [f"layer.{i}" for i in range(4000)], "gain_s": np.random.default_rng(0).random(4000)}
)


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server for this file's tests, each of which has a bucket of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture(scope="module")
def azure_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An Azure Blob server for this file's tests."""
    with azure_server(tmp_path_factory.mktemp("azure")) as port:
        yield port


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Credentials in the environment, the secret among them; no file system is kept from one test to the next."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATESTER",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "MPQ_STORE_ATTEMPTS": "4",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    for protocol in ("s3", "abfs"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a folder in an empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    name = f"bucket-{abs(hash(request.node.name)):x}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}/team/mpq"


@pytest.fixture
def proxy(bucket: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy between the store and its server."""
    faulty = FaultyProxy(s3_port)
    faulty.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield faulty
    faulty.stop()


@pytest.fixture
def container(
    azure_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """The URL of a folder in an empty Azure container."""
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_connection(azure_port))
    name = f"container-{abs(hash(request.node.name)):x}"
    fsspec.filesystem("abfs").mkdir(name)
    return f"abfs://{name}/team/mpq"


@pytest.fixture(params=["bucket", "container"])
def store(request: pytest.FixtureRequest) -> Store:
    """A store on S3 and one on Azure."""
    return Store(request.getfixturevalue(request.param))


def said(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """All that a log of the exception would show."""
    return "".join(traceback.format_exception(caught.value))


def test_round_trip(store: Store) -> None:
    """A table written is found, read back equal, listed; the check before a run leaves nothing behind."""
    store.check()
    assert not store.files()
    ref = store.write_table("gains", "k1", FRAME, upstream=("k0",))
    assert store.find("gains", "k1") == ref
    assert store.read_table(ref).equals(FRAME)
    assert set(store.files()) == {"gains/k1/meta.json", f"gains/k1/{ref.sha256}.parquet"}
    assert [e.state for e in verify(store)] == ["whole"]
    assert store.find("gains", "nope") is None


def test_damage_on_the_storage(store: Store) -> None:
    """An object overwritten by someone else is noticed, named, and written anew."""
    ref = store.write_table("gains", "k1", FRAME)
    fs, root = fsspec.core.url_to_fs(store.url)
    fs.pipe_file(f"{root}/gains/k1/{ref.sha256}.parquet", b"PAR1 but not ours")
    assert store.find("gains", "k1") is None
    with pytest.raises(Damaged):
        store.read_table(ref)
    assert [(e.kind, e.key) for e in verify(store) if e.state == "damaged"] == [("gains", "k1")]
    assert store.read_table(store.write_table("gains", "k1", FRAME)).equals(FRAME)


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_upload_faults_pass(
    fault: str, bucket: str, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """An upload refused or broken off twice is tried again; what is then there is whole."""
    proxy.spoil(fault, "PUT", 2)
    with caplog.at_level(logging.WARNING, "mpq"):
        ref = Store(bucket).write_table("gains", "k1", FRAME)
    assert proxy.spoilt == [fault] * 2
    assert (
        "trying again" in caplog.text
    )  # once or twice: aiohttp itself sends again what was reset at once
    assert Store(bucket).find("gains", "k1") == ref


@pytest.mark.parametrize("fault", ["500", "503", "truncated", "short"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_download_faults_pass(fault: str, method: str, bucket: str, proxy: FaultyProxy) -> None:
    """An answer that is an error, or cut short (openly or not), is asked for again and never taken for the table."""
    ref = Store(bucket).write_table("gains", "k1", FRAME)
    proxy.spoil(fault, method, 1)
    assert Store(bucket).read_table(ref).equals(FRAME)
    if fault.isdecimal() or method == "GET":
        assert proxy.spoilt == [fault]


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncated", "short"])
def test_a_checkpoint_comes_whole(
    fault: str, bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found under a URL and fetched from it is as what was put there, whatever breaks off on the way; a new version is seen."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    source = write_checkpoint(tmp_path / "model")
    fs = fsspec.filesystem("s3")
    for file in source.iterdir():
        fs.pipe_file(f"{bucket}/a/{file.name}", file.read_bytes())
    proxy.spoil(fault, "GET", 2)
    (found,) = checkpoints([bucket])
    proxy.spoil(fault, "GET", 2)
    here = fetch(found.path)
    assert proxy.spoilt
    fetched = {p.name: p.read_bytes() for p in here.iterdir() if not p.name.startswith(".")}
    assert fetched == {p.name: p.read_bytes() for p in source.iterdir()}
    fs.pipe_file(f"{bucket}/a/config.json", (source / "config.json").read_bytes() + b" ")
    assert fetch(found.path) != here


def test_checkpoints_that_cannot_be_had(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there, access refused, a service that stays away: one sentence, and the secret is not in it."""
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "2")
    for fault, message in [
        ("", "There is no checkpoint at|has no config"),
        ("403", "access is refused"),
        ("503", "tried 2 times"),
    ]:
        proxy.spoil(fault or "503", "GET", 100 if fault else 0)
        for ask in (fetch, lambda url: checkpoints([url])) if fault else (fetch,):
            with pytest.raises(MpqError, match=message) as caught:
                ask(f"{bucket}/a")
            assert SECRET not in said(caught)


def test_refused_connections_pass(bucket: str, proxy: FaultyProxy) -> None:
    """A service that comes up while the store is waiting for it is a pause."""
    proxy.stop()
    later = threading.Timer(0.2, proxy.start)
    later.start()
    try:
        ref = Store(bucket).write_table("gains", "k1", FRAME)
    finally:
        later.join()
    assert Store(bucket).read_table(ref).equals(FRAME)


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_a_fault_that_stays(
    fault: str, bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retries end in one sentence; there is no entry, not even half of one."""
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "2")
    proxy.spoil(fault, "PUT", 100)
    with pytest.raises(
        MpqError, match=r"^The store s3://.* cannot be written \(.*\): tried 2 times; .*\.$"
    ) as caught:
        Store(bucket).write_table("gains", "k1", FRAME)
    assert len(proxy.spoilt) == (
        4 if fault == "reset" else 2
    )  # aiohttp itself sends again what was reset at once
    assert SECRET not in said(caught)
    assert not Store(bucket).files()
    assert Store(bucket).find("gains", "k1") is None


def test_an_upload_that_dies_before_its_metadata(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data without metadata is no entry."""
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "1")
    store, whole = Store(bucket), Store._write

    def fail_at_meta(self: Store, path: str, data: bytes) -> None:
        if path.endswith("meta.json"):
            proxy.spoil("reset", "PUT", 100)
        whole(self, path, data)

    monkeypatch.setattr(Store, "_write", fail_at_meta)
    with pytest.raises(MpqError):
        store.write_table("gains", "k1", FRAME)
    proxy.spoil("", "", 0)
    assert store.find("gains", "k1") is None
    assert [e.state for e in entries(store)] == ["unfinished"]


def test_an_answer_that_stays_cut(bucket: str, proxy: FaultyProxy) -> None:
    """A table that never arrives whole is an error; one that claims to be whole and is not is damaged: neither is served."""
    ref = Store(bucket).write_table("gains", "k1", FRAME)
    proxy.spoil("truncated", "GET", 100)
    with pytest.raises(MpqError, match="cannot be read"):
        Store(bucket).read_table(ref)
    proxy.spoil("short", "GET", 100)
    with pytest.raises(Damaged):
        Store(bucket).read_table(ref)


def test_a_spoilt_answer_passes(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer whose bytes are not those of its checksum is asked for again; if all are so, the sentence looks at the way."""
    ref = Store(bucket).write_table("gains", "k1", FRAME)
    proxy.spoil("flipped", "GET", 1)
    assert Store(bucket).read_table(ref).equals(FRAME)
    assert proxy.spoilt == ["flipped"]
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "2")
    proxy.spoil("flipped", "GET", 100)
    with pytest.raises(MpqError, match=r"tried 2 times; what arrives is not what its checksum"):
        Store(bucket).read_table(ref)


@pytest.mark.parametrize(
    ("fault", "advice"),
    [("403", "access is refused"), ("500", "tried 2 times"), ("skewed", "clock differs")],
)
def test_what_cannot_be_read_is_not_missing(
    fault: str, advice: str, bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses, fails or finds the clock wrong has not said that there is nothing: an error, for one or many."""
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "2")
    store = Store(bucket)
    store.write_table("gains", "k1", FRAME)
    for ask in (lambda: store.find("gains", "k1"), lambda: store.find_all("gains", ["k1", "k2"])):
        proxy.spoil(fault, "GET", 100)
        with pytest.raises(MpqError, match=advice):
            ask()
    proxy.spoil("", "", 0)
    assert store.find("gains", "k2") is None


def test_a_store_that_may_only_be_read(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is found, however long ago it was written, though writing is refused; a check says so."""
    store = Store(bucket)
    clock = time.time
    monkeypatch.setattr("mpq.store.entries.time.time", lambda: clock() - 1e6)
    ref = store.write_table("gains", "k1", FRAME)
    monkeypatch.setattr("mpq.store.entries.time.time", clock)
    proxy.spoil("403", "PUT", 100)
    assert store.find("gains", "k1") == ref
    assert proxy.spoilt == ["403"]
    with pytest.raises(MpqError, match=r"cannot be written .*: access is refused"):
        store.check()


def test_the_stores_own_clock(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry's age is the service's word, whatever this machine's clock says."""
    store, clock = Store(bucket), time.time
    store.write_table("gains", "k1", FRAME)
    monkeypatch.setattr("mpq.store.entries.time.time", lambda: clock() + 86400)
    age = store.age_s("gains", "k1")
    assert age is not None
    assert -2 <= age < 1000
    assert {path.split("/")[0] for path in store.files()} == {"gains"}


@pytest.mark.parametrize("doing", ["write", "read", "list"])
def test_access_refused(doing: str, bucket: str, proxy: FaultyProxy) -> None:
    """403 is told at once: it does not go away."""
    ref = Store(bucket).write_table("gains", "k1", FRAME)
    for method in {"write": ["PUT"], "read": ["HEAD"], "list": ["GET"]}[doing]:
        proxy.spoil("403", method, 100)
    with pytest.raises(
        MpqError, match=r"^The store s3://.*access is refused; check that the credentials .*\.$"
    ) as caught:
        {
            "write": Store(bucket).check,
            "read": lambda: Store(bucket).read_bytes(ref),
            "list": Store(bucket).files,
        }[doing]()
    assert len(proxy.spoilt) == 1
    assert SECRET not in said(caught)


def test_no_such_bucket(bucket: str, container: str) -> None:
    """A bucket or container that is not there is told, not made."""
    for url in (bucket, container):
        elsewhere = url.replace("://", "://no-")
        with pytest.raises(
            MpqError, match=r"there is no such bucket or container; create it first.*\.$"
        ):
            Store(elsewhere).check()
        fs, _ = fsspec.core.url_to_fs(url)
        assert not [name for name in fs.ls("") if str(name).startswith("no-")]


def test_no_service(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens: one sentence after the retries."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "3")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(
        MpqError,
        match=r"^The store s3://.* tried 3 times; check that the service is reachable.*\.$",
    ):
        Store(bucket).check()


def test_wrong_azure_key(container: str, azure_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's refusal is told at once, without the key or what was signed with it."""
    wrong = "QUJD" * 20 + "AAAAAAA="
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        azure_connection(azure_port).replace("AccountKey=", "AccountKey=" + wrong[:8]),
    )
    fsspec.get_filesystem_class("abfs").clear_instance_cache()
    with pytest.raises(MpqError, match=r"^The store abfs://.*access is refused.*\.$") as caught:
        Store(container).check()
    assert "Eby8vd" not in said(caught)
