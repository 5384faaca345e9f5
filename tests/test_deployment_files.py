"""What the containers' files promise, as far as it can be read from them: no Docker daemon or cluster is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from small import ROOT

FILES = ROOT / "deployments"


def test_compose_hangs_together() -> None:
    """Every service that another waits for exists, health is waited for only where it is checked, no secret is written."""
    compose = yaml.safe_load((FILES / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {
        "database",
        "server",
        "storage",
        "worker",
        "scheduler",
        "dask-worker",
        "setup",
    }
    for name, service in services.items():
        needs = service.get("depends_on", {})
        for other in needs:
            assert other in services, name
            if isinstance(needs, dict) and needs[other]["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
        for key, value in service.get("environment", {}).items():
            if "PASSWORD" in key or "SECRET" in key or "DATABASE" in key:
                assert ":?" in value, f"{name}.{key}"
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
    dockerfile = ROOT / "deployments" / services["worker"]["build"]["dockerfile"].rpartition("/")[2]
    assert dockerfile.is_file()


def test_compose_accepts_it(tmp_path: Path) -> None:
    """docker-compose resolves the file and finds nothing that it does not know; without a password it says which."""
    composer = shutil.which("docker-compose")
    if composer is None:
        pytest.skip("no docker-compose found: install Debian's package docker-compose")
    file = FILES / "compose.yaml"
    compose = yaml.safe_load(file.read_text())
    del compose["name"]  # newer than Debian's docker-compose, which needs no daemon for this
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(compose))
    secrets = {"POSTGRES_PASSWORD": "one", "S3_USER": "two", "S3_PASSWORD": "three"}
    command = [composer, "-f", str(tmp_path / "compose.yaml"), "config"]
    plain = {k: v for k, v in os.environ.items() if k not in secrets}
    done = subprocess.run(command, env={**plain, **secrets}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)["services"]
    assert resolved["worker"]["environment"]["AWS_SECRET_ACCESS_KEY"] == "three"
    assert (
        "one@database" in resolved["server"]["environment"]["PREFECT_API_DATABASE_CONNECTION_URL"]
    )
    refused = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert refused.returncode
    assert "set POSTGRES_PASSWORD" in refused.stderr or "set S3_USER" in refused.stderr


def test_a_pod_has_one_accelerator() -> None:
    """One GPU, one thread and one accel a worker."""
    manifests = {m["kind"]: m for m in yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())}
    job, scheduler = manifests["Job"], manifests["Deployment"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "accel=1" in container["command"]
    assert container["command"][container["command"].index("--nthreads") + 1] == "1"
    service = manifests["Service"]
    assert (
        f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
        in container["command"]
    )
    assert service["spec"]["selector"] == scheduler["spec"]["template"]["metadata"]["labels"]
    pool = json.loads((FILES / "kubernetes-pool.json").read_text())["variables"]["properties"]
    assert manifests["PersistentVolumeClaim"]["metadata"]["name"] == pool["runs_claim"]["default"]
    assert container["envFrom"][0]["secretRef"]["name"] == pool["storage_secret"]["default"]


def test_dockerfiles_copy_what_is_there() -> None:
    """Each COPY names files of the checkout; both images have the locked packages."""
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (FILES / name).read_text()
        assert "requirements.lock" in text
        for line in text.splitlines():
            if line.startswith("COPY "):
                assert all((ROOT / f).exists() for f in line.split()[1:-1]), line
