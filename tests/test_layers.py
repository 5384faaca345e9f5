"""Imports go one way: a folder of mpq imports from those above it in ROOMS only, no two files import each other in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx
import pytest
from small import ROOT

# the way of the data; each may import from itself and from those before it
ROOMS = [
    ["redaction"],
    ["errors"],
    ["caches", "documents", "folders", "urls"],
    ["devices", "formats"],
    ["spec"],
    ["store"],
    ["models"],
    ["kernels"],
    ["running"],
    ["loss"],
    ["serving"],
    ["timing"],
    ["program"],
    ["evaluation"],
    ["export"],
    ["method"],
    ["report"],
    ["paper"],
    ["cli"],
    ["tasks"],
    ["flows"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(
    path
    for folder in ("mpq", "tasks", "flows", "bench", "deployments")
    for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    """`mpq/kernels/cpu.py` is `mpq.kernels.cpu`, `flows/watch.py` is `mpq.flows.watch`, `bench/timing.py` is `timing`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith(("flows", "tasks")):
        return f"mpq.{name}"
    return name.removeprefix("bench.")


MODULES = {name_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, at its top or inside functions; type checking alone does not count."""
    tree = ast.parse(path.read_text())
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{a.name}" for a in node.names} & MODULES
            found |= within or {node.module}
    return found


def room_of(name: str) -> str:
    """The folder of mpq that a module lies in, or the module itself at the top."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """A module imports from its own room or those before it; Prefect is known to tasks and flows alone."""
    name = name_of(path)
    if not name.startswith("mpq."):
        return
    assert room_of(name) in LEVEL or name == "mpq.__main__", f"give {room_of(name)} a place"
    for other in imports(path):
        if other in MODULES and other.startswith("mpq.") and name != "mpq.__main__":
            through = room_of(name) == "cli" and room_of(other) == "flows"  # `mpq run` is a flow
            assert through or LEVEL[room_of(other)] <= LEVEL[room_of(name)], (
                f"{name} imports {other}"
            )
        if other.partition(".")[0] == "prefect":
            assert room_of(name) in ("tasks", "flows"), f"{name} imports {other}"


def test_no_circles() -> None:
    """No two files import each other, through however many others."""
    graph = networkx.DiGraph(
        (name_of(path), other)
        for path in FILES
        for other in imports(path)
        if other in MODULES and other != name_of(path)
    )
    assert not list(networkx.simple_cycles(graph))


def test_reports_need_no_torch() -> None:
    """Reports are written where no torch is."""
    code = (
        "import sys, mpq.report.page, mpq.report.figures, mpq.paper.figures, mpq.report.findings, "
        "mpq.report.runs; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_names_say_something() -> None:
    """No file is named after nothing."""
    for path in FILES:
        assert path.stem not in ("utils", "helpers", "common", "base"), path
