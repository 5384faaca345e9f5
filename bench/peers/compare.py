"""mpq beside the tools that a user would pick instead, on the same checkpoints, targets, quantizers and text:

    python bench/peers/compare.py CHECKPOINT… [--environments .work/peers] [--out .work/peers/answers]

A tool gives a plan alone, op → format; mpq rounds, and measures it on held-out text. Tools: mpq; a HIGGS-like allocation;
Random, the median of three draws; what the KL of each op lowered alone, measured on the *held-out* text, says (no tool can know it);
and those of `make peers` that are installed. Each is asked for all targets of a menu at once, without ties and with q, k, v and
gate, up tied. Answers are kept in `--out` and used again; delete them to search anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
from allocation import allocated
from chance import drawn
from task import Plan, Task

from mpq.models.blocks import Blocks
from mpq.models.checkpoint import fingerprint, load_config
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.models.text import read_blocks
from mpq.program.constraints import allowed
from mpq.spec import ConstraintSpec, TextSpec

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from measured import BASE, Evaluator  # noqa: E402
from record import folder_of, record  # noqa: E402

MENUS = {
    "BF16/FP8": (["fp8_e4m3"], [9, 10, 11, 12, 13, 14]),
    "BF16/FP8/INT8": (["fp8_e4m3", "int8"], [9, 10, 11, 12, 13, 14]),
    "BF16/FP8/NVFP4": (["fp8_e4m3", "nvfp4"], [5, 6, 7, 8, 10, 12]),
}
FUSED = (("*.q_proj", "*.k_proj", "*.v_proj"), ("*.gate_proj", "*.up_proj"))
# tool → its script, and the environment of `make peers` that it runs in ("" is mpq's own)
TOOLS = {
    "mpq": ("ours.py", ""),
    "higgs": ("higgs.py", ""),
    "modelopt-gradient": ("modelopt_search.py", "modelopt"),
    "modelopt-kl": ("modelopt_search.py", "modelopt"),
    "auto-round": ("auto_round_search.py", "auto-round"),
}
SEARCHERS = ("modelopt-gradient", "modelopt-kl", "auto-round")
PEERS = (*SEARCHERS, "higgs")
DRAWS = 3


def tasks_of(checkpoint: Path, samples: int, length: int, out: Path) -> Iterator[tuple[Task, str]]:
    """The searches for one checkpoint, and what each is called. The model's head stays in base."""
    groups = groups_table(partition(trace(load_config(checkpoint))), 1, length)
    linears = groups.filter(pl.col("kind") == "linear", ~pl.col("op").str.contains("lm_head|embed"))
    ops = dict(linears.select("op", "parameters").iter_rows())
    tokens = out / f"{checkpoint.name}-calibration.npy"
    np.save(tokens, text(checkpoint, "calibration.txt", samples, length).tokens)
    for menu, (formats, targets) in MENUS.items():
        free = Task(str(checkpoint.resolve()), str(tokens.resolve()), formats, targets, ops, [])
        yield free, f"{menu}, free"
        ties = tuple(t for t in FUSED if any(op.endswith(t[0][1:]) for op in ops))
        if ties:
            of = allowed(linears, ConstraintSpec(tie=ties), "none", {"linear": formats}, "fp32")
            fused = [list(d) for d in of.decisions if len(d) > 1]
            yield replace(free, ties=fused), f"{menu}, tied"


def text(checkpoint: Path, name: str, samples: int, length: int) -> Blocks:
    source = TextSpec(source=str(checkpoint / name), samples=samples, length=length)
    return read_blocks(source, checkpoint, load_config(checkpoint).vocab_size)


def answer_of(tool: str, task: Task, file: Path, environments: Path) -> dict[str, Any] | None:
    """What a tool answers, from its file where it has answered; None where it is not installed, or failed, which is told."""
    script, environment = TOOLS[tool]
    python = environments / environment / "bin" / "python" if environment else sys.executable
    if not file.exists():
        if not Path(python).exists():
            return None
        asked = file.with_suffix(".task.json")
        task.write(asked)
        command = [str(python), str(HERE / script), str(asked), str(file), tool]
        # one thread, so that CPU seconds compare; nothing is fetched
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        file.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            print(f"{tool} failed on {file.stem}: see {file.with_suffix('.log')}", flush=True)
            return None
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return told


