"""Imports go down the layers only, and only tasks and flows know Prefect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from models import ROOT

LAYERS = [
    ["redaction", "errors"],
    ["formats", "solver", "presolve", "slices", "machine", "gain_model", "kernels.compiler"],
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


def test_reports_need_no_torch() -> None:
    """Reports are written where no torch is."""
    code = "import sys, mpq.report, mpq.figures, mpq.paper_figures, mpq.findings, mpq.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_stay_small() -> None:
    """No file outgrows 350 lines or is named after nothing."""
    for path in [p for d in ("mpq", "tasks", "flows") for p in (ROOT / d).rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 350, path
        assert path.stem not in ("utils", "helpers", "common", "base"), path
