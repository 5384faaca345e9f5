"""The whole flow with tables and Prefect's results on S3 and on Azure, and a secret planted where credentials come from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from object_storage import AZURE_KEY, azure_connection, azure_server, free_port, s3_server
from prefect.filesystems import RemoteFileSystem
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from test_calibrate import change
from typer.testing import CliRunner

from mpq.cli.inventory import verify
from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.report.runs import read_run
from mpq.spec import RunSpec
from mpq.store.entries import Store

pytest.importorskip("s3fs")

SECRET = "wJalrPlantedSecret/K7MDENG"


@pytest.fixture(params=["s3", "azure"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """The URL of an empty bucket or container on a server of the test's own, and the secret with which the environment opens it."""
    (tmp_path / "server").mkdir()
    if request.param == "s3":
        with s3_server(tmp_path / "server") as port:
            for name, value in {
                "AWS_ACCESS_KEY_ID": "AKIATESTER",
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            }.items():
                monkeypatch.setenv(name, value)
            yield from opened("s3", SECRET)
    else:
        pytest.importorskip("adlfs")
        with azure_server(tmp_path / "server") as port:
            monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_connection(port))
            yield from opened("abfs", AZURE_KEY)


def opened(protocol: str, secret: str) -> Iterator[tuple[str, str]]:
    """An empty bucket or container called team."""
    fsspec.get_filesystem_class(protocol).clear_instance_cache()
    fs = fsspec.filesystem(protocol)
    fs.mkdir("team")
    yield f"{protocol}://team", secret
    fs.clear_instance_cache()


def written(folder: Path) -> dict[str, bytes]:
    """Every file that is in a folder, and in Prefect's database."""
    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition("///")[2])
    kept = [*folder.rglob("*"), *database.parent.glob(f"{database.name}*")]
    assert database in kept
    return {str(path): path.read_bytes() for path in kept if path.is_file()}


def test_flow_on_object_storage(
    spec: RunSpec, place: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Run, run again (nothing is computed), read the run, follow a plan back; the secret is in nothing that was written."""
    bucket, secret = place
    protocol = bucket.partition(":")[0]
    few = {
        "limit": 8,
        "rounds": 0,
    }  # each time is an entry of the store, which takes several requests
    spec = change(spec, store=f"{bucket}/mpq", timing=few, taus=[0.01])
    results = RemoteFileSystem(basepath=f"{bucket}/prefect")
    results.save(f"results-on-{protocol}", overwrite=True)
    flow = calibrate.with_options(result_storage=results)
    with caplog.at_level(logging.INFO):
        first = flow(spec)
        again = flow(spec)
    assert all(tasks == cached for _, tasks, cached, _ in again["stages"])
    assert {e.state for e in verify(Store(spec.store))} == {"whole"}
    _, tables = read_run(tmp_path / "out" / "tiny")
    assert tables["evaluation"].height

    plan = next(Path(first["out"]["plans"]).glob("et-ip_et-*.json"))
    shown = CliRunner().invoke(app, ["store", "show", spec.store, str(plan)])
    assert shown.exit_code == 0, shown.output
    for kind in ("gains", "sensitivity", "timing", "groups"):
        assert kind in shown.output
    missing = spec.model_copy(update={"store": f"{protocol}://no-such-bucket/mpq"})
    with pytest.raises(MpqError, match="no such bucket") as caught:
        calibrate(missing)

    fs = fsspec.filesystem(protocol)
    objects = {name: fs.cat_file(name) for name in fs.find("team")}
    assert any(name.startswith("team/prefect/") for name in objects)
    assert any(name.startswith("team/mpq/plans/") for name in objects)
    said = {
        "log": caplog.text.encode(),
        "exception": str(caught.value).encode(),
        "shown": shown.output.encode(),
    }
    for name, content in {**written(tmp_path), **objects, **said}.items():
        assert secret.encode() not in content or name.startswith(str(tmp_path / "server")), name


def test_a_secret_in_the_url(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A store's URL with a password is refused before anything is written, Prefect's record of the run included."""
    url = f"s3://AKIATESTER:{SECRET}@127.0.0.1:{free_port()}/team"
    (tmp_path / "spec.yaml").write_text(spec.model_dump_json(), encoding="utf-8")
    before = set(tmp_path.rglob("*"))
    with caplog.at_level(logging.DEBUG, "mpq"):
        refused = CliRunner().invoke(app, ["run", str(tmp_path / "spec.yaml"), "--store", url])
        with pytest.raises(MpqError, match="carries credentials") as caught:
            Store(url)
    assert isinstance(refused.exception, MpqError)
    assert "carries credentials" in str(refused.exception)
    assert set(tmp_path.rglob("*")) == before
    said = {
        "log": caplog.text,
        "output": refused.output,
        "told": str(refused.exception),
        "exception": str(caught.value),
    }
    for name, text in said.items():
        assert SECRET not in text, name
    for name, content in written(tmp_path).items():
        assert SECRET.encode() not in content, name