def compared(checkpoint: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], ...]:
    """Every plan's effect, and what each search took."""
    plans, searches = [], []
    held_out = text(checkpoint, "heldout.txt", options.held_out, options.length)
    evaluator = Evaluator(checkpoint, held_out)
    tasks = list(tasks_of(checkpoint, options.samples, options.length, options.out))
    fuses = any(task.ties for task, _ in tasks)
    model = {"fingerprint": fingerprint(checkpoint), "base": BASE}
    for task, case in tasks:
        where = {"checkpoint": checkpoint.name, "case": case}
        of_tool: dict[str, list[dict[float, Plan]]] = {}
        alone = {(op, f): evaluator.effect({op: f}).kl for op in task.ops for f in task.formats}
        of_tool["measured"] = [{t: allocated(task, alone, t) for t in task.targets}]
        of_tool["random"] = [{t: drawn(task, t, s) for t in task.targets} for s in range(DRAWS)]
        for tool in TOOLS:
            name = f"{checkpoint.name}-{case}-{tool}".replace("/", "-").replace(", ", "-")
            # by trial, it takes minutes: as shipped alone, and without its stand-in for NVFP4
            if tool == "modelopt-kl" and ("NVFP4" in case or (case.endswith("free") and fuses)):
                continue
            told = answer_of(tool, task, options.out / f"{name}.json", options.environments)
            if told is None:
                continue
            of_tool[tool] = [{float(t): plan for t, plan in told.pop("plans").items()}]
            searches.append({**where, "tool": tool, **told})
        for tool, answers in of_tool.items():
            for target in task.targets:
                of_draws = [asdict(evaluator.effect(a[target])) for a in answers]
                bits = [task.bits(a[target]) for a in answers]
                middle = {k: median(e[k] for e in of_draws) for k in of_draws[0]}
                row = {**where, **model, "target": target, "tool": tool, "bits": median(bits)}
                plans.append({**row, **middle, "over": max(bits) > target + 1e-9})
        print(case, checkpoint.name, "done", flush=True)
    return plans, searches


def ratios(plans: pl.DataFrame) -> dict[str, Any]:
    """mpq's KL over that of each tool, cell by cell (checkpoint, case, target): median, largest, and where it is."""
    cell = ["checkpoint", "case", "target"]
    ours = plans.filter(pl.col("tool") == "mpq").select(*cell, ours="kl")
    others = plans.filter(pl.col("tool") != "mpq", ~pl.col("over")).join(ours, on=cell)
    best = others.filter(pl.col("tool").is_in(PEERS)).sort("kl").group_by(cell).first()
    both = pl.concat(
        [others, best.with_columns(tool=pl.lit("best peer")).select(others.columns)]
    ).with_columns(ratio=pl.col("ours") / pl.col("kl"))
    told = {}
    for (tool,), rows in both.sort("tool").group_by(["tool"], maintain_order=True):
        worst = rows.sort("ratio").tail(1).select(*cell).row(0)
        found = {"cells": rows.height, "median": rows["ratio"].median()}
        over = (rows["ratio"] > (1.05 if tool == "measured" else 1.02)).sum()
        told[str(tool)] = {**found, "largest": rows["ratio"].max(), "at": worst, "missed": over}
    return told


def costs_of(searches: list[dict[str, Any]]) -> dict[str, Any]:
    """Median CPU seconds (scoring, and solving for one target) and largest memory of each tool, with NVFP4 in the menu or not;
    and mpq's over those of the fastest and the leanest peer, case by case: median and largest."""
    rows = pl.DataFrame(searches).with_columns(
        cpu_s=pl.col("score_cpu_s") + pl.col("solve_cpu_s") / len(MENUS["BF16/FP8"][1]),
        nvfp4=pl.col("case").str.contains("NVFP4"),
    )
    of_tools = rows.group_by("tool", "nvfp4").agg(pl.col("cpu_s").median(), pl.col("peak_mb").max())
    told: dict[str, Any] = {"tools": of_tools.sort("tool", "nvfp4").to_dicts()}
    for column in ("cpu_s", "peak_mb"):
        case = ["checkpoint", "case"]
        least = (
            rows.filter(pl.col("tool").is_in(SEARCHERS)).group_by(case).agg(pl.col(column).min())
        )
        own = rows.filter(pl.col("tool") == "mpq").select(*case, own=column)
        ratio = own.join(least, on=case).select(pl.col("own") / pl.col(column)).to_series()
        told[column] = {"median": ratio.median(), "largest": ratio.max(), "cases": len(ratio)}
    return told


def summary(plans: pl.DataFrame, searches: list[dict[str, Any]]) -> dict[str, Any]:
    """What is recorded: ratios of all cells, of each case, of each checkpoint; what searches took."""
    of_parts = {
        by: {str(key): ratios(of) for (key,), of in plans.group_by([by], maintain_order=True)}
        for by in ("case", "checkpoint")
    }
    return {"ratios": ratios(plans), **of_parts, **costs_of(searches), "searches": searches}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=16, help="blocks to calibrate with")
    parser.add_argument("--held-out", type=int, default=24, help="blocks to measure on")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--environments", type=Path, default=Path(".work/peers"))
    parser.add_argument("--out", type=Path, default=Path(".work/peers/answers"))
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    plans, searches = [], []
    for checkpoint in options.checkpoints:
        more, took = compared(checkpoint, options)
        plans += more
        searches += took
        table = pl.DataFrame(plans)
        table.write_parquet(folder_of() / "peers.parquet")
        record("peers", summary(table, searches))


if __name__ == "__main__":
    main()
