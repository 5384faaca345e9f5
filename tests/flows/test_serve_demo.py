"""What `make serve-demo` shows: a run that plans by vLLM's times and ends with a checkpoint, which vLLM serves over HTTP."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_export
from rich.console import Console
from small import ROOT

from deployments import serve_demo
from deployments.processes import Services
from deployments.serve_demo import ask
from mpq.export import check
from mpq.flows.calibrate import calibrate
from mpq.serving import EngineProcess
from mpq.spec import RunSpec, load_spec, parse_spec
from mpq.tasks.stage import read
from mpq.timing import in_vllm


class Impatient(Console):
    """Somebody who presses Ctrl-C once the answer is there."""

    def print(self, *said: Any, **how: Any) -> None:
        """Show it, and press."""
        super().print(*said, **how)
        if "answered" in str(said):
            os.kill(os.getpid(), signal.SIGINT)


def pressed_again(services: Services) -> None:
    """Ctrl-C once more, while the server is being stopped."""
    os.kill(os.getpid(), signal.SIGINT)
    STOP(services)


STOP = Services._stop


def cmdline(process: psutil.Process) -> list[str]:
    """A process's command and its arguments, nothing where it is over."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def served(
    prefect: None, engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunSpec, Any, str]:
    """The demo's spec with less of everything: the run's outcome, and what the demo printed."""
    folder = tmp_path_factory.mktemp("serve")
    data = load_spec(ROOT / "examples" / "serve.yaml").model_dump(mode="json")
    data["model"] |= {"path": str(ROOT / "examples" / "demo"), "device": "cpu"}
    for part, samples in (("calibration", 4), ("evaluation", 2)):
        source = str(ROOT / data[part]["source"])
        data[part] |= {"source": source, "samples": samples, "length": 64, "batch": 2}
    data["calibration"]["shards"] = 1
    data["evaluation"]["ttft_repeats"] = 3
    data["timing"] |= {"length": 64, "repeats": 2, "target": None, "rounds": 0, "limit": 8}
    data["objectives"] = {"et": {"formats": ["int8"], "strategies": ["uniform", "ip"]}}
    data |= {"taus": [0.002], "store": str(folder / "store"), "out": str(folder / "runs")}
    data["export"]["plan"] = "et-uniform_int8"
    spec = parse_spec(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(in_vllm._idle, 1, engine)
        patch.setattr(check, "reloaded", small_export.reloaded)
        return demonstrated(spec, folder)


def demonstrated(spec: RunSpec, folder: Path) -> tuple[RunSpec, Any, str]:
    """The run and the demo after it, which is interrupted the first time."""
    outcome = calibrate(spec)
    printed, checkpoint = io.StringIO(), Path(outcome["out"]["checkpoint"])

    def heard(address: str, prompt: str) -> str:
        servers = [p for p in psutil.process_iter() if str(checkpoint) in cmdline(p)]
        outcome["servers"] = [each for p in servers for each in (p, *p.children(recursive=True))]
        outcome["answer"] = ask(address, prompt)
        return str(outcome["answer"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_demo, "ask", heard)
        patch.setattr(Services, "_stop", pressed_again)
        how = (spec, checkpoint, folder / "demo")
        with pytest.raises(KeyboardInterrupt):
            serve_demo.demonstrate(*how, Impatient(file=printed, width=120))
        outcome["left"] = psutil.wait_procs(outcome["servers"], timeout=30)[1]
        patch.setattr(serve_demo, "answered", lambda *_: outcome["answer"])
        console = Console(file=printed, width=120)
        outcome["times"] = serve_demo.demonstrate(*how, console, repeats=2)[1]
    return spec, outcome, printed.getvalue()


def test_planned_by_vllms_times(served: tuple[RunSpec, Any, str]) -> None:
    """Configurations are those that vLLM can serve, timed in it, under a device that names it."""
    _, outcome, _ = served
    timing = read(outcome["tables"]["timing"][0])
    assert set(timing["mode"]) == {"vllm eager"}
    assert all("vLLM 0." in name for name in timing["device"])
    assert timing.height == 9  # q k v and o; gate and up, down; the head alone
    measured = read(outcome["tables"]["evaluation"][0]).filter(metric="ttft_s")
    assert measured.height == 2


def test_served_and_asked(served: tuple[RunSpec, Any, str]) -> None:
    """`vllm serve` answers over HTTP; base and the plan are timed; predicted stands beside measured."""
    _, outcome, printed = served
    assert len(outcome["answer"]) > 3
    assert min(*outcome["times"].ttft_s, *outcome["times"].token_s) > 0
    for said in ("ready after", "asked 'def area", "predicted", "measured", "each further token"):
        assert said in printed
    record = json.loads(Path(outcome["out"]["checkpoint"], "export.json").read_text())
    assert record["check"]["passed"]
    assert record["formats"] == {"int8": 28}


def test_ctrl_c_leaves_no_server(served: tuple[RunSpec, Any, str]) -> None:
    """Ctrl-C while `vllm serve` runs, pressed twice, ends the demo with all of the server's processes."""
    _, outcome, _ = served
    assert len(outcome["servers"]) > 1  # the server and its engine
    assert not outcome["left"]
    here = str(outcome["out"]["checkpoint"])
    assert not [p for p in psutil.process_iter() if here in cmdline(p)]
