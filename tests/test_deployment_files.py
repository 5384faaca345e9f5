"""What the containers' files promise, as far as it can be read from them: no Docker daemon or cluster is needed."""

from __future__ import annotations

import yaml
from models import ROOT

FILES = ROOT / "deployments"


def test_compose_hangs_together() -> None:
    """Every service that another waits for exists, health is waited for only where it is checked, no secret is written."""
    compose = yaml.safe_load((FILES / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"database", "server", "storage", "worker", "scheduler", "dask-worker"}
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


def test_a_pod_has_one_accelerator() -> None:
    """One GPU, one thread and one accel a worker."""
    job = yaml.safe_load((FILES / "kubernetes-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "accel=1" in container["command"]
    assert container["command"][container["command"].index("--nthreads") + 1] == "1"


def test_dockerfiles_copy_what_is_there() -> None:
    """Each COPY names files of the checkout; both images have the locked packages."""
    for name in ("Dockerfile", "Dockerfile.cuda"):
        text = (FILES / name).read_text()
        assert "requirements.lock" in text
        for line in text.splitlines():
            if line.startswith("COPY "):
                assert all((ROOT / f).exists() for f in line.split()[1:-1]), line
