"""The whole flow with tables and Prefect's results on S3, and a secret planted where credentials come from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from object_storage import free_port, s3_server
from prefect.filesystems import RemoteFileSystem
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from typer.testing import CliRunner

from flows.calibrate import calibrate
from mpq.cli import app
from mpq.errors import MpqError
from mpq.inventory import verify
from mpq.runs import read_run
from mpq.spec import RunSpec
from mpq.store import Store

pytest.importorskip("s3fs")

SECRET = "wJalrPlantedSecret/K7MDENG"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on a server of the test's own; its credentials are in the environment."""
    (tmp_path / "server").mkdir()
    with s3_server(tmp_path / "server") as port:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIATESTER", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir("team")
        yield "s3://team"
        fs.clear_instance_cache()


def written(folder: Path) -> dict[str, bytes]:
    """Every file that is in a folder, and in Prefect's database."""
    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition("///")[2])
    kept = [*folder.rglob("*"), *database.parent.glob(f"{database.name}*")]
    assert database in kept
    return {str(path): path.read_bytes() for path in kept if path.is_file()}


def test_flow_on_s3(spec: RunSpec, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Run, run again (nothing is computed), read the run, follow a plan back; the secret is in nothing that was written."""
    spec = spec.model_copy(update={"store": f"{bucket}/mpq"})
    results = RemoteFileSystem(basepath=f"{bucket}/prefect")
    results.save("results-on-s3", overwrite=True)
    flow = calibrate.with_options(result_storage=results)
    with caplog.at_level(logging.INFO):
        first = flow(spec)
        again = flow(spec)
    assert all(tasks == cached for _, tasks, cached, _ in again["stages"])
    assert {e.state for e in verify(Store(spec.store))} == {"whole"}
    _, tables = read_run(tmp_path / "out" / "tiny")
    assert tables["evaluation"].height

    shown = CliRunner().invoke(app, ["store", "show", spec.store, first["out"]["plan"]])
    assert shown.exit_code == 0, shown.output
    for kind in ("gains", "sensitivity", "timing", "groups"):
        assert kind in shown.output
    missing = spec.model_copy(update={"store": "s3://no-such-bucket/mpq"})
    with pytest.raises(MpqError, match="no such bucket") as caught:
        calibrate(missing)

    fs = fsspec.filesystem("s3")
    objects = {name: fs.cat_file(name) for name in fs.find("team")}
    assert any(name.startswith("team/prefect/") for name in objects)
    assert any(name.startswith("team/mpq/plans/") for name in objects)
    said = {"log": caplog.text.encode(), "exception": str(caught.value).encode(), "shown": shown.output.encode()}
    for name, content in {**written(tmp_path), **objects, **said}.items():
        assert SECRET.encode() not in content, name


def test_a_secret_in_the_url(spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    said = {"log": caplog.text, "output": refused.output, "told": str(refused.exception), "exception": str(caught.value)}
    for name, text in said.items():
        assert SECRET not in text, name
    for name, content in written(tmp_path).items():
        assert SECRET.encode() not in content, name
