"""What every tool is asked, and how it answers: JSON files, since each runs in an environment of its own.

Imports nothing but the standard library, for the peers' environments.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

# bits of a weight as every tool counts them: a block's scale is counted, a row's is not
BITS = {"base": 16.0, "fp8_e4m3": 8.0, "int8": 8.0, "nvfp4": 4.5}
Plan = dict[str, str]  # op → format, `base` where it is not lowered
S = TypeVar("S")


@dataclass(frozen=True)
class Task:
    """One search: `ops` are op → number of weights, `ties` the ops that take one format together, `tokens` a .npy of
    (samples, length) token ids to calibrate with, `targets` mean bits a weight."""

    checkpoint: str
    tokens: str
    formats: list[str]
    targets: list[float]
    ops: dict[str, int]
    ties: list[list[str]]

    def bits(self, plan: Plan) -> float:
        """Mean bits a weight of a plan."""
        return sum(n * BITS[plan[op]] for op, n in self.ops.items()) / sum(self.ops.values())

    def decisions(self) -> list[list[str]]:
        """The ops that are decided together, in the model's order."""
        of = {op: together for together in self.ties for op in together}
        return [t for op in self.ops if (t := of.get(op, [op]))[0] == op]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def answer(score: Callable[[Task], S], solve: Callable[[Task, S, float], Plan]) -> None:
    """Run a tool as a program, `tool.py TASK ANSWER`: its scores once, then a plan for each target.

    The answer has the plans, CPU seconds of the scoring (the model is loaded in it) and of all solving, and the peak of the
    process's memory, its imports included (VmHWM: what getrusage says begins with the parent's).
    """
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    start = time.process_time()
    scores = score(task)
    scored = time.process_time()
    plans = {target: solve(task, scores, target) for target in task.targets}
    told = {
        "plans": plans,
        "score_cpu_s": scored - start,
        "solve_cpu_s": time.process_time() - scored,
        "peak_mb": _peak_kb() / 1024,
    }
    Path(sys.argv[2]).write_text(json.dumps(told, indent=1), encoding="utf-8")


def _peak_kb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(status.partition("VmHWM:")[2].split()[0])
