"""What a person at a terminal is told of a run's stages."""

from __future__ import annotations

import io
from pathlib import Path

from prefect import flow
from rich.console import Console
from small import small_spec

from mpq.flows.place import Place
from mpq.flows.run import Run, Subject
from mpq.flows.terminal import in_terminal
from mpq.spec import RunSpec


@flow
def rounds(spec: RunSpec) -> dict[str, str]:
    """Stages as rounds ask for them: one again, cached, and one again of which something was computed."""
    run = Run(Subject(spec, Place()), {}, ())
    for name, cached in (("gains", 0), ("solve", 3), ("gains", 3), ("solve", 1)):
        run._account(name, 3, cached, 0.0)
    return {"stages": str(len(run.done))}


def test_a_stage_that_is_only_asked_again_takes_no_line(tmp_path: Path) -> None:
    """A stage is told the first time, cached or not, and again where it computed something; the record has all of them."""
    said = io.StringIO()
    console = Console(file=said, width=100)
    assert in_terminal(small_spec(tmp_path), console, lambda: None, rounds) == {"stages": "4"}
    told = [line.split()[1:] for line in said.getvalue().splitlines() if "✓" in line]
    assert [(name, " ".join(how[2:-2])) for name, *how in told] == [
        ("gains", "computed"),
        ("solve", "cached"),
        ("solve", "1 of 3 cached"),
    ]
