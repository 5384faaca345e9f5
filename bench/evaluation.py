"""Cost of an evaluation under a plan against the same on the unwrapped model: `python bench/evaluation.py [DOCUMENTS]`.

The demo checkpoint (FP32) and two cases: lm-evaluation-harness on the first DOCUMENTS (20) of each of the four example tasks,
where the unwrapped model is run by the harness alone, nothing of mpq between; and the losses of 32 held-out texts of 256 tokens.
A plan's seconds hold everything that the plan adds: putting it on, weights rounded for its seed, taking it off. Each plan is
measured in pairs with base right before it; ratios are medians over pairs with their range, in wall clock and in CPU seconds
(which a busy machine disturbs less). Peak memory is that of the losses above the loaded model, each in a process of its own.
Last line: JSON.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from record import record
from torch import nn

from mpq.evaluation.harness import score
from mpq.evaluation.losses import losses
from mpq.evaluation.task_data import Tasks, open_tasks, quiet
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.loading import load_model
from mpq.models.partition import partition
from mpq.models.text import load_tokenizer, read_blocks
from mpq.running.apply import apply_plan
from mpq.spec import TextSpec

ROOT = Path(__file__).parent.parent
DEMO, DATA = ROOT / "examples" / "demo", ROOT / "examples" / "tasks"
TASKS = ["hellaswag", "lambada_openai", "winogrande", "piqa"]
PAIRS, BATCH = 5, 8


def plans() -> dict[str, dict[str, str]]:
    """Plans of the demo model by name. The mixed one deals formats out in model order, base among them."""
    kinds = {op.name: op.kind for group in partition(trace(load_config(DEMO))) for op in group.ops}
    linears = [op for op, kind in kinds.items() if kind == "linear"]
    deal = ("fp8_e4m3", "int8", "bf16", "fp32", "fp8_e5m2")
    return {
        "FP8 linears": dict.fromkeys(linears, "fp8_e4m3"),
        "INT8 linears": dict.fromkeys(linears, "int8"),
        "FP8 linears and Q K": dict.fromkeys(
            (op for op in kinds if not op.endswith("av_matmul")), "fp8_e4m3"
        ),
        "FP8 everything": dict.fromkeys(kinds, "fp8_e4m3"),
        "INT8 everything": dict.fromkeys(kinds, "int8"),
        "mixed": {op: deal[i % len(deal)] for i, op in enumerate(kinds)},
    }


def harness_alone(model: nn.Module, tokenizer: Any, tasks: Tasks, documents: int) -> None:
    """What the harness does by itself."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    wanted: Any = {"tasks": dict(tasks.loaded), "groups": {}, "group_map": {}}
    with quiet():
        evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
            wanted,
            limit=documents,
            bootstrap_iters=0,
        )


def under(model: nn.Module, formats: Mapping[str, str], work: Callable[[], object]) -> None:
    with apply_plan(model, formats, base="fp32", seed=0):
        work()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall clock and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compared(
    name: str, model: nn.Module, base: Callable[[], object], work: Callable[[], object]
) -> list[dict[str, Any]]:
    """Each plan's `work` against `base`, in interleaved pairs; the first round prepares."""
    table = []
    pairs: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {
        plan: [] for plan in plans()
    }
    for _ in range(PAIRS + 1):
        for plan, formats in plans().items():
            pairs[plan].append(
                (seconds(base), seconds(lambda formats=formats: under(model, formats, work)))
            )  # type: ignore[misc]
    for plan, measured in pairs.items():
        times = np.array(measured[1:])  # (pairs, base and plan, wall and CPU)
        ratio = times[:, 1] / times[:, 0]
        row: dict[str, Any] = {
            "of": name,
            "plan": plan,
            "base_s": float(np.median(times[:, 0, 0])),
            "plan_s": float(np.median(times[:, 1, 0])),
        }
        for i, clock in enumerate(("wall", "cpu")):
            row |= {
                f"{clock}_ratio": float(np.median(ratio[:, i])),
                f"{clock}_range": [float(ratio[:, i].min()), float(ratio[:, i].max())],
            }
        table.append(row)
        print(
            f"{name}, {plan}: {row['wall_ratio']:.2f} of base in wall clock, {row['cpu_ratio']:.2f} in CPU seconds",
            flush=True,
        )
    return table


def held_out() -> Blocks:
    return read_blocks(
        TextSpec(source=str(DEMO / "heldout.txt"), samples=32), DEMO, load_config(DEMO).vocab_size
    )


def peak_bytes(plan: str) -> int:
    """Peak resident memory of the losses under a plan (or `base`) above that of the loaded model, in a process of its own."""
    return int(
        subprocess.run(
            [sys.executable, __file__, "--peak", plan], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def _peak(plan: str) -> None:
    model, blocks = load_model(DEMO, "fp32"), held_out()
    formats = plans().get(plan, {})
    before = _high_water()
    under(model, formats, lambda: losses(model, blocks))
    print(_high_water() - before)


def _high_water() -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def main(documents: int) -> None:
    model, tokenizer, blocks = load_model(DEMO, "fp32"), load_tokenizer(DEMO), held_out()
    with open_tasks(TASKS, DATA) as tasks:
        harness = compared(
            "harness",
            model,
            lambda: harness_alone(model, tokenizer, tasks, documents),
            lambda: score(model, tokenizer, tasks, limit=documents, batch=BATCH),
        )
    loss = compared("losses", model, lambda: losses(model, blocks), lambda: losses(model, blocks))
    peaks = {plan: peak_bytes(plan) for plan in ("base", *plans())}
    print({plan: f"{bytes_ / 1e6:.0f} MB" for plan, bytes_ in peaks.items()})
    record(
        "evaluation",
        {
            "documents": documents * len(TASKS),
            "pairs": PAIRS,
            "times": harness + loss,
            "peak_bytes": peaks,
        },
    )


if __name__ == "__main__":
    _peak(sys.argv[2]) if sys.argv[1:2] == ["--peak"] else main(
        int(sys.argv[1]) if sys.argv[1:] else 20
    )
