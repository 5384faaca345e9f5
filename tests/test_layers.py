"""Imports go down the layers only, and only tasks and flows know Prefect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from models import ROOT

from flows.planning import CPU_KERNELS, CUDA_KERNELS, TIMING

LAYERS = [
    ["redaction", "errors", "shown", "drift"],
    ["formats", "devices", "solver", "presolve", "slices", "machine", "gain_model", "kernels.compiler"],
    ["spec", "tables", "quantize", "pairs", "kernels.fp8", "gpu_state", "transport"],
    ["kernels.bgemm", "kernels.flash", "kernels.rows", "kernels.int8_attention", "kernels.int8_linear"],
    ["store", "graph", "plan", "model", "attention", "design"],
    ["kernels", "kernels.cpu", "kernels.cuda", "kernels.emulated", "kernels.rounding"],
    ["task_data", "checkpoints", "changes"],
    ["partition", "apply", "runs", "inventory"],
    ["prefill"],
    ["sensitivity", "timing", "gains", "evaluate", "harness", "draw", "pace"],
    ["strategies", "report", "accuracy", "findings", "drawing", "figures", "attention_gain", "paper_figures"],
    ["console"],
    ["store_cli"],
    ["cli"],
]
LEVEL = {f"mpq.{m}": level for level, modules in enumerate(LAYERS) for m in modules}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def name_of(path: Path) -> str:
    """`mpq/kernels/cpu.py` is `mpq.kernels.cpu`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", sorted((ROOT / "mpq").rglob("*.py")), ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """A module imports from its own layer or below; the CLI alone reaches for the flows."""
    name = name_of(path)
    if name == "mpq":
        return
    assert name in LEVEL, f"give {name} a layer"
    for other in imports(path):
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[name], f"{name} imports {other}, a layer above"
        top = other.partition(".")[0]
        assert top not in ("prefect", "tasks"), f"{name} imports {other}"
        assert top != "flows" or name == "mpq.cli"


# what a measurement runs through and its time does not depend on: messages, tables' columns, what values are rounded to, the trace whose
# groups are in the key by their content, what is recorded beside a time
TIMELESS = {
    "errors",
    "redaction",
    "devices",
    "tables",
    "formats",
    "graph",
    "gpu_state",
    "quantize",
    "kernels.emulated",
    "kernels.rounding",
}


@pytest.mark.parametrize(("device", "kernels"), [("cpu", CPU_KERNELS), ("cuda", CUDA_KERNELS)])
def test_timing_keys_name_what_timing_runs_through(device: str, kernels: tuple[str, ...]) -> None:
    """Every module that timing imports, whatever through, is in the key of what is measured; a change of it measures again."""
    reached, ahead = set[str](), ["timing", f"kernels.{device}"]
    others = set(CPU_KERNELS) if device == "cuda" else set()  # a CPU's own kernels do not run on a GPU
    while ahead:
        name = ahead.pop()
        if name not in reached | TIMELESS | others:
            reached.add(name)
            path = ROOT.joinpath("mpq", *name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            ahead += [other.removeprefix("mpq.") for other in imports(file) if other in LEVEL]
    assert reached == {*TIMING, *kernels}


def test_reports_need_no_torch() -> None:
    """Reports are written where no torch is."""
    code = "import sys, mpq.report, mpq.figures, mpq.paper_figures, mpq.findings, mpq.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_stay_small() -> None:
    """No file outgrows 350 lines or is named after nothing."""
    for path in [p for d in ("mpq", "tasks", "flows") for p in (ROOT / d).rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 350, path
        assert path.stem not in ("utils", "helpers", "common", "base"), path
