"""What searches cost beside each other: `python bench/peers/costs.py CHECKPOINT… [--environments .work/peers] [--rounds 3]`.

mpq and the two fastest peers by turns, on one thread each, of every checkpoint in BF16/FP8 and BF16/FP8/INT8 without ties: CPU
seconds, the model's loading among them (medians), and the process's largest memory. To be run on a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from compare import answer_of, tasks_of

TOOLS = ("mpq", "modelopt-gradient", "auto-round")
CASES = ("BF16/FP8, free", "BF16/FP8/INT8, free")


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--environments", type=Path, default=Path(".work/peers"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(given)
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as out:
            tasks = {case: task for task, case in tasks_of(checkpoint, 16, 256, Path(out))}
            for case in CASES:
                took: dict[str, list[tuple[float, float]]] = {}
                for _ in range(options.rounds):
                    for tool in TOOLS:
                        answer = Path(out) / "answer.json"
                        answer.unlink(missing_ok=True)
                        told = answer_of(tool, tasks[case], answer, options.environments)
                        if told:
                            solving = told["solve_cpu_s"] / len(tasks[case].targets)
                            cost = (told["score_cpu_s"] + solving, told["peak_mb"])
                            took.setdefault(tool, []).append(cost)
                for tool, costs in took.items():
                    seconds, peak = median(c for c, _ in costs), max(p for _, p in costs)
                    print(f"{checkpoint.name}, {case}, {tool}: {seconds:.2f} s, {peak:.0f} MB")


if __name__ == "__main__":
    main()
