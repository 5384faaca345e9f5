"""The base job templates of the Docker and Kubernetes pools, against a real server and, where they are installed, the workers' own packages."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import yaml
from small import ROOT

from deployments.processes import Services

FILES = ROOT / "deployments"
KINDS = ("docker", "kubernetes")


def template(kind: str) -> dict[str, Any]:
    """A pool's base job template."""
    return json.loads((FILES / f"{kind}-pool.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The tests' own server: no worker asks it for what is deployed here."""
    with Services(tmp_path_factory.mktemp("services"), {"PREFECT_API_URL": small.API}) as services:
        services.api = small.API
        yield services


def test_pools_are_created_with_them(services: Services, tmp_path: Path) -> None:
    """`prefect work-pool create` takes both templates as they are; one whose variable is not declared is refused."""
    for kind in KINDS:
        create = ("work-pool", "create", "--type", kind, "--base-job-template")
        services.prefect(*create, str(FILES / f"{kind}-pool.json"), f"mpq-{kind}")
        pool = services.get(f"work_pools/mpq-{kind}")
        assert pool["type"] == kind
        assert pool["base_job_template"] == template(kind)
        broken = template(kind)
        del broken["variables"]["properties"]["image"]
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(RuntimeError, match="image"):
            services.prefect(*create, str(tmp_path / "broken.json"), "broken")


def test_compose_sets_itself_up(services: Services) -> None:
    """The command of compose.yaml's `setup` makes bucket, pool and deployments, and does no harm when it runs again."""
    services.s3("another")
    command = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]["setup"]["command"]
    path = f"{Path(sys.executable).parent}:{services.environment['PATH']}"
    for _ in range(2):
        ran = shlex.split(command)
        done = subprocess.run(
            ran,
            cwd=FILES.parent,
            env={**services.environment, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "mpq" in services.bucket().ls("")
    assert services.get("work_pools/mpq")["type"] == "process"
    assert {d["name"] for d in services.post("deployments/filter", {})} == {
        "calibrate",
        "watch",
        "retune",
        "campaign",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_outlives_a_run(kind: str) -> None:
    """Plans and reports go to a volume, where the image runs flows; every variable is described; no default is a secret."""
    mounted = json.dumps(template(kind))
    assert "/opt/mpq/.work/runs" in mounted
    assert "WORKDIR /opt/mpq" in (FILES / "Dockerfile").read_text()
    for name, variable in template(kind)["variables"]["properties"].items():
        assert variable["description"], name
    assert not {"KEY", "SECRET", "PASSWORD", "TOKEN"} & {
        part
        for name in template(kind)["variables"]["properties"]["env"]["default"]
        for part in name.split("_")
    }


def as_kubernetes_reads(kind: str, manifest: dict[str, Any]) -> Any:
    """A manifest as Kubernetes' own client understands it: a field that is misspelt or misplaced is gone."""
    client = pytest.importorskip("kubernetes_asyncio.client")

    async def read() -> Any:
        async with client.ApiClient() as api:
            return api.sanitize_for_serialization(
                api.deserialize(SimpleNamespace(data=json.dumps(manifest)), kind)
            )

    return asyncio.run(read())


def test_the_kubernetes_worker_makes_a_job_of_it(services: Services) -> None:
    """Prefect's worker fills the template in with its defaults, and Kubernetes' client knows every field of the job."""
    worker = pytest.importorskip(
        "prefect_kubernetes.worker",
        reason="prefect-kubernetes is not installed: pip install 'mpq[kubernetes]'",
    )
    make = worker.KubernetesWorkerJobConfiguration.from_template_and_values
    for values in (
        {},
        {"gpus": "1", "service_account_name": "mpq", "job_watch_timeout_seconds": 60},
    ):
        job = asyncio.run(make(template("kubernetes"), values)).job_manifest
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "mpq-storage"}}]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == values.get("gpus", "0")
        job["spec"]["template"]["spec"]["containers"][0]["env"] = [
            {"name": "A", "value": "b"}
        ]  # the worker makes a list of it
        for misplaced in (
            "parallelism",
            "completions",
        ):  # the worker insists on them in the pod, Kubernetes passes over them
            del job["spec"]["template"]["spec"][misplaced]
        assert as_kubernetes_reads("V1Job", job) == job


def test_the_docker_worker_takes_it(services: Services) -> None:
    """Prefect's Docker worker fills the template in with its defaults."""
    worker = pytest.importorskip(
        "prefect_docker.worker", reason="prefect-docker is not installed: pip install 'mpq[docker]'"
    )
    made = asyncio.run(
        worker.DockerWorkerJobConfiguration.from_template_and_values(template("docker"), {})
    )
    assert made.image == "mpq:cpu"
    assert made.volumes == ["mpq_runs:/opt/mpq/.work/runs", "/etc/mpq/aws:/root/.aws:ro"]
    assert made.networks == ["mpq_default"]


def test_manifests_that_kubernetes_knows() -> None:
    """Kubernetes' client knows every field of the manifests beside it."""
    for manifest in yaml.safe_load_all((FILES / "kubernetes.yaml").read_text(encoding="utf-8")):
        assert as_kubernetes_reads(f"V1{manifest['kind']}", manifest) == manifest
