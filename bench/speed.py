"""How long a user waits: the demo on a fresh store, again with everything cached, and with --tests all tests.

    python bench/speed.py [--tests]

Seconds of wall time and of all cores together, children included. Writes speed.json beside the other results of this device; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from record import record

ROOT = Path(__file__).parent.parent
Seconds = dict[str, float]


def timed(command: Sequence[str], environment: Mapping[str, str]) -> Seconds:
    """Wall time and CPU time (s) of a command that ends well; what it prints goes to stderr."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(took, 1), "cpu_s": round(cpu, 1)}


def demo(home: Path) -> dict[str, Seconds]:
    """The demo's run and its repetition, with store, results, compiled kernels and Prefect's records under `home`."""
    spec = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
    spec |= {"store": str(home / "store"), "out": str(home / "runs")}
    (home / "demo.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = [sys.executable, "-m", "mpq", "run", str(home / "demo.yaml")]
    (home / "temporary").mkdir()
    own = {"TMPDIR": "temporary", "XDG_CACHE_HOME": "cache", "PREFECT_HOME": "prefect"}
    environment = os.environ | {name: str(home / folder) for name, folder in own.items()}
    return {which: timed(command, environment) for which in ("fresh_demo", "cached_demo")}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", action="store_true", help="time `make test` as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        result = demo(Path(home))
    if options.tests:
        result["tests"] = timed(["make", "test"], os.environ)
    record("speed", result)


if __name__ == "__main__":
    main()
